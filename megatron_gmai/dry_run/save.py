"""What each rank writes in a checkpoint, and the host memory for it: counted without any weight.

The code of a real run builds each rank on a device that does not exist and says which boxes of
which tensors this rank writes (`training.checkpoint.pieces_to_write`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_gmai.config import Config
from megatron_gmai.dry_run.absent import device_of, world_of
from megatron_gmai.dry_run.counter import DeviceCounter
from megatron_gmai.dry_run.report import GIB, chosen_ranks
from megatron_gmai.dry_run.run import build, saved_pieces
from megatron_gmai.training.pieces import Piece

COPIED_AHEAD = 10_000_000  # bytes on their way from a GPU while a box is written: torch's default


@dataclass(frozen=True)
class RankShare:
    """A rank's part of a checkpoint. Bytes of tensors; torch adds some 1.5 KB to each box."""

    rank: int
    bytes: int
    boxes: int
    largest: int  # bytes of the largest box

    @property
    def host_at_once(self) -> int:
        """Boxes go to the file one after the other, each from a copy of its own."""
        return min(self.bytes, self.largest + COPIED_AHEAD)

    @property
    def host_async(self) -> int:
        """With --async-save: a copy of the share, which is written as it is."""
        return self.bytes

    def as_json(self) -> dict[str, int]:
        """As an object of plain values."""
        return {**asdict(self), "host_at_once": self.host_at_once, "host_async": self.host_async}


def rank_share(config: Config, rank: int, world_size: int, kind: str = "cuda") -> RankShare:
    """Build rank `rank` of `world_size`, on the path of `kind`, and count what it would write.

    Raises ValueError for a layout that does not divide.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    counter = DeviceCounter(device_of(kind), fake)
    opened = world_of(config, rank, world_size, kind, counter.note_synchronize)
    with opened as world, fake, counter:
        chunks, step = build(config, world, counter)
        return _counted(rank, saved_pieces(chunks, step.optimizer, config))


def shares(config: Config, world_size: int, ranks: list[int] | None = None) -> list[RankShare]:
    """The shares of `ranks`, or of all. Raises ValueError for a wrong rank."""
    chosen = chosen_ranks(ranks, range(world_size), world_size)
    return [rank_share(config, rank, world_size) for rank in chosen]


def _counted(rank: int, pieces: Sequence[Piece]) -> RankShare:
    sizes = [piece.tensor.nbytes for piece in pieces]
    return RankShare(rank, sum(sizes), len(sizes), max(sizes, default=0))


def as_text(shares: Sequence[RankShare], world_size: int) -> str:
    """What they come to, and a row for each rank."""
    return "\n".join(_lines(shares, world_size))


def _lines(shares: Sequence[RankShare], world_size: int) -> Iterator[str]:
    files = sum(share.boxes > 0 for share in shares)
    total, most = sum(share.bytes for share in shares), max(share.bytes for share in shares)
    yield (
        f"a checkpoint, {len(shares)} of {world_size} ranks: {total / GIB:.3f} GiB in {files} "
        f"files, one a rank; the largest is {most * len(shares) / max(1, total):.3f} x the mean. "
        "Rank 0 also writes .metadata, manifest.json and carried.safetensors."
    )
    yield "rank   written GiB   boxes   largest GiB   host memory GiB, at once   --async-save"
    for share in shares:
        at_once, copied = share.host_at_once / GIB, share.host_async / GIB
        yield (
            f"{share.rank:4}   {share.bytes / GIB:11.3f}   {share.boxes:5}   "
            f"{share.largest / GIB:11.3f}   {at_once:24.3f}   {copied:12.3f}"
        )
