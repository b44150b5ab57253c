"""The training model in any layout: what its ranks hold together."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gmai.config import Config, ModelConfig, ParallelConfig, RunConfig
from megatron_gmai.convert.compare import Side
from megatron_gmai.convert.sharding import unshard
from megatron_gmai.layout import chunks_of_rank
from megatron_gmai.model.gmai_vl import GMAIVL, build_chunks
from megatron_gmai.runtime.groups import destroy_groups
from megatron_gmai.runtime.world import World, open_world
from megatron_gmai.training.weights import fill, named_weights
from megatron_gmai.validation import validate_layout
from megatron_gmai.weights import Weight, weights


@contextmanager
def training_world(model: ModelConfig, parallel: ParallelConfig) -> Iterator["Ranks"]:
    """The processes that torchrun started, or this one, as a layout in fp32 on CPUs.

    Raises ValueError where model or processes do not divide by it.
    """
    config = Config(model=model, parallel=parallel, run=RunConfig(device="cpu", dtype="fp32"))
    validate_layout(config, int(os.environ.get("WORLD_SIZE", "1")))
    try:
        yield Ranks(config, open_world(config))
        # torchrun ends the others when one leaves with a status, and the first has more to do.
        dist.barrier()
    finally:
        destroy_groups()


class Ranks:
    """A layout, and models in it."""

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world

    def model(self, source: Mapping[str, Tensor]) -> GMAIVL:
        """This rank's chunk, filled from whole weights, in eval mode."""
        (model,) = build_chunks(self.config, self.world)
        fill([model], source)
        return model.requires_grad_(False).eval()

    def hold(self, side: Side) -> Side:
        """The same side, with its weights as the ranks hold them."""
        parallel = self.config.parallel
        tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        held = HeldWeights(self, self.model(side.weights), side.weights)
        return replace(side, kind=f"{side.kind}, held by TP {tp} x PP {pp}", weights=held)

    def stage_of(self, weight: Weight) -> int:
        """The first pipeline rank that holds a weight."""
        parallel, layers = self.config.parallel, self.config.model.language.num_layers
        return next(
            stage
            for stage in range(parallel.pipeline_model_parallel_size)
            if any(weight.is_in(chunk) for chunk in chunks_of_rank(parallel, layers, stage))
        )


class HeldWeights(Mapping[str, Tensor]):
    """Whole weights, put together from the parts that the ranks of a layout hold.

    All ranks ask for the same ones in the same order. They come in the dtype of `source`, from
    which the model was filled, unless the fp32 numbers that are held do not fit into it.
    """

    def __init__(self, ranks: Ranks, model: GMAIVL, source: Mapping[str, Tensor]) -> None:
        self.model, self._ranks, self._source = model, ranks, source
        self._own = {weight.name: parameter for weight, parameter in named_weights([model])}
        self._table = weights(ranks.config.model)

    def __getitem__(self, name: str) -> Tensor:
        weight, groups = self._table[name], self.model.groups
        stage = self._ranks.stage_of(weight)
        whole = torch.empty(weight.shape)
        if groups.pp.rank() == stage:
            own = self._own[name].detach().contiguous()
            parts = [torch.empty_like(own) for _ in range(groups.tp.size())]
            dist.all_gather(parts, own, group=groups.tp)
            whole = unshard(weight, parts).contiguous()
        dist.broadcast(whole, dist.get_global_rank(groups.pp, stage), group=groups.pp)
        stored = whole.to(self._source[name].dtype)
        return stored if torch.equal(stored.float(), whole) else whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)
