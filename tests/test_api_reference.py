"""The API reference has every public name, and no other."""

from __future__ import annotations

import importlib
import pathlib
import re

PAGE = pathlib.Path(__file__).parents[1] / "docs/reference/api.md"
PUBLIC = ("jattn", "jattn.flax", "jattn.explain")


def documented() -> set[str]:
    """The names that Sphinx is told to describe, without their modules."""
    return set(re.findall(r"^\.\. auto\w+:: [\w.]*\.(\w+)", PAGE.read_text(), re.MULTILINE))


def public() -> set[str]:
    modules = [importlib.import_module(name) for name in PUBLIC]
    return {name for module in modules for name in module.__all__}


def test_every_public_name_is_in_the_api_reference() -> None:
    assert public() - documented() == set()


def test_the_api_reference_has_no_name_that_is_gone() -> None:
    assert documented() - public() == set()
