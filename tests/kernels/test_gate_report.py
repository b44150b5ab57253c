"""The report holds what gate and counter say, whatever kernels it is given."""

import pytest

from gmai_kernels.testing.gate import SM_90
from gmai_kernels.testing.report import (
    Case,
    _cross_entropy,
    _forward,
    _linear_cross_entropy,
    linear_case,
    loss_case,
    norm_case,
    own_cases,
    report,
)


def test_a_norm_and_a_loss():
    norm, loss = report(
        [norm_case("norm", "ours", 512, 8, _forward), loss_case("ours", 32001, _cross_entropy)],
        targets=[SM_90],
    )
    assert (norm.op, norm.library, norm.unit) == ("norm, hidden 512", "ours", "B/element")
    assert norm.traffic == 6.0
    assert (norm.spills, norm.width, norm.failures) == ({"sm_90": 0}, {"sm_90": 128}, {})
    assert 16 <= norm.registers["sm_90"] <= 40
    assert loss.traffic == pytest.approx(6.0, abs=0.01)
    assert loss.width == {"sm_90": 128}


def test_linear_cross_entropy_is_counted_in_gigabytes_at_full_size():
    (row,) = report([linear_case("ours", _linear_cross_entropy)], targets=[SM_90])
    assert row.unit == "GB" and row.registers == {}
    assert 9.0 < row.traffic <= 12.0


def test_a_kernel_that_does_not_compile_is_reported():
    def broken():
        raise NotImplementedError("for this chip")

    (row,) = report(
        [Case("op", "rival", lambda: broken, lambda: lambda: None, 1.0)], targets=[SM_90]
    )
    assert row.failures == {"sm_90": "NotImplementedError: for this chip"}


def test_every_op_has_its_cases():
    ops = {case.op.split(",")[0] for case in own_cases()}
    assert ops == {
        "RMSNorm forward",
        "RMSNorm backward",
        "RMSNorm + residual forward",
        "RMSNorm + residual backward",
        "cross-entropy forward + backward",
        "linear + cross-entropy",
    }
