"""The README's examples run as they stand, on shorter sequences."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import jattn

README = pathlib.Path(jattn.__file__).parent.parent / "README.md"
SHORTER = {"8192": "256", "4096": "64"}


def test_every_example_runs_after_those_before_it() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, Any] = {}
    for block in blocks:
        for long, short in SHORTER.items():
            block = block.replace(long, short)
        exec(compile(block, "README.md", "exec"), names)
