"""Whether the run would accept its own flags and the files that they name."""

from pathlib import Path

from megatron_gmai.config import Config
from megatron_gmai.data.loading.dataset import uses_of
from megatron_gmai.data.shards.index import MANIFEST_FILE
from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.preflight.check import FAIL, PASS, Check
from megatron_gmai.validation import validate


def settings(config: Config, world_size: int) -> Check:
    """What the run would refuse before it builds, as this process sees the files: flags, and a list
    file that names other data sets than the shards beside it."""
    data = config.data
    folder = data.shards or (data.dset_cache_dir if data.dset_from_cache else None)
    try:
        validate(config, world_size)
        if folder is not None and (Path(folder) / MANIFEST_FILE).is_file():
            uses_of(Shards(folder), data)
    except ValueError as error:
        found = " ".join(line.strip() for line in str(error).splitlines())
        return Check("settings", FAIL, found, "the run refuses them: correct the flags")
    return Check("settings", PASS, "the run accepts its flags, start weights and tokenizer")
