"""`tests.reference` on a GPU, in float64 by jax: for calls that take NumPy seconds and gigabytes.

Some heads at a time, each of a batch row. All sizes are padded to powers of two, by positions that
nothing sees, so that one program serves many calls.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests import reference
from tests.cases import Case, Operands
from tests.promotion import of_others
from tests.reference import Bools, Floats

__all__ = ["exact", "is_long"]

Values = dict[str, Floats]

LONG = 2**20  # pairs of a query and a key, which take NumPy a fifth of a second
AT_ONCE = 2**22  # the same, of which there are some dozen arrays in float64


def is_long(case: Case) -> bool:
    """Whether NumPy would take long, and a GPU is there that does not."""
    pairs = case.batch * case.heads * case.queries * case.keys
    return jax.default_backend() == "gpu" and pairs > LONG


def exact(drawn: Operands, keep: Bools | None) -> tuple[Values, Values]:
    """Output, log-sum-exp and all gradients, and the magnitudes of each."""
    case = drawn.case
    shapes = {name: x.shape for name, x in drawn.differentiable.items()}
    shapes |= {"out": drawn["dout"].shape, "lse": drawn["dlse"].shape}
    found, sizes = ({name: np.zeros(shape) for name, shape in shapes.items()} for _ in range(2))
    heads = list(np.ndindex(case.batch, case.heads))
    count = max(1, AT_ONCE // (_padded(case.queries) * _padded(case.keys)))
    for start in range(0, len(heads), count):
        some = heads[start : start + count]
        given = _of_heads(drawn, keep, some + heads[:1] * (count - len(some)))
        with jax.enable_x64(True), of_others():
            results = _program(*given, case.scale or case.head_dim**-0.5, case.dropout)
        for total, own in zip((found, sizes), results, strict=True):
            own = {name: np.asarray(x) for name, x in own.items()}
            for i, (b, n) in enumerate(some):
                for name, x in own.items():
                    _add(total[name], name, x, i, b, n, case)
    return found, sizes


def _add(total: Floats, name: str, found: Floats, i: int, b: int, n: int, case: Case) -> None:
    """Adds what head n of row b, the i-th of those found, gives to a result of the call."""
    if name == "sinks":
        total[n] += found[i]
        return
    if name == "bias":
        own, found = total[b % total.shape[0], n % total.shape[1]], found[0, i]
    else:
        head = n * case.kv_heads // case.heads if name in ("k", "v") else n
        own, found = total[b, :, head], found[0, :, i]
    own += found[tuple(map(slice, own.shape))]


def _padded(size: int) -> int:
    return max(64, 1 << (size - 1).bit_length())


def _of_heads(drawn: Operands, keep: Bools | None, heads: list[tuple[int, ...]]) -> Any:
    """The operands of `_program`: those of a call of one row that has just these heads."""
    case, given = drawn.case, drawn.differentiable

    def columns(x: Any, of_keys: bool = False) -> Any:
        """(1, T or S, heads) and the head dim if there is one."""
        group = case.heads // case.kv_heads if of_keys else 1
        return _widened(np.stack([x[b, :, n // group] for b, n in heads], axis=1)[None], (1, 3))

    def pairs(x: Any) -> Any:
        """(1, heads, T or 1, S or 1)."""
        rows, of = x.shape[:2]
        return _widened(np.stack([x[b % rows, n % of] for b, n in heads])[None], (2, 3))

    arrays = {"q": columns(given["q"])}
    arrays |= {name: columns(given[name], of_keys=True) for name in "kv"}
    return (
        arrays,
        tuple(columns(drawn[name]) for name in ("dout", "dlse")),
        {
            "seen": pairs(drawn.seen),
            "bias": pairs(given["bias"]) if "bias" in given else None,
            "sinks": np.array([given["sinks"][n] for _, n in heads]) if "sinks" in given else None,
            "keep": None if keep is None else pairs(keep),
            "soft_cap": case.soft_cap,
        },
    )


def _widened(x: Any, axes: tuple[int, ...]) -> Any:
    """Zeros after the end of these axes; one of size 1 may be shared by all positions."""
    sizes = [(0, _padded(n) - n) if i in axes and n > 1 else (0, 0) for i, n in enumerate(x.shape)]
    return np.pad(x, sizes)


@jax.jit
def _program(
    arrays: dict[str, Any], cotangents: Any, options: dict[str, Any], scale: Any, rate: Any
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    made = reference.attention(**arrays, **options, scale=scale, rate=rate, xp=jnp)
    values = {"out": made.out, "lse": made.lse, **made.gradients(*cotangents)}
    return values, made.magnitudes(*cotangents)
