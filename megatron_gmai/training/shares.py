"""Which rank writes what of a checkpoint where several hold the same: dealt out by bytes.

Every rank deals the same boxes in the same order, so they agree without a message.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_gmai.runtime.groups import Groups
from megatron_gmai.training.pieces import Piece
from megatron_gmai.weights import Weight


@dataclass(frozen=True)
class Held:
    """A piece on this rank, and along which axes of the layout other ranks hold the same."""

    piece: Piece
    along_tp: bool = False
    along_dp: bool = False  # data and context parallel
    along_pp: bool = False  # of these the first pipeline stage writes

    @classmethod
    def of(cls, piece: Piece, weight: Weight, along_dp: bool = True) -> "Held":
        """What belongs to a weight has copies where the weight has some. The towers and a tied
        embedding may have some on other pipeline stages."""
        return cls(piece, weight.cut == "none", along_dp, weight.place in ("vision", "ends"))


def own_share(held: Sequence[Held], groups: Groups) -> list[Piece]:
    """The pieces that this rank writes: all ranks together write one copy of each.

    What TP and DP ranks both hold is dealt first, since all ranks of a stage know it; what only one
    of the two axes shares is known to the ranks along it, and goes where least has gone so far.
    """
    tp, dp = groups.tp, groups.dp_cp
    here = [one for one in held if not one.along_pp or groups.pp.rank() == 0]
    loads: Counter[tuple[int, int]] = Counter()  # bytes by (TP rank, DP rank)
    mine: set[int] = set()
    for along_tp, along_dp in ((True, True), (True, False), (False, True), (False, False)):
        shared = [
            number
            for number, one in enumerate(here)
            if (one.along_tp, one.along_dp) == (along_tp, along_dp)
        ]
        ranks = [
            (t, d)
            for t in (range(tp.size()) if along_tp else (tp.rank(),))
            for d in (range(dp.size()) if along_dp else (dp.rank(),))
        ]
        sizes = {number: here[number].piece.tensor.nbytes for number in shared}
        taken = Counter(loads)
        dealt = deal(sizes, ranks, taken)
        mine |= {number for number, rank in dealt.items() if rank == (tp.rank(), dp.rank())}
        if along_tp and along_dp:
            loads = taken
    return [here[number].piece for number in sorted(mine)]


def deal(
    sizes: dict[int, int], ranks: Iterable[tuple[int, int]], loads: Counter[tuple[int, int]]
) -> dict[int, tuple[int, int]]:
    """A rank for each number: the largest first, each to the rank that has least; `loads` grow."""
    candidates, dealt = list(ranks), {}
    for number in sorted(sizes, key=lambda n: -sizes[n]):  # stable: equal sizes keep their order
        rank = min(candidates, key=lambda one: loads[one])
        loads[rank] += sizes[number]
        dealt[number] = rank
    return dealt
