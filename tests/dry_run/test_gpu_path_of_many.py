"""The code that GPUs run, without one: layouts of four and eight ranks."""

import pytest

from tests.dry_run.gpu_path import check_gpu_path
from tests.parallel.cases import Case
from tests.parallel.test_parity import CASES

MANY = [
    pytest.param(size, case, id=case.name) for size in CASES if size > 2 for case in CASES[size]
]


@pytest.mark.parametrize(("size", "case"), MANY)
def test_the_gpu_path_neither_waits_nor_computes_in_fp32(size: int, case: Case) -> None:
    check_gpu_path(size, case)
