"""Runs the quick start's steps: each once, again only when what it was made from has changed."""

import hashlib
import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


class StepFailed(Exception):
    """A step did not finish; the message is for the user."""


@dataclass(frozen=True)
class Done:
    """A finished step: what it was made from, and how long that took."""

    fingerprint: str
    seconds: float


class Steps:
    """The finished steps of a run, one small stamp file each in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(
        self,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[Path],
        action: Callable[[], None],
        continues: bool = False,
    ) -> Done:
        """Do a step unless its stamp matches and its outputs exist.

        Args:
            name: of the stamp and in messages.
            inputs: all that decides the result, above all the fingerprints of earlier steps.
            outputs: files or folders that the step makes; removed before it runs.
            action: does the work; raises StepFailed or ValueError.
            continues: the action goes on with the outputs of one that was interrupted, so they are
                kept if that had the same inputs.
        """
        stamp = self.folder / f"{name}.json"
        fingerprint = hashlib.sha256(json.dumps([name, *inputs]).encode()).hexdigest()[:16]
        done = _read(stamp)
        if done and done.fingerprint == fingerprint and all(path.exists() for path in outputs):
            print(f"== {name}: complete, taken from the earlier run", flush=True)
            return done
        begun = _read(stamp.with_suffix(".begun"))
        goes_on = continues and begun is not None and begun.fingerprint == fingerprint
        print(f"== {name}" + (", continued" if goes_on else ""), flush=True)
        stamp.unlink(missing_ok=True)
        for path in () if goes_on else outputs:
            _remove(path)
        self._write(stamp.with_suffix(".begun"), Done(fingerprint, 0.0))
        start = time.monotonic()
        action()
        _check_made(name, outputs)
        done = Done(fingerprint, round(time.monotonic() - start, 1))
        self._write(stamp, done)
        stamp.with_suffix(".begun").unlink()
        return done

    def _write(self, stamp: Path, done: Done) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        stamp.write_text(json.dumps(vars(done)) + "\n")


def command(words: Sequence[str], folder: Path) -> None:
    """Run a program with its output passed through. Raises StepFailed with what to look at."""
    try:
        status = subprocess.run(words, cwd=folder, check=False).returncode
    except OSError as error:
        raise StepFailed(f"cannot start {words[0]}: {error}") from error
    if status != 0:
        raise StepFailed(
            f"exit status {status}; the reason stands above. The command, run in {folder}:\n"
            f"  {shlex.join(words)}"
        )


def _read(stamp: Path) -> Done | None:
    try:
        return Done(**json.loads(stamp.read_text()))
    except (OSError, ValueError, TypeError):
        return None  # missing, or cut off by a kill: the step is done again


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _check_made(name: str, outputs: Sequence[Path]) -> None:
    missing = [str(path) for path in outputs if not path.exists()]
    if missing:
        raise StepFailed(f"{name} ended without an error but did not make {', '.join(missing)}")
