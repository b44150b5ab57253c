"""The entry script with a fault planted: a program that changes modules before it starts."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Steps that take so long that who waits for one of them comes before the end of the run.
SLOW = """
import time
from megatron_gmai.training.step import TrainStep
take = TrainStep.__call__
def slowly(*arguments):
    time.sleep(0.5)
    return take(*arguments)
TrainStep.__call__ = slowly
"""


def faulty(program: Path, fault: str) -> Path:
    """Write a program that runs `fault`, Python code that knows its `rank`, in each process."""
    program.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from megatron_gmai.runtime.quiet import quiet_libraries\n"
        "from megatron_gmai.training.preemption import postpone_stop_signals\n"
        "from megatron_gmai.training.resilience import run_guarded\n"
        "rank = int(os.environ.get('RANK', '0'))\n"
        "def main():\n"
        "    import pretrain_gmai_vl\n"
        "    pretrain_gmai_vl.main()\n"
        "if __name__ == '__main__':\n"
        "    postpone_stop_signals()\n"
        "    quiet_libraries()\n" + "".join(f"    {line}\n" for line in fault.splitlines()) +
        "    run_guarded(main)\n"
    )  # fmt: skip
    return program
