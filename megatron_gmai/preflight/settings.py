"""Whether the run would accept its own flags and the files that they name."""

from megatron_gmai.config import Config
from megatron_gmai.preflight.check import FAIL, PASS, Check
from megatron_gmai.validation import validate


def settings(config: Config, world_size: int) -> Check:
    """All that the run would refuse before it builds, as this process sees the files."""
    try:
        validate(config, world_size)
    except ValueError as error:
        found = " ".join(line.strip() for line in str(error).splitlines())
        return Check("settings", FAIL, found, "the run refuses them: correct the flags")
    return Check("settings", PASS, "the run accepts its flags, start weights and tokenizer")
