"""In 64-bit mode every family of kernels compiles for an absent H200, and spills no more.

It runs as tests/hopper/test_compile.py does.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.hopper import test_compile as hopper
from tests.portable import test_compile as portable

pytestmark = pytest.mark.compile


def known_spills(call: dict[str, Any]) -> int:
    if call["algorithm"] == "hopper":
        return hopper.KNOWN_SPILLS.get(call["call"], 0) if call["direction"] == "backward" else 0
    place = (call["device"], call["algorithm"], call["direction"])
    return portable.KNOWN_SPILLS.get(place, {}).get(call["call"], 0)


@pytest.mark.parametrize("version", hopper.VERSIONS)
def test_every_family_compiles_and_spills_no_more(version: str) -> None:
    found = hopper.compiled(version, "../compile_x64.py")
    assert {call["algorithm"] for call in found} == {"hopper", "flash", "chunked"}
    bad = [x for x in found if not x.get("kernels") or x["spilled"] > known_spills(x)]
    assert not bad, "\n".join(map(str, bad))
