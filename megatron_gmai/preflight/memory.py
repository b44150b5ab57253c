"""Whether what the planner expects a rank to take fits into its GPU."""

from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_gmai.config import Config
from megatron_gmai.data.shards.index import MANIFEST_FILE
from megatron_gmai.data.shards.mean_load import images_per_pack
from megatron_gmai.layout import Layout
from megatron_gmai.planner.cost import load_of, typical_images, with_vocabulary
from megatron_gmai.planner.memory import stage_memory
from megatron_gmai.preflight.check import FAIL, PASS, WARN, Check
from megatron_gmai.runtime.device import Device

NAME = "plan fits memory"
PLAN = "tools/plan.py finds a layout that fits; more --tp or --pp, or recomputation, take less"
USABLE = 0.93  # of a GPU: the rest goes to the driver, NCCL and fragmentation


def fits_memory(config: Config, device: Device, rank: int, world_size: int) -> Iterator[Check]:
    """The planner's peak for this rank's pipeline stage beside the memory of its GPU."""
    config = with_vocabulary(config)
    layout = Layout.of(config.parallel, world_size)
    stage = rank // (world_size // layout.pipeline)
    needed = stage_memory(config, layout, stage, load_of(config, _images(config))).peak
    if not device.is_cuda:
        detail = f"{needed / 2**30:.2f} GiB a rank on GPUs in bf16, by the planner; there is none"
        yield Check(NAME, PASS, detail)
        return
    _, total = torch.cuda.mem_get_info(device.torch_device)
    yield judge(needed, total)


def judge(needed: float, total: float) -> Check:
    """Bytes that the planner expects beside those of a GPU."""
    status = FAIL if needed > total else WARN if needed > USABLE * total else PASS
    detail = f"{needed / 2**30:.1f} GiB expected, the GPU has {total / 2**30:.1f} GiB"
    return Check(NAME, status, detail, PLAN)


def _images(config: Config) -> float:
    """Mean of a pack: of the run's shards, where there are some."""
    folder = config.data.shards or config.data.dset_cache_dir
    if folder is None or not (Path(folder) / MANIFEST_FILE).is_file():
        return typical_images(config)
    tokens = config.model.vision.tokens_per_image
    return images_per_pack(Path(folder), tokens, config.data.max_length)
