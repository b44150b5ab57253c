"""Packed samples do not see each other, and padding is nothing."""

import dataclasses

import pytest
import torch
from torch import Tensor

from megatron_gmai.data.loading.batch import MicroBatch
from megatron_gmai.model.gmai_vl import GMAIVL
from tests.parallel.batches import BOUNDS, CONFIG, LENGTH, join, losses_of, make_pack
from tests.parallel.cases import Processes


@pytest.fixture
def model(alone: Processes) -> GMAIVL:
    return alone.model(CONFIG)


def gradients_of(model: GMAIVL, batch: MicroBatch) -> dict[str, Tensor]:
    model.zero_grad()
    losses_of(model, batch).sum().backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for n, p in model.named_parameters()}  # fmt: skip


def alone_in_a_pack(pack: MicroBatch, start: int, stop: int) -> MicroBatch:
    """The sample at start:stop without its neighbours and without padding."""
    inside = (pack.image_starts >= start) & (pack.image_starts < stop)
    return dataclasses.replace(
        pack,
        tokens=pack.tokens[start:stop],
        labels=pack.labels[start:stop],
        position_ids=pack.position_ids[start:stop],
        cu_seqlens=torch.tensor([0, stop - start], dtype=torch.int32),
        max_seqlen=stop - start,
        pixel_values=pack.pixel_values[inside],
        image_starts=pack.image_starts[inside] - start,
    )


SAMPLES = list(zip(BOUNDS[:-2], BOUNDS[1:-1], strict=True))


def test_a_packed_sample_has_the_losses_that_it_has_alone(model: GMAIVL) -> None:
    pack = make_pack(seed=3, images=3)
    packed = losses_of(model, pack)
    for start, stop in SAMPLES:
        losses = losses_of(model, alone_in_a_pack(pack, start, stop))
        assert losses.std() > 0.1
        torch.testing.assert_close(packed[start:stop], losses, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_pack_is_the_sum_over_its_samples(model: GMAIVL) -> None:
    pack = make_pack(seed=3, images=3)
    packed = gradients_of(model, pack)
    single = [gradients_of(model, alone_in_a_pack(pack, *sample)) for sample in SAMPLES]
    for name, gradient in packed.items():
        expected = sum(gradients[name] for gradients in single)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_changing_one_sample_changes_nothing_of_the_other(model: GMAIVL) -> None:
    pack = make_pack(seed=3, images=3)
    before = losses_of(model, pack)
    changed = dataclasses.replace(pack, tokens=pack.tokens.clone())
    changed.tokens[0] += 1  # in the first sample, before its image
    after = losses_of(model, changed)
    first, second = slice(*SAMPLES[0]), slice(*SAMPLES[1])
    assert not torch.equal(after[first], before[first])
    assert torch.equal(after[second], before[second])


def test_padding_neither_counts_nor_matters(model: GMAIVL) -> None:
    pack = make_pack(seed=3, images=1)
    tail = slice(BOUNDS[-2], LENGTH)
    before, gradients = losses_of(model, pack), gradients_of(model, pack)
    changed = dataclasses.replace(pack, tokens=pack.tokens.clone())
    changed.tokens[tail] = 7
    assert torch.equal(before[tail], torch.zeros(LENGTH - BOUNDS[-2]))
    assert torch.equal(losses_of(model, changed), before)
    for name, gradient in gradients_of(model, changed).items():
        assert torch.equal(gradient, gradients[name]), name


def test_packs_joined_in_a_micro_batch_stay_apart(model: GMAIVL) -> None:
    packs = [make_pack(seed=5, images=2), make_pack(seed=6, images=0), make_pack(seed=7, images=3)]
    together = losses_of(model, join(packs))
    apart = torch.cat([losses_of(model, pack) for pack in packs])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)
