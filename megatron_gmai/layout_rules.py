"""Which layouts work: every reason why one does not, with the nearest that does."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_gmai.config import Config
from megatron_gmai.layout import Layout, layers_of_chunks, virtual_stages


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration."""

    given: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.given}: {self.reason}; {self.remedy}"


def layout_problems(config: Config, world_size: int) -> Iterator[Problem]:
    """Whether the processes and the model divide by the layout."""
    parallel = config.parallel
    sizes = {
        "--tensor-model-parallel-size": parallel.tensor_model_parallel_size,
        "--pipeline-model-parallel-size": parallel.pipeline_model_parallel_size,
        "--context-parallel-size": parallel.context_parallel_size,
        "--num-virtual-stages-per-pipeline-rank": parallel.num_virtual_stages_per_pipeline_rank,
        "--num-layers-per-virtual-pipeline-stage": parallel.num_layers_per_virtual_pipeline_stage,
        "--ddp-bucket-size": parallel.ddp_bucket_size,
    }
    wrong = [f"{flag} {size}" for flag, size in sizes.items() if size is not None and size < 1]
    if wrong:
        yield Problem(" ".join(wrong), "out of range", "give numbers of at least 1")
        return
    yield from _world(config, world_size)
    yield from _tensor(config)
    yield from _context(config)
    yield from _pipeline(config)


def batch_problems(config: Config, world_size: int) -> Iterator[Problem]:
    """Whether the global batch divides into micro-batches, and these suit the pipeline."""
    train, parallel = config.train, config.parallel
    try:
        data_ranks = Layout.of(parallel, world_size).data
        virtual = virtual_stages(parallel, config.model.language.num_layers)
    except ValueError:
        return  # told by layout_problems; the batch cannot be judged without it
    together = train.micro_batch_size * data_ranks
    if together <= 0:
        return
    if train.global_batch_size % together:
        yield Problem(
            f"--global-batch-size {train.global_batch_size}",
            f"is no multiple of micro-batch {train.micro_batch_size} x DP {data_ranks} "
            f"= {together} packs",
            f"choose a multiple of {together}, or another --micro-batch-size",
        )
        return
    # The interleaved schedule hands micro-batches on in groups of PP.
    stages, count = parallel.pipeline_model_parallel_size, train.global_batch_size // together
    if virtual > 1 and count % stages:
        yield Problem(
            f"{virtual} virtual stages with {count} micro-batches a step",
            f"the interleaved schedule takes multiples of PP {stages}",
            f"choose --global-batch-size as a multiple of {stages * together}, or leave out "
            "virtual stages",
        )


def _world(config: Config, world_size: int) -> Iterator[Problem]:
    layout = Layout.of(config.parallel, world_size)
    if world_size % layout.model:
        context = f" x CP {layout.context}" if layout.context > 1 else ""
        yield Problem(
            f"TP {layout.tensor}{context} x PP {layout.pipeline} = {layout.model} ranks per model",
            f"does not divide the {world_size} processes of this run",
            "start a multiple of them (torchrun --nproc-per-node) or lower a parallel size",
        )


def _tensor(config: Config) -> Iterator[Problem]:
    parallel, language = config.parallel, config.model.language
    tensor = parallel.tensor_model_parallel_size
    for name, size in (
        ("attention heads", language.num_attention_heads),
        ("query groups", language.num_query_groups),
        ("feed-forward size", language.ffn_hidden_size),
    ):
        if size % tensor:
            yield Problem(
                f"--tensor-model-parallel-size {tensor}",
                f"does not divide the {name}, {size}",
                f"choose a divisor of {size}",
            )
    if parallel.sequence_parallel and tensor == 1:
        yield Problem(
            "--sequence-parallel",
            "there are no tensor-parallel ranks to share the sequence",
            "leave it out, or give --tensor-model-parallel-size 2 or more",
        )


def _context(config: Config) -> Iterator[Problem]:
    parallel, language = config.parallel, config.model.language
    context, tensor = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    heads, groups = language.num_attention_heads // tensor, language.num_query_groups // tensor
    # While it attends, each context-parallel rank has an equal part of the heads (and of the
    # key-value groups, or one of them that is repeated).
    if heads % context or (groups and groups % context and context % groups):
        yield Problem(
            f"--context-parallel-size {context}",
            f"does not divide the {heads} attention heads and {groups} query groups of a "
            "tensor-parallel rank",
            f"choose a divisor of {heads} that divides or is a multiple of {groups}",
        )
    tokens = config.train.micro_batch_size * config.data.max_length
    parts = context * (tensor if parallel.sequence_parallel else 1)
    if tokens % parts:
        words = "TP x CP" if parallel.sequence_parallel and context > 1 else "CP"
        yield Problem(
            f"--max-length {config.data.max_length}",
            f"{tokens} tokens of a micro-batch do not divide by "
            f"{'TP' if context == 1 else words} = {parts}",
            f"choose a --max-length that is a multiple of {parts}",
        )


def _pipeline(config: Config) -> Iterator[Problem]:
    parallel, layers = config.parallel, config.model.language.num_layers
    stages = parallel.pipeline_model_parallel_size
    given = f"--pipeline-model-parallel-size {stages}"
    both = parallel.num_layers_per_virtual_pipeline_stage is not None
    if both and parallel.num_virtual_stages_per_pipeline_rank > 1:
        yield Problem(
            "--num-virtual-stages-per-pipeline-rank and --num-layers-per-virtual-pipeline-stage",
            "two ways to say one thing",
            "give one of them",
        )
        return
    try:
        virtual = virtual_stages(parallel, layers)
    except ValueError as error:
        yield Problem(f"{given} --num-layers-per-virtual-pipeline-stage", str(error), "change it")
        return
    if virtual > 1 and stages == 1:
        yield Problem(
            f"{virtual} virtual stages",
            "there is one pipeline rank",
            "leave them out, or give --pipeline-model-parallel-size 2 or more",
        )
        return
    if parallel.pipeline_layout is None and layers % (stages * virtual):
        product = f"PP x {virtual} virtual stages = {stages * virtual} " if virtual > 1 else ""
        even = [n for n in range(1, layers + 1) if layers % n == 0]
        yield Problem(
            given,
            f"{product}does not divide the {layers} decoder layers",
            f"choose a divisor of {layers} (nearest: {min(even, key=lambda n: abs(n - stages))}), "
            "or list the layers of each stage by --pipeline-layout",
        )
    elif parallel.pipeline_layout is not None:
        try:
            layers_of_chunks(parallel, layers)
        except ValueError as error:
            yield Problem(
                f"--pipeline-layout {parallel.pipeline_layout}",
                str(error).split(": ")[-1],
                "list the decoder layers of every chunk, in the order of the model",
            )
