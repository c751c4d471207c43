"""Cases of the table with their sequence cut over the devices of this process, held to float64.

For a process of several devices: see `tests.four_devices`. Lengths that the devices do not divide
are padded, and said by `query_seq_lengths` and `key_value_seq_lengths`, where an array cannot be
cut unevenly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jattn
from tests import tolerance
from tests.backends import EAGER, Results, kept, quick_jit, results
from tests.cases import Case, operands

Options = dict[str, Any]
ALONG = "sequence"


def mesh_of(devices: int, kind: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh((devices,), (ALONG,), axis_types=(kind,), devices=jax.devices()[:devices])


def padded(x: Any, axis: int, multiple: int) -> Any:
    """With zeros at the end of an axis, unless it is 1 for all."""
    more = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])


def arrays_and_options(case: Case, multiple: int, seed: int = 0) -> tuple[Results, Options]:
    """Arrays by name, and what else `dot_product_attention` is given; lengths made multiples."""
    drawn = operands(case, seed)
    options = {name: x for name, x in drawn.options.items() if x is not None}
    names = {"q": "query", "k": "key", "v": "value", "bias": "bias", "sinks": "sinks"}
    arrays = {names[n]: jnp.asarray(x) for n, x in drawn.differentiable.items()}
    for name in ("mask", "query_segment_ids", "key_value_segment_ids"):
        if name in options:
            arrays[name] = options.pop(name)
    for name in ("query", "key", "value", "query_segment_ids", "key_value_segment_ids"):
        if name in arrays:
            arrays[name] = padded(arrays[name], 1, multiple)
    for name in ("bias", "mask"):
        for axis in (2, 3):
            if name in arrays and arrays[name].shape[axis] > 1:
                arrays[name] = padded(arrays[name], axis, multiple)
    for name, size in (("query_seq_lengths", case.queries), ("key_value_seq_lengths", case.keys)):
        if size % multiple:
            options[name] = jnp.minimum(options.get(name, jnp.full(case.batch, size)), size)
        if name in options:
            arrays[name] = options.pop(name)
    return arrays, options


def place(name: str, x: Any) -> P:
    """How an array is cut: along its queries or keys, and a bias or mask by rows."""
    if name in ("query", "key", "value", "query_segment_ids", "key_value_segment_ids"):
        return P(None, ALONG)
    if name in ("bias", "mask") and x.shape[2] > 1:
        return P(None, None, ALONG)
    return P()


def through(
    attention: Callable[..., Any],
    case: Case,
    mesh: Mesh,
    *,
    check_vma: bool = True,
    **context: Any,
) -> Results:
    """Output, log-sum-exp and gradients of a case through `jax.shard_map`."""
    devices = mesh.shape[ALONG]
    halves = 2 if context.get("layout") == "zigzag" else 1
    arrays, options = arrays_and_options(case, devices * halves)
    places = {name: place(name, x) for name, x in arrays.items()}
    rows = P(None, ALONG)
    is_zigzag = halves == 2

    def own(arrays: Results) -> Any:
        with jattn.context_parallel(ALONG, **context):
            return attention(**arrays, **options, return_residual=True)

    mapped = jax.shard_map(
        own, mesh=mesh, in_specs=(places,), out_specs=(rows, rows), check_vma=check_vma
    )

    def attend(arrays: Results) -> Any:
        if not is_zigzag:
            return mapped(arrays)
        cut = {name: tuple(spec).index(ALONG) for name, spec in places.items() if spec != P()}
        permuted = {name: jattn.zigzag(arrays[name], devices, axis=a) for name, a in cut.items()}
        return tuple(jattn.unzigzag(x, devices) for x in mapped(arrays | permuted))

    return everything(attend, case, arrays, devices * halves)


def everything(attend: Any, case: Case, arrays: Results, multiple: int) -> Results:
    """What `attend` makes of arrays and of the case's cotangents, without padding."""
    drawn = operands(case, 0)
    moving = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    fixed = {name: x for name, x in arrays.items() if name not in moving}
    d_out, d_lse = (padded(jnp.asarray(drawn[name]), 1, multiple) for name in ("dout", "dlse"))

    @quick_jit
    def run(moving: Results, fixed: Results, d_out: Any, d_lse: Any) -> Results:
        (out, lse), vjp = jax.vjp(lambda moving: attend(moving | fixed), moving)
        return {"out": out, "lse": lse, **vjp((d_out, d_lse.astype(lse.dtype)))[0]}

    found = run(moving, fixed, d_out, d_lse)
    names = {"query": "q", "key": "k", "value": "v"}
    found = {names.get(name, name): x for name, x in found.items()}
    shapes = {name: x.shape for name, x in drawn.differentiable.items()}
    shapes |= {"out": drawn["dout"].shape, "lse": drawn["dlse"].shape}
    return {name: x[tuple(map(slice, shapes[name]))] for name, x in found.items()}


def can_be_dealt(case: Case, devices: int) -> bool:
    """Whether the heads of a case can be those of devices: schedule "heads"."""
    has_rows = any("T" in form for form in (case.bias or "", case.mask or ""))
    held = -(-case.queries // devices)
    return case.kv_heads % devices == 0 and not has_rows and (held > 1 or not case.bias)


def check(found: Results, case: Case) -> None:
    """As exact as eager is on one device."""
    drawn = operands(case, 0)
    exact = drawn.exact(kept(case))
    values = {"out": exact.out, "lse": exact.lse, **exact.gradients(drawn["dout"], drawn["dlse"])}
    magnitudes = exact.magnitudes(drawn["dout"], drawn["dlse"])
    peer = results(EAGER, case, 0)
    assert found.keys() == values.keys()
    for name, value in values.items():
        tolerance.check_against_peer(
            name, np.asarray(found[name]), peer[name], value, magnitudes[name], case.dtype
        )


def sharded(attention: Callable[..., Any], case: Case, mesh: Mesh) -> Results:
    """The same of global arrays, cut along their sequence, under `jax.jit`.

    Lengths that the devices do not divide are cut unevenly.
    """
    arrays, options = arrays_and_options(case, 1)

    def attend(arrays: Results) -> Any:
        cut = {
            name: jax.lax.with_sharding_constraint(x, jax.NamedSharding(mesh, place(name, x)))
            for name, x in arrays.items()
        }
        return attention(**cut, **options, return_residual=True)

    return everything(attend, case, arrays, 1)
