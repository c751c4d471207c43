"""`tests.reference` on a GPU, in float64 by jax: for calls that take NumPy seconds and gigabytes.

Some heads at a time, each of a batch row. All sizes are padded, by positions that nothing sees, so
that one program serves many calls. What NumPy has no formula of, jax derives: tangents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests import reference
from tests.cases import Case, Operands
from tests.promotion import of_others
from tests.reference import Bools, Floats

__all__ = ["exact", "is_long", "pulled", "pushed"]

Values = dict[str, Floats]
Arrays = dict[str, Any]

LONG = 2**20  # pairs of a query and a key, which take NumPy a fifth of a second
AT_ONCE = 2**22  # the same, of which there are some dozen arrays in float64


def is_long(case: Case) -> bool:
    """Whether NumPy would take long, and a GPU is there that does not."""
    pairs = case.batch * case.heads * case.queries * case.keys
    return jax.default_backend() == "gpu" and pairs > LONG


def exact(drawn: Operands, keep: Bools | None) -> tuple[Values, Values]:
    """Output, log-sum-exp and all gradients, and the magnitudes of each."""
    cotangents = {"dout": drawn["dout"], "dlse": drawn["dlse"]}
    found = _by_heads(_results, drawn, keep, drawn.differentiable, cotangents)
    sizes = {name: found.pop(name) for name in list(found) if name.startswith("size_")}
    return found, {name.removeprefix("size_"): x for name, x in sizes.items()}


def pushed(drawn: Operands, keep: Bools | None, arrays: Arrays, moving: Arrays) -> Values:
    """Output and log-sum-exp, 0 where there is none, and their tangents."""
    return _by_heads(_pushed, drawn, keep, arrays, _all(moving, arrays))


def pulled(
    drawn: Operands, keep: Bools | None, arrays: Arrays, moving: Arrays, gradients: Arrays
) -> Values:
    """The tangents of all gradients; gradients: of output and log-sum-exp, and theirs."""
    of_gradients = {f"t_{name}": np.zeros_like(drawn[name]) for name in ("dout", "dlse")}
    moved = _all(moving, arrays)
    return _by_heads(_pulled, drawn, keep, arrays, moved, of_gradients | gradients)


def _all(moving: Arrays, arrays: Arrays) -> Arrays:
    """What does not move moves by nothing, by the same program."""
    return {name: moving.get(name, np.zeros_like(x)) for name, x in arrays.items()}


def _by_heads(
    program: Callable[..., Arrays],
    drawn: Operands,
    keep: Bools | None,
    arrays: Arrays,
    *more: Arrays,
) -> Values:
    """What a program gives of a call's heads, put together; what they share is added up."""
    case = drawn.case
    shapes = {name: np.shape(x) for name, x in arrays.items()}
    shapes |= {"out": drawn["dout"].shape, "lse": drawn["dlse"].shape}
    masks = {"seen": drawn.seen} | ({} if keep is None else {"keep": keep})
    numbers = {"soft_cap": case.soft_cap, "rate": case.dropout}
    if "scale" not in arrays:
        numbers["scale"] = case.scale or case.head_dim**-0.5
    heads = list(np.ndindex(case.batch, case.heads))
    count = max(1, AT_ONCE // (_padded(case.queries) * _padded(case.keys)))
    totals: Values = {}
    for start in range(0, len(heads), count):
        some = heads[start : start + count]
        each = some + heads[:1] * (count - len(some))
        given = [
            {name: _of_heads(name, x, case, each) for name, x in tree.items()}
            for tree in (masks, arrays, *more)
        ]
        given[0]["seen"][:, len(some) :] = False
        with jax.enable_x64(True), of_others():
            found = program(given[0] | numbers, *given[1:])
        for name, x in found.items():
            own = _kind(name)
            total = totals.setdefault(name, np.zeros(shapes[own]))
            _add(total, own, np.asarray(x), case, some)
    return totals


def _kind(name: str) -> str:
    return name.rpartition("_")[2]


def _padded(size: int) -> int:
    if size > 1024:
        return -(-size // 1024) * 1024
    return max(64, 1 << (size - 1).bit_length())


def _of_heads(name: str, x: Any, case: Case, heads: list[tuple[int, ...]]) -> Any:
    """An operand of a call of one row that has just these heads."""
    match _kind(name):
        case "scale":
            return x
        case "sinks":
            return np.array([x[n] for _, n in heads])
        case "seen" | "keep" | "bias":  # (1, heads, T or 1, S or 1)
            rows, of = x.shape[:2]
            return _widened(np.stack([x[b % rows, n % of] for b, n in heads])[None], (2, 3))
        case "k" | "v":
            group = case.heads // case.kv_heads
            heads = [(b, n // group) for b, n in heads]
    # (1, T or S, heads) and the head dim if there is one
    return _widened(np.stack([x[b, :, n] for b, n in heads], axis=1)[None], (1, 3))


def _widened(x: Any, axes: tuple[int, ...]) -> Any:
    """Zeros after the end of these axes; one of size 1 may be shared by all positions."""
    sizes = [(0, _padded(n) - n) if i in axes and n > 1 else (0, 0) for i, n in enumerate(x.shape)]
    return np.pad(x, sizes)


def _add(total: Floats, kind: str, found: Floats, case: Case, heads: list[tuple[int, ...]]) -> None:
    """Adds what some heads give to a result of the call."""
    if kind == "scale":
        total += found
        return
    for i, (b, n) in enumerate(heads):
        if kind == "sinks":
            total[n] += found[i]
            continue
        if kind == "bias":
            own, x = total[b % total.shape[0], n % total.shape[1]], found[0, i]
        else:
            head = n * case.kv_heads // case.heads if kind in ("k", "v") else n
            own, x = total[b, :, head], found[0, :, i]
        own += x[tuple(map(slice, own.shape))]


def _attention(options: Arrays, arrays: Arrays) -> reference.Attention:
    return reference.attention(**options, **arrays, xp=jnp)


@jax.jit
def _results(options: Arrays, arrays: Arrays, cotangents: Arrays) -> Arrays:
    made = _attention(options, arrays)
    sizes = made.magnitudes(**cotangents)
    found = {"out": made.out, "lse": made.lse, **made.gradients(**cotangents)}
    return found | {f"size_{name}": x for name, x in sizes.items()}


def _wide(tree: Arrays) -> Arrays:
    return {name: jnp.asarray(x, jnp.float64) for name, x in tree.items()}


@jax.jit
def _pushed(options: Arrays, arrays: Arrays, moving: Arrays) -> Arrays:
    def results(arrays: Arrays) -> Any:
        made = _attention(options, arrays)
        return made.out, made.lse

    (out, lse), (t_out, t_lse) = jax.jvp(results, (_wide(arrays),), (_wide(moving),))
    return {"out": out, "lse": jnp.where(lse == -jnp.inf, 0, lse), "t_out": t_out, "t_lse": t_lse}


@jax.jit
def _pulled(options: Arrays, arrays: Arrays, moving: Arrays, gradients: Arrays) -> Arrays:
    def function(arrays: Arrays, cotangents: Any) -> Any:
        def results(arrays: Arrays) -> Any:
            made = _attention(options, arrays)
            return made.out, made.lse

        return jax.vjp(results, arrays)[1](cotangents)[0]

    wide = _wide(gradients)
    own, moved = ((wide[f"{t}dout"], wide[f"{t}dlse"]) for t in ("", "t_"))
    found: Arrays = jax.jvp(function, (_wide(arrays), own), (_wide(moving), moved))[1]
    return found
