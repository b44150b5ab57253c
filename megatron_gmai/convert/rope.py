"""Rotary position settings of a text config: base and dynamic-NTK factor.

Three spellings are about: `rope_theta` with `rope_scaling` (transformers 4, InternLM2), and
`rope_parameters`, which holds both (transformers 5). Dynamic NTK equals plain RoPE up to
`max_position_embeddings`, where training stops; its factor is carried to exports, which may go on.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_DEFAULT_THETA = 10000.0


@dataclass(frozen=True)
class Rope:
    theta: float
    factor: float  # of dynamic NTK; 1.0 is plain RoPE


def read_rope(text: Mapping[str, Any]) -> tuple[Rope, list[str]]:
    """The settings of a text config as it stands in the file, and what is wrong with them."""
    problems: list[str] = []
    factors, thetas = [], []
    for key in ("rope_parameters", "rope_scaling"):
        section = text.get(key)
        if not section:
            continue
        if not isinstance(section, dict):
            problems.append(f"{key} is {section!r}, expected an object")
            continue
        if "rope_theta" in section:
            thetas.append(section["rope_theta"])
        factor, problem = _factor(section)
        problems += [f"{key} {problem}"] * bool(problem)
        factors.append(factor)
    if "rope_theta" in text:
        thetas.append(text["rope_theta"])
    problems += [
        f"rope_theta is {theta!r}, expected a number above 0"
        for theta in thetas
        if not _is_positive(theta)
    ]
    for name, values in (("bases", thetas), ("scalings", factors)):
        if len(set(map(str, map(_plain, values)))) > 1:
            problems.append(
                f"rope_theta, rope_scaling and rope_parameters give two different {name}"
            )
    if problems:
        return Rope(_DEFAULT_THETA, 1.0), problems
    theta = float(thetas[0]) if thetas else _DEFAULT_THETA
    return Rope(theta, factors[0] if factors else 1.0), []


def hf_rope(theta: float, factor: float) -> dict[str, Any]:
    """The old spelling: transformers 5 still reads it, transformers 4 reads nothing else."""
    scaling = {"type": "dynamic", "rope_type": "dynamic", "factor": factor}
    return {"rope_theta": theta, "rope_scaling": scaling if factor != 1.0 else None}


def _factor(section: Mapping[str, Any]) -> tuple[float, str]:
    """Dynamic-NTK factor of one section, and what is wrong with it."""
    kind = section.get("rope_type", section.get("type", "default"))
    if kind == "default":
        return 1.0, ""
    if kind != "dynamic":
        return 1.0, f"asks for {kind!r} RoPE, only plain and dynamic work"
    factor: Any = section.get("factor")
    if not _is_positive(factor) or factor < 1:
        return 1.0, f"has the factor {factor!r}, expected a number of 1 or more"
    return float(factor), ""


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


def _plain(value: Any) -> Any:
    return float(value) if _is_positive(value) else value
