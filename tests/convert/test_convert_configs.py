"""What a config.json says twice must agree."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_gmai.convert.huggingface import open_pretrained
from tests.convert.conftest import edit_config


def test_a_rope_written_twice_is_refused_where_the_two_differ(saved: Path) -> None:
    scaling = {"type": "dynamic", "factor": 2.0}

    def both(factor: float, theta: float) -> Callable[[dict[str, Any]], object]:
        parameters = {"rope_type": "dynamic", "factor": factor, "rope_theta": theta}
        change = {"rope_scaling": scaling, "rope_theta": 1e6, "rope_parameters": parameters}
        return lambda config: config["text_config"].update(change)

    edit_config(saved, both(2.0, 1e6))
    assert open_pretrained(saved).model.language.rope_scaling_factor == 2.0
    edit_config(saved, both(4.0, 1e6))
    with pytest.raises(ValueError, match=r"text_config.rope_theta, .* give two different scalings"):
        open_pretrained(saved)
    edit_config(saved, both(2.0, 1e4))
    with pytest.raises(ValueError, match=r"text_config.rope_theta, .* give two different bases"):
        open_pretrained(saved)


def test_two_image_tokens_in_one_config_are_refused(saved: Path) -> None:
    edit_config(saved, lambda config: config.update(image_token_index=7, image_token_id=9))
    with pytest.raises(ValueError, match="image_token_index is 7, image_token_id 9"):
        open_pretrained(saved)
