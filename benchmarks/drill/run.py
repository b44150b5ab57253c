"""One run of a drill: started again after each fault, as torchrun or a job that requeues would."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.drill.data import MAX_LENGTH
from benchmarks.drill.faults import Fault
from benchmarks.drill.hosts import ADDRESSES, TwoHosts
from megatron_gmai.runtime.processes import free_port

PROGRAM = Path(__file__).with_name("plant.py")
RANKS = 2
INTERVAL = 5  # steps between checkpoints
GLOBAL_BATCH = 4
TIMEOUT = {True: 0.4, False: 2.0}  # minutes; short where a rank is to hang
HANGS = ("stop", "cut")
LIMIT = 240.0  # seconds after which an attempt is not going to end by itself
LINGER = 60.0  # seconds that a host may take to notice that the other one has ended


@dataclass(frozen=True)
class Ended:
    """How an attempt ended."""

    faults: list[Fault]
    status: int | None  # 0: the run has come to its end; None: it had to be killed
    began: float
    ended: float
    log: Path


@dataclass
class Drill:
    """A run in `folder`, whose work directory may lie on a disk of its own."""

    name: str
    shards: Path
    folder: Path
    disk: Path
    steps: int
    seed: int
    flags: Sequence[str] = ()
    hosts: TwoHosts | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.work_dir = self.disk / self.name
        self.journal = self.folder / "journal.jsonl"
        self.draw = random.Random(self.seed)

    def run(self, attempts: Sequence[list[Fault]], most_unplanned: int = 3) -> list[Ended]:
        """All attempts, and so many more that nobody has planned."""
        done: list[Ended] = []
        for faults in [*attempts, *[[]] * most_unplanned]:
            ended = self._attempt(faults, len(done))
            done.append(ended)
            text = "; ".join(map(str, faults)) or "no fault"
            print(f"{self.name} {len(done)}/{len(attempts)}: {text}: status {ended.status} after "
                  f"{ended.ended - ended.began:.1f} s", flush=True)  # fmt: skip
            if ended.status == 0:
                break
            if faults and faults[-1].kind in ("truncate", "flip"):
                self._damage_newest(faults[-1].kind)
        return done

    def _attempt(self, faults: list[Fault], number: int) -> Ended:
        log = self.folder / f"attempt-{number:02d}.log"
        began = time.time()
        with log.open("w") as output:
            starts = self._starts(faults)
            processes = [
                subprocess.Popen(
                    command,
                    env=self._environment(faults, host),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                for host, command in enumerate(starts)
            ]
            try:
                status = _wait(processes)
            finally:  # of a drill that is interrupted, too
                _end(processes)
        if self.hosts is not None:
            self.hosts.join()
        (self.disk / "ballast").unlink(missing_ok=True)
        return Ended(faults, status, began, time.time(), log)

    def _starts(self, faults: list[Fault]) -> list[list[str]]:
        """The command of each host: two where they are to be cut from each other."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--master-port={free_port()}"]
        program = [str(PROGRAM), *self._run_flags(faults)]
        if not any(fault.kind == "cut" for fault in faults):
            return [[*torchrun, f"--nproc-per-node={RANKS}", *program]]
        assert self.hosts is not None
        world = [f"--nnodes={RANKS}", "--nproc-per-node=1", f"--master-addr={ADDRESSES[0]}"]
        return [
            ["ip", "netns", "exec", name, *torchrun, *world, f"--node-rank={rank}", *program]
            for rank, name in enumerate(self.hosts.names)
        ]

    def _run_flags(self, faults: list[Fault]) -> list[str]:
        kinds = {fault.kind for fault in faults}
        flags = ["--preset", "gmai-vl-tiny", "--shards", str(self.shards)]
        flags += ["--work-dir", str(self.work_dir), "--max-length", str(MAX_LENGTH)]
        flags += ["--global-batch-size", str(GLOBAL_BATCH), "--train-iters", str(self.steps)]
        flags += ["--log-interval", "1", "--checkpoint-interval", str(INTERVAL)]
        flags += ["--keep-last", "3", "--device", "cpu", "--max-rejected", "0.5", "--resume"]
        flags += ["--distributed-timeout-minutes", str(TIMEOUT[bool(kinds & set(HANGS))])]
        flags += ["--num-workers", "1"] * ("loader" in kinds)
        flags += ["--async-save"] * (self.draw.random() < 0.5)
        return [*flags, *self.flags]

    def _environment(self, faults: list[Fault], host: int) -> dict[str, str]:
        ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        kept = {name: value for name, value in os.environ.items() if name not in ours}
        link = self.hosts.links[host] if self.hosts else ""
        if any(fault.kind == "cut" for fault in faults):
            kept["GLOO_SOCKET_IFNAME"] = link
        plan = {
            "faults": [asdict(fault) for fault in faults],
            "journal": str(self.journal),
            "disk": str(self.disk),
            "ranks": RANKS,
            "interval": INTERVAL,
            "link": link,
        }
        return kept | {"OMP_NUM_THREADS": "1", "DRILL": json.dumps(plan)}

    def _damage_newest(self, kind: str) -> None:
        """Half of a file of the newest checkpoint goes, or one of its bits changes."""
        newest = max(self.checkpoints.glob("iter_*"), default=None)
        if newest is None:
            return
        file = self.draw.choice(sorted(path for path in newest.iterdir() if path.stat().st_size))
        data = bytearray(file.read_bytes())
        if kind == "truncate":
            del data[len(data) // 2 :]
        else:
            data[self.draw.randrange(len(data))] ^= 1 << self.draw.randrange(8)
        file.write_bytes(data)

    @property
    def checkpoints(self) -> Path:
        return self.work_dir / "checkpoints"

    def weights(self) -> dict[str, int]:
        """CRC-32 of the files that hold the tensors of the last checkpoint, optimizer included."""
        newest = self.checkpoints / f"iter_{self.steps:07d}" / "manifest.json"
        if not newest.is_file():
            return {}
        stored = json.loads(newest.read_text())["crc32"]
        return {name: value for name, value in stored.items() if name.endswith(".distcp")}

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Lines of a file in the work directory."""
        return read_lines(self.work_dir / name)

    def losses(self) -> dict[int, tuple[str, str]]:
        """Loss and gradient norm by step, as text: NaN equals NaN."""
        return {
            row["iteration"]: (repr(row["loss"]), repr(row["grad_norm"]))
            for row in self.rows("metrics.jsonl")
        }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON Lines; a file that is not there has none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """The worst exit status; None if one has not ended in time."""
    deadline, first_end = time.monotonic() + LIMIT, None
    while any(process.poll() is None for process in processes):
        if first_end is None and any(process.poll() is not None for process in processes):
            first_end = time.monotonic()
            deadline = min(deadline, first_end + LINGER)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.05)
    return max(abs(process.returncode) for process in processes)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill what still runs, whole sessions."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
