"""Where a drill runs: a small disk of its own, and two hosts (network namespaces) with a link.

Both need root. Traffic stays between the two namespaces.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

ADDRESSES = ("10.213.7.1", "10.213.7.2")


def can_make() -> bool:
    """Whether this process may mount disks and make network namespaces."""
    if os.geteuid() != 0:
        return False
    name = f"drill-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    if made:
        _ip("netns", "del", name)
    return made


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of this size in memory, gone with the context."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "drill", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class TwoHosts:
    """Two network namespaces joined by one link; used as a context."""

    def __init__(self) -> None:
        number = os.getpid() % 100_000
        self.names = [f"drill{number}{letter}" for letter in "ab"]
        self.links = [f"dr{number}{letter}" for letter in "ab"]

    def __enter__(self) -> "TwoHosts":
        first, second = self.names
        for name in self.names:
            _ip("netns", "add", name)
        _ip("-n", first, "link", "add", self.links[0], "type", "veth",
            "peer", "name", self.links[1], "netns", second)  # fmt: skip
        for name, link, address in zip(self.names, self.links, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            _ip("-n", name, "link", "set", "dev", "lo", "up")
        self.join()
        return self

    def join(self) -> None:
        """Bring the link up (again)."""
        for name, link in zip(self.names, self.links, strict=True):
            _ip("-n", name, "link", "set", "dev", link, "up")

    def __exit__(self, *error: object) -> None:
        for name in self.names:
            _ip("netns", "del", name)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
