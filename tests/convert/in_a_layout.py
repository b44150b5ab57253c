"""What each rank of a layout does to compare what it holds with a folder. A module of its own: each
rank imports it, and transformers takes seconds."""

from pathlib import Path

import torch

from megatron_gmai.config import ParallelConfig
from megatron_gmai.convert.compare import compare
from megatron_gmai.convert.output import not_counted
from megatron_gmai.verification.ranks import HeldWeights, training_world
from tools.convert_checkpoint import main, open_side


def verify_in_a_layout(checkpoints: Path, folder: Path) -> None:
    """All four ranks exit with what was found."""
    assert main(["verify", str(checkpoints), str(folder), "--tp", "2", "--pp", "2"]) == 0
    # torchrun ends the first rank when another has left with a status.
    assert (folder / "card.json").is_file()


def change_one_value_on_one_rank(folder: Path) -> None:
    """Both ranks find it."""
    side, layout = open_side(folder), ParallelConfig(tensor_model_parallel_size=2)
    with training_world(side.model, layout) as ranks, torch.no_grad():
        held = ranks.hold(side)
        assert max(group.largest_difference for group in compare(held, side, not_counted)) == 0
        if ranks.world.rank == 1:
            assert isinstance(held.weights, HeldWeights)
            held.weights.model.language_model.decoder.layers[0].mlp.linear_fc1.weight[-1, 0] += 0.25
        found = {g.name: g.largest_difference for g in compare(held, side, not_counted)}
        assert found.pop("language_model.decoder.layers.*.mlp.linear_fc1.weight") == 0.25
        assert set(found.values()) == {0}
