"""One optimizer step against plain autograd: the mean over all supervised tokens, its gradient."""

import pytest
import torch
from torch import Tensor

from megatron_gmai.training.weights import named_weights
from tests.parallel.batches import CONFIG, LENGTH, PACKS, global_batch, losses_of, make_pack
from tests.parallel.cases import PHASES, Case, Processes, Trainer


def plain_loss(trainer: Trainer, step: int) -> Tensor:
    """The mean over the supervised tokens of a whole global batch."""
    total, count = torch.zeros(()), 0
    for pack in global_batch(step):
        total = total + losses_of(trainer.chunks[0], pack).sum()
        count += int((pack.labels != -100).sum())
    return total / count


@pytest.mark.parametrize("phase", PHASES)
def test_loss_and_norm_are_those_of_the_mean_over_supervised_tokens(
    phase: int, alone: Processes
) -> None:
    reference = Trainer(Case("reference", phase=phase), alone)
    trained = [p for p in reference.chunks[0].parameters() if p.requires_grad]
    loss = plain_loss(reference, step=0)
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]).norm()
    result = Trainer(Case("run", phase=phase), alone).step(0)
    assert result.loss == pytest.approx(float(loss), rel=1e-6)
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert result.updated


def test_what_a_step_counts(alone: Processes) -> None:
    result, packs = Trainer(Case("run"), alone).step(0), global_batch(0)
    assert result.supervised_tokens == sum(int((p.labels != -100).sum()) for p in packs)
    assert result.tokens == sum(pack.num_tokens for pack in packs)
    assert result.positions == PACKS * LENGTH
    assert (result.images, result.samples) == (6, 2 * PACKS)


def test_biases_and_norms_are_not_decayed(alone: Processes) -> None:
    trainer = Trainer(Case("run"), alone)  # --wd 0.1
    decays = {
        weight.name: group["weight_decay"]
        for weight, parameter in named_weights(trainer.chunks)
        for group in trainer.optimizer.param_groups
        if any(parameter is own for own in group["params"])
    }
    assert decays["language_model.decoder.final_layernorm.weight"] == 0
    assert decays["projector.linear_fc1.bias"] == 0
    assert decays["projector.linear_fc1.weight"] == 0.1


def test_a_step_clips_the_gradient_but_tells_its_norm(alone: Processes) -> None:
    """AdamW's first step hardly depends on the scale, so its second moment is looked at."""
    free, clipped = Trainer(Case("free"), alone), Trainer(Case("clipped"), alone)
    clipped.optimizer.config.clip_grad = 1e-3
    free.optimizer.config.clip_grad = 0.0
    norms = [trainer.step(0).grad_norm for trainer in (free, clipped)]
    assert norms[1] > 1e-3
    moments = [
        sum(
            float(state["exp_avg"].square().sum())
            for inner in trainer.optimizer.chained_optimizers
            for state in inner.optimizer.state.values()
        )
        ** 0.5
        for trainer in (free, clipped)
    ]
    assert moments[1] == pytest.approx(0.1 * 1e-3, rel=1e-3)  # 1 - beta1 of the clipped norm
    assert moments[0] == pytest.approx(0.1 * norms[1], rel=1e-3)


@pytest.mark.parametrize("multiple", [1, 8])
def test_a_padding_tail_changes_neither_losses_nor_gradients(
    alone: Processes, multiple: int
) -> None:
    model, whole = alone.model(CONFIG), make_pack(seed=1, images=2)
    cut = whole.without_tail(multiple)
    assert len(cut.tokens) == -(-whole.num_tokens // multiple) * multiple < len(whole.tokens)
    gradients, losses = [], []
    for batch in (whole, cut):
        model.zero_grad()
        losses.append(losses_of(model, batch))
        losses[-1].sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(losses[1], losses[0][: len(cut.tokens)], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)
