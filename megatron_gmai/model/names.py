"""Canonical names: what a parameter is called in the whole model, whichever stage holds it."""

import re

from megatron_gmai.model.gmai_vl import GMAIVL

_LAYER = re.compile(r"^(language_model\.decoder\.layers\.)(\d+)(\..*)$")


def canonical_name(model: GMAIVL, name: str) -> str:
    """Name with the layer's number in the whole model instead of that in this stage."""
    match = _LAYER.match(name)
    if match is None:
        return name
    prefix, index, rest = match.groups()
    layer = model.language_model.decoder.layers[int(index)]
    return f"{prefix}{layer.layer_number - 1}{rest}"  # Megatron counts layers from 1
