"""How a world of ranks, a model and a micro-batch divide. Pure arithmetic: no processes, no torch.

Terms: a *pipeline stage* is what one pipeline rank runs; with virtual stages it holds several
*chunks*, each a contiguous run of layers. Chunks are counted in the order of the model: chunk
`v * PP + p` is the v-th of pipeline rank p.
"""

from dataclasses import dataclass

from megatron_gmai.config import Config, ParallelConfig, TrainConfig


@dataclass(frozen=True)
class Layout:
    """`world_size` ranks as tensor x context x pipeline x data parallel."""

    world_size: int
    tensor: int
    pipeline: int
    context: int = 1

    @classmethod
    def of(cls, parallel: ParallelConfig, world_size: int) -> "Layout":
        return cls(
            world_size,
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.context_parallel_size,
        )

    @property
    def model(self) -> int:
        """Ranks that work on one micro-batch together."""
        return self.tensor * self.context * self.pipeline

    @property
    def data(self) -> int:
        """Copies of the model. Raises ValueError where the world does not divide."""
        return _quotient(self.world_size, self.model, "processes", "TP x CP x PP")

    def micro_batches(self, train: TrainConfig) -> int:
        """Forward passes per rank and optimizer step. Raises ValueError for a remainder."""
        together = train.micro_batch_size * self.data
        return _quotient(train.global_batch_size, together, "packs", "micro-batch x DP")


@dataclass(frozen=True)
class Chunk:
    """A run of the model's layers that one rank holds as one module."""

    layers: range  # decoder layers, counted from 0 in the whole model
    is_first: bool = True  # with the embedding
    is_last: bool = True  # with the final norm, the output layer and the loss
    virtual: int | None = None  # index among the rank's chunks; None where there is only one
    has_vision: bool = True  # with the vision tower and the projector


def layers_of_chunks(parallel: ParallelConfig, num_layers: int) -> tuple[int, ...]:
    """Decoder layers of every chunk, in the order of the model.

    `--pipeline-layout` lists them; else they are even. Raises ValueError where that cannot be.
    """
    virtual = virtual_stages(parallel, num_layers)
    chunks = parallel.pipeline_model_parallel_size * virtual
    if parallel.pipeline_layout is None:
        return (_quotient(num_layers, chunks, "layers", "PP x virtual stages"),) * chunks
    words = parallel.pipeline_layout.split(",")
    counts = tuple(int(word) for word in words if word.strip().isdecimal())
    if len(words) != chunks or len(counts) != chunks or sum(counts) != num_layers:
        raise ValueError(
            f"--pipeline-layout {parallel.pipeline_layout}: {chunks} numbers (PP x virtual stages) "
            f"that sum to {num_layers} layers are needed"
        )
    return counts


def virtual_stages(parallel: ParallelConfig, num_layers: int) -> int:
    """Chunks per pipeline rank, from either of Megatron's two flags. Raises ValueError."""
    if parallel.num_layers_per_virtual_pipeline_stage is None:
        return parallel.num_virtual_stages_per_pipeline_rank
    stages = parallel.pipeline_model_parallel_size
    together = stages * parallel.num_layers_per_virtual_pipeline_stage
    return _quotient(num_layers, together, "layers", "PP x layers per virtual stage")


def chunks_of_rank(parallel: ParallelConfig, num_layers: int, rank: int) -> tuple[Chunk, ...]:
    """What pipeline rank `rank` holds. Raises ValueError where the layers do not divide."""
    counts = layers_of_chunks(parallel, num_layers)
    stages = parallel.pipeline_model_parallel_size
    virtual = len(counts) // stages
    # With `all-ranks` each pipeline rank has a copy of the tower, in the first of its chunks.
    with_vision = stages if encodes_ahead(parallel) else 1
    chunks = []
    for index in range(rank, len(counts), stages):
        begin = sum(counts[:index])
        chunks.append(
            Chunk(
                layers=range(begin, begin + counts[index]),
                is_first=index == 0,
                is_last=index == len(counts) - 1,
                virtual=index // stages if virtual > 1 else None,
                has_vision=index < with_vision,
            )
        )
    return tuple(chunks)


def encodes_ahead(parallel: ParallelConfig) -> bool:
    """Whether all pipeline ranks encode the images of a step before its first micro-batch."""
    return parallel.vision_phase == "all-ranks"


@dataclass(frozen=True)
class ImageShare:
    """Which images of a micro-batch a rank encodes: they are dealt like cards to `ranks` ranks,
    and this one, the `index`-th, has the first, if `index` is 0, and every `ranks`-th after it.

    The ranks of one TP x CP group see the same micro-batch; each encodes its own images with its
    own copy of the tower, and all gather the features. So every image is encoded once, and the
    tower's gradient is the *sum* over these ranks as well as over the data-parallel ones: the
    tower's "data-parallel" group is all ranks that have a copy (`Groups.vision`).
    """

    index: int = 0
    ranks: int = 1

    def after(self, images: int) -> "ImageShare":
        """The share of a micro-batch before which so many images of the step have been dealt: a
        step's images so come out even over the ranks, however few a micro-batch has."""
        return ImageShare((self.index - images) % self.ranks, self.ranks)

    def length(self, images: int) -> int:
        """Images that every rank encodes, blanks included: at least one, since a rank that skipped
        the tower would leave the others waiting in the gather."""
        return max(1, -(-images // self.ranks))

    def own(self, images: int) -> range:
        """The numbers of this rank's images, among so many of a micro-batch."""
        return range(self.index, images, self.ranks)


@dataclass(frozen=True)
class Recompute:
    """Megatron's three recomputation settings; all None when nothing is recomputed."""

    granularity: str | None = None
    method: str | None = None
    num_layers: int | None = None

    @classmethod
    def of(cls, config: Config, chunk: Chunk) -> "Recompute":
        """`--selective-recompute F` recomputes the first F of the chunk's layers completely."""
        train = config.train
        layers = round(train.selective_recompute * len(chunk.layers))
        if layers > 0:
            return cls("full", "block", layers)
        return cls(train.recompute_granularity, train.recompute_method, train.recompute_num_layers)


def _quotient(whole: int, part: int, what: str, divisor: str) -> int:
    if part < 1 or whole % part:
        raise ValueError(f"{whole} {what} do not divide by {part} ({divisor})")
    return whole // part
