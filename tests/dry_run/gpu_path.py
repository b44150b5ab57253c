"""What must hold of the code that GPUs run, in every layout of the matrix, in bf16."""

from megatron_gmai.dry_run.report import typical_ranks
from megatron_gmai.dry_run.run import RankReport, dry_run
from tests.parallel.cases import Case

IMAGES = 2
# Where the host may wait for the device: once a step, for numbers that decide something.
EXPECTED = {
    "megatron_gmai/training/step.py",  # what the step's line shows
    "megatron/core/distributed/finalize_model_grads.py",  # whether there are tokens
    "megatron/core/optimizer/clip_grads.py",  # the gradient norm
    "megatron/core/utils.py",  # the norm of each parameter, without Transformer Engine and Apex
}


def unexpected(report: RankReport) -> list[str]:
    return [f"{w.file}:{w.line}" for w, _ in report.waits if w.file not in EXPECTED]


def check_gpu_path(size: int, case: Case) -> None:
    """A step of typical ranks neither waits for the device nor computes in fp32."""
    for rank in typical_ranks(case.config, size):
        report = dry_run(case.config, rank, size, IMAGES)
        assert report.single_precision == []
        assert unexpected(report) == []
        assert report.peak_bytes > report.static_bytes > 0
