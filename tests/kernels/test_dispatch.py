"""One op, several implementations: the device picks, and one override wins over it."""

import pytest
import torch

from gmai_kernels import rms_norm, use_implementation
from gmai_kernels.dispatch import chosen_implementation
from gmai_kernels.vocabulary import to_device

X = torch.ones(2, 64)


def test_a_cpu_tensor_runs_on_torch():
    assert chosen_implementation(X) == "torch"


def test_the_override_holds_for_its_block_and_nests():
    with use_implementation("reference"):
        with use_implementation("auto"):
            assert chosen_implementation(X) == "torch"
        assert chosen_implementation(X) == "reference"
    assert chosen_implementation(X) == "torch"


def test_the_override_ends_with_an_error():
    with pytest.raises(ValueError, match="^x: shape"), use_implementation("reference"):
        rms_norm(X[:0], X[0], 1e-5)
    assert chosen_implementation(X) == "torch"


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="'cuda' is unknown.*auto, triton, torch, reference"):
        use_implementation("cuda").__enter__()


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with use_implementation("triton"), pytest.raises(ValueError, match="needs the triton package"):
        rms_norm(X, X[0], 1e-5)


def test_the_backward_pass_keeps_the_implementation_of_the_forward_pass():
    x = X.clone().requires_grad_()
    y = rms_norm(x, X[0], 1e-5)
    with use_implementation("reference"):
        y.sum().backward()
    assert y.grad_fn.name() == "_RMSNormBackward"
    assert x.grad is not None and x.grad.isfinite().all()


def test_what_the_host_makes_is_copied_from_page_locked_memory(monkeypatch):
    class PageLocked:
        def to(self, device, non_blocking):
            return device, non_blocking

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: PageLocked())
    gpu = torch.device("cuda", 1)
    assert to_device(X, gpu) == (gpu, True)
    assert to_device(X, X.device) is X
