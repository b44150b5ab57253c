"""How a world of ranks and a model divide. Pure arithmetic: no processes, no torch."""

from dataclasses import dataclass

from megatron_gmai.config import Config, ParallelConfig, TrainConfig


@dataclass(frozen=True)
class Layout:
    """`world_size` ranks as tensor x pipeline x data parallel."""

    world_size: int
    tensor: int
    pipeline: int

    @classmethod
    def of(cls, parallel: ParallelConfig, world_size: int) -> "Layout":
        return cls(
            world_size,
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
        )

    @property
    def model(self) -> int:
        """Ranks that hold one copy of the model between them."""
        return self.tensor * self.pipeline

    @property
    def data(self) -> int:
        """Copies of the model. Raises ValueError where the world does not divide."""
        return _quotient(self.world_size, self.model, "processes", "TP x PP")

    def micro_batches(self, train: TrainConfig) -> int:
        """Forward passes per rank and optimizer step. Raises ValueError for a remainder."""
        together = train.micro_batch_size * self.data
        return _quotient(train.global_batch_size, together, "packs", "micro-batch x DP")

    def layers_per_stage(self, num_layers: int) -> int:
        """Decoder layers of each pipeline stage. Raises ValueError for a remainder."""
        return _quotient(num_layers, self.pipeline, "layers", "PP")


@dataclass(frozen=True)
class Recompute:
    """Megatron's three recomputation settings; all None when nothing is recomputed."""

    granularity: str | None = None
    method: str | None = None
    num_layers: int | None = None

    @classmethod
    def of(cls, config: Config) -> "Recompute":
        """`--selective-recompute F` recomputes the first F of each stage's layers completely."""
        train = config.train
        stages = config.parallel.pipeline_model_parallel_size
        layers = round(train.selective_recompute * config.model.language.num_layers / stages)
        if layers > 0:
            return cls("full", "block", layers)
        return cls(train.recompute_granularity, train.recompute_method, train.recompute_num_layers)


def _quotient(whole: int, part: int, what: str, divisor: str) -> int:
    if part < 1 or whole % part:
        raise ValueError(f"{whole} {what} do not divide by {part} ({divisor})")
    return whole // part
