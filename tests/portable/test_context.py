"""The portable kernels, interpreted, on parts of a sequence that two devices share."""

from __future__ import annotations

import pytest

from tests.cases import first
from tests.four_devices import run

PROGRAM = """
import jattn
from jattn.backends.kernels import only
from tests import context
from tests.backends import Backend
from tests.cases import CASES, Case

flash = Backend("flash", jattn.flash_attention)
cases = {{case.name: case for case in CASES}}
dropped = Case("dropout_causal", queries=32, keys=32, kv_heads=1, dropout=0.3, causal=True)
case = {case}
with only("portable", interpret=True):
    found = context.through(
        flash, case, context.mesh_of(2), check_vma=False, schedule="{schedule}"
    )
context.check(found, case)
"""
CALLS = [
    ("dropped", "ring"),
    ("cases['everything']", "ring"),
    ("dropped", "gather"),
    ("cases['everything']", "gather"),
    ("cases['bias_BN1S']", "ring"),
    ("cases['lengths_causal_bottom_right']", "ring"),
    ("cases['everything-bfloat16']", "gather"),
]


@pytest.mark.parametrize("call", first(0, CALLS), ids=lambda call: "-".join(call))
def test_parts_are_as_exact(call: tuple[str, str]) -> None:
    case, schedule = call
    run(PROGRAM.format(case=case, schedule=schedule), devices=2)
