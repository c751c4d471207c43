"""In 64-bit mode every family of kernels compiles for an absent H200, and spills no more.

`tests/programs.py` says what it needs.
"""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from tests.hopper import test_compile as hopper
from tests.portable import test_compile as portable
from tests.programs import VERSIONS, printed

pytestmark = pytest.mark.compile


def known_spills(call: dict[str, Any]) -> int:
    if call["algorithm"] == "hopper":
        return hopper.known_spills(call)
    place = (call["device"], call["algorithm"], call["direction"])
    return portable.KNOWN_SPILLS.get(place, {}).get(call["call"], 0)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_family_compiles_and_spills_no_more(version: str) -> None:
    found = printed(version, pathlib.Path(__file__).parent / "compile_x64.py")
    assert {call["algorithm"] for call in found} == {"hopper", "flash", "chunked"}
    bad = [x for x in found if not x.get("kernels") or x["spilled"] > known_spills(x)]
    assert not bad, "\n".join(map(str, bad))
