"""The README's cache, filled by chunks and then by token, gives what one pass does."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp

import jattn
from tests import formula

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_readmes_cache_is_one_pass() -> None:
    section = README.read_text().split("## With a cache, in chunks")[1]
    (code,) = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    names: dict[str, Any] = {"jax": jax, "jnp": jnp, "jattn": jattn}
    exec(code, names)
    arrays = (names[name] for name in ("query", "key", "value"))
    found = {"out": jnp.concatenate(names["outputs"], axis=1)}
    formula.check(found, lambda of, *x: {"out": of(*x, is_causal=True)}, *arrays)
    assert names["attend"]._cache_size() == 2  # a chunk's, a token's
