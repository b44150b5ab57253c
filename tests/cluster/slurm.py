"""A real Slurm on this machine: munge, the controller, and two nodes with one GPU each on paper.

Everything lies in one folder; only what was started here is ended, by its process.
"""

import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from megatron_gmai.runtime.processes import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
NODES = ("n1", "n2")
KILL_WAIT = 30  # seconds between SIGTERM and SIGKILL, Slurm's default


def installed() -> bool:
    """Whether Slurm's and munge's programs are here, and this user may start them."""
    return os.geteuid() == 0 and all(_program(name) for name in PROGRAMS)


def _program(name: str) -> str | None:
    """Daemons lie in /usr/sbin, which is not on every user's path."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")


def free_ports(count: int) -> list[int]:
    found: set[int] = set()
    while len(found) < count:
        found.add(free_port())
    return sorted(found)


@dataclass
class Slurm:
    """A cluster of two nodes in `folder`; `start` and `stop` it."""

    folder: Path
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """Of daemons and commands, and so of the jobs."""
        ours = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        return ours | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        """Raises RuntimeError with the daemons' logs if the nodes are not idle in time."""
        self._write_settings()
        self._start_munge()
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        deadline = time.monotonic() + 120
        while self._idle_nodes() != "2 idle":
            if time.monotonic() > deadline:
                logs = "\n".join(log.read_text() for log in sorted(self.folder.glob("*.log")))
                raise RuntimeError(f"Slurm's nodes are not ready:\n{logs[-5000:]}")
            time.sleep(0.2)

    def stop(self) -> None:
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *words: str, **variables: str) -> str:
        """Output of one of Slurm's commands. Raises RuntimeError with its message if it fails.

        `variables` are added to the environment, which a submitted job inherits.
        """
        environment = self.environment | variables
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr}")
        return done.stdout.strip()

    def _idle_nodes(self) -> str:
        """As `2 idle`; empty while the controller does not answer."""
        try:
            return self.run("sinfo", "--noheader", "--format=%D %t")
        except RuntimeError:
            return ""

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` tells, by name."""
        text = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        folder.mkdir(mode=0o700)
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o400)
        files = {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        flags = [f"--{flag}={folder / name}" for flag, name in files.items()]
        self._daemon("munged", "--foreground", "--force", *flags)
        while not (folder / "socket").exists():
            assert self.daemons[-1].poll() is None, (folder / "log").read_text()
            time.sleep(0.05)

    def _daemon(self, name: str, *flags: str) -> None:
        program = _program(name)
        assert program is not None
        with (self.folder / f"{name}-{len(self.daemons)}.log").open("wb") as log:
            self.daemons.append(
                subprocess.Popen(
                    [program, *flags],
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            )

    def _write_settings(self) -> None:
        host, (controller, *ports) = socket.gethostname().split(".")[0], free_ports(3)
        folder = self.folder
        settings = {
            "ClusterName": "test",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": controller,
            "AuthInfo": f"socket={folder}/munge/socket",
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "spool-%n",
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmdPidFile": folder / "slurmd-%n.pid",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SwitchType": "switch/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "GresTypes": "gpu",
            "JobRequeue": 1,
            "KillWait": KILL_WAIT,
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        lines += [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 Gres=gpu:1"
            for node, port in zip(NODES, ports, strict=True)
        ]
        lines.append(f"PartitionName=test Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE")
        (folder / "slurm.conf").write_text("\n".join([*lines, ""]))
        # The template asks for GPUs; Slurm counts any device file as one.
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
