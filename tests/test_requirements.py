"""The lists of packages agree with each other and with setup.py."""

import ast
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def listed(name: str) -> dict[str, Requirement]:
    """The packages of requirements/NAME.txt."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name: requirement for requirement in found}


def pinned(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "=="
    return specifier.version


def of_setup(keyword: str) -> list[Requirement]:
    """What a keyword of setup.py lists, read without running it."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    (value,) = (k.value for k in ast.walk(tree) if isinstance(k, ast.keyword) and k.arg == keyword)
    lists = value.values if isinstance(value, ast.Dict) else [value]
    return [Requirement(word) for part in lists for word in ast.literal_eval(part)]


def lowest(requirement: Requirement) -> str:
    (floor,) = (s.version for s in requirement.specifier if s.operator == ">=")
    return floor


def test_the_lowest_versions_are_the_tested_ones() -> None:
    tested = listed("lowest")
    for requirement in of_setup("install_requires"):
        if requirement.name != "triton":  # torch brings the one that belongs to it
            version = pinned(tested[requirement.name])
            assert f"{version}.".startswith(f"{lowest(requirement)}."), requirement.name


def test_the_pinned_versions_are_allowed() -> None:
    for requirement in of_setup("install_requires"):
        assert pinned(listed("cpu")[requirement.name]) in requirement.specifier
    allowed = {requirement.name: requirement for requirement in of_setup("extras_require")}
    for name in ("transformer-engine", "flash-attn"):
        assert pinned(listed("gpu")[name]) in allowed[name].specifier


def test_the_newest_list_names_every_package_and_pins_none() -> None:
    newest = listed("latest")
    assert {r.name for r in of_setup("install_requires")} <= newest.keys()
    assert not any(requirement.specifier for requirement in newest.values())
