"""The report holds what gate and counter say, whatever kernels it is given."""

import pytest

from gmai_kernels.testing.gate import SM_90
from gmai_kernels.testing.report import Case, own_cases, report


def own(op: str) -> Case:
    return next(case for case in own_cases() if case.op == op)


def test_a_norm_and_a_loss():
    cases = [
        own("RMSNorm forward, hidden 4096"),
        own("cross-entropy forward + backward, vocabulary 92553"),
    ]
    norm, loss = report(cases, targets=[SM_90])
    assert (norm.library, norm.unit) == ("gmai_kernels", "B/element")
    assert norm.traffic == pytest.approx(6.0, abs=0.01)
    assert (norm.spills, norm.width, norm.failures) == ({"sm_90": 0}, {"sm_90": 128}, {})
    assert 16 <= norm.registers["sm_90"] <= 32
    assert loss.traffic == pytest.approx(6.0, abs=0.01)
    assert loss.width == {"sm_90": 128}


def test_linear_cross_entropy_is_counted_in_gigabytes_at_full_size():
    (row,) = report([own("linear + cross-entropy, M4096 H2048 V92544")], targets=[SM_90])
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
