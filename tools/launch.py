"""Starts a phase of training: prints or submits the Slurm job, or runs it on this machine.

    python tools/launch.py --recipe phase1 --work-dir runs/phase1 --nodes 4 --gpus-per-node 8 \\
        --tp 2 --llava START --dset-cache-dir SHARDS            print the line that submits it
    python tools/launch.py ... --submit                         submit it
    python tools/launch.py ... --submit --after 4711            when that job has finished
    python tools/launch.py ... --here                           one machine, without Slurm

Flags that are not this program's go to pretrain_gmai_vl.py. They are checked here, before a job
waits in a queue. Slurm's own variables choose the rest: SBATCH_ACCOUNT, SBATCH_PARTITION.
"""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from megatron_gmai.cli import parse
from megatron_gmai.layout import Layout
from megatron_gmai.validation import validate, validate_settings

ROOT = Path(__file__).resolve().parents[1]
RECIPES = Path("examples/recipes")
TEMPLATE = "examples/slurm/train.sbatch"
ENVIRONMENT = "examples/slurm/environment.sh"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after a mistake that the message explains."""
    flags, rest = build_parser().parse_known_args(argv)
    os.chdir(ROOT)  # recipes and template name files relative to it
    try:
        training = training_flags(flags, rest)
        print(check(flags, training), file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2
    if flags.here:
        command = here(flags, training)
        os.execvp(command[0], command)
    command = sbatch(flags, training)
    if not flags.submit:
        print(shlex.join(command))
        return 0
    return _submit(command)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("--recipe", required=True, help="phase1, phase2, phase3, or a file")
    parser.add_argument("--work-dir", required=True, help="results, on storage all nodes see")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8, help="processes on each node")
    parser.add_argument("--tp", type=int, default=1, help="ranks that share each layer")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages")
    parser.add_argument("--time", help="limit of one attempt, as Slurm writes it: 1-00:00:00")
    parser.add_argument("--after", metavar="JOB", help="start when this job has finished")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="=OPTION", help="any option of sbatch"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--submit", action="store_true", help="submit instead of printing")
    how.add_argument("--here", action="store_true", help="run on this machine, without Slurm")
    return parser


def training_flags(flags: argparse.Namespace, rest: list[str]) -> list[str]:
    """Flags of pretrain_gmai_vl.py, without --work-dir. Raises ValueError for an unknown recipe."""
    named = RECIPES / f"{flags.recipe}.args"
    recipe = named if named.is_file() else Path(flags.recipe)
    if not recipe.is_file():
        names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.args")))
        raise ValueError(f"--recipe {flags.recipe}: no such recipe or file; there are {names}")
    layout = ["--tensor-model-parallel-size", str(flags.tp)]
    layout += ["--pipeline-model-parallel-size", str(flags.pp)]
    # Tensor parallelism without it keeps whole activations between the layers on every rank.
    layout += ["--sequence-parallel"] if flags.tp > 1 else []
    return [f"@{recipe}", *layout, *rest]


def check(flags: argparse.Namespace, training: list[str]) -> str:
    """What will run, in one line. Raises ValueError for flags that cannot work.

    Behind `--after` paths are not looked at: the job before makes what this one starts from.
    """
    for flag, count in (("--nodes", flags.nodes), ("--gpus-per-node", flags.gpus_per_node)):
        if count < 1:
            raise ValueError(f"{flag} {count}: out of range; give a number at least 1")
    if flags.here and flags.after is not None:
        raise ValueError(f"--after {flags.after}: only Slurm waits for a job; not --here")
    config = parse([*training, "--work-dir", flags.work_dir]).config
    world = flags.nodes * flags.gpus_per_node
    judge = validate if flags.after is None else validate_settings
    judge(config, world)
    layout = Layout.of(config.parallel, world)
    micro = layout.micro_batches(config.train)
    return (
        f"{flags.nodes} node(s) x {flags.gpus_per_node} processes: TP {layout.tensor} x "
        f"PP {layout.pipeline} x DP {layout.data}, {micro} micro-batch(es) of "
        f"{config.train.micro_batch_size} packs a step"
    )


def sbatch(flags: argparse.Namespace, training: list[str]) -> list[str]:
    """The command that submits the job: the template, with this run's settings beside it."""
    options = [f"--nodes={flags.nodes}", f"--gpus-per-node={flags.gpus_per_node}"]
    options += [f"--job-name={Path(flags.work_dir).name}"]
    options += [f"--time={flags.time}"] if flags.time else []
    options += [f"--dependency=afterok:{flags.after}"] if flags.after else []
    return ["sbatch", *options, *flags.sbatch, TEMPLATE, flags.work_dir, *training]


def here(flags: argparse.Namespace, training: list[str]) -> list[str]:
    """The command that runs the same training on this machine, in the template's environment."""
    shell = ["bash", "-c", f'source {ENVIRONMENT} && exec "$@"', "bash"]
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    agent += [f"--nproc-per-node={flags.gpus_per_node}"]
    program = ["pretrain_gmai_vl.py", "--device", "cuda", "--resume", *training]
    return [*shell, *agent, *program, "--work-dir", flags.work_dir]


def _submit(command: list[str]) -> int:
    try:
        return subprocess.run(command, check=False).returncode
    except OSError as error:
        print(f"launch: cannot start sbatch: {error}; --here runs without Slurm", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
