"""`--profile`: torch profiler's traces of some steps on some ranks, for Perfetto or TensorBoard."""

from pathlib import Path
from typing import Any

from torch.profiler import profile

from megatron_gmai.config import RunConfig

FOLDER = "profile"


class Profiler:
    """Traces steps `--profile-step-start` up to `--profile-step-end` (without it) of this rank."""

    def __init__(self, settings: RunConfig, rank: int) -> None:
        self.first, self.end = settings.profile_step_start, settings.profile_step_end
        self.rank, self.folder = rank, Path(settings.work_dir) / FOLDER
        self.is_chosen = settings.profile and str(rank) in settings.profile_ranks.split(",")
        self.running: Any = None

    def begin(self, step: int) -> None:
        """Call before a step."""
        if self.is_chosen and step == self.first:
            self.running = profile(record_shapes=True)
            self.running.start()
        elif step == self.end:
            self.finish()

    def finish(self) -> None:
        """Write what there is; also of a run that ends before its last traced step."""
        if self.running is None:
            return
        running, self.running = self.running, None
        running.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"rank{self.rank}.steps{self.first}-{self.end - 1}.json.gz"
        running.export_chrome_trace(str(file))
        print(f"[rank {self.rank}] trace written: {file}", flush=True)
