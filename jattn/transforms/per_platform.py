"""A GPU kernel's call that is another function where the program is lowered for anything else.

Which device a call is traced for is a guess while `jax.jit` traces: where the program runs is known
when it is lowered, or, exported for several platforms, when it is called. The other function is
traced only then, if at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
from jax import Array
from jax.interpreters import mlir

from jattn.transforms.constants import none_folded

__all__ = ["on_nvidia"]

type Results = tuple[Array, ...]


def on_nvidia(
    kernel: Callable[..., Results], elsewhere: Callable[..., Results], *arrays: Any
) -> Results:
    """What `kernel` makes of trees of arrays on NVIDIA's GPUs, and `elsewhere` everywhere else.

    To stand inside of what knows vmap and derivatives. Both give arrays of the same shapes; the
    dtypes are the kernel's.
    """
    leaves: list[Array]
    tree: Any
    leaves, tree = jax.tree.flatten(arrays)

    def call(*held: Array) -> Results:
        return kernel(*tree.unflatten(held))

    traced = jax.make_jaxpr(call)(*leaves)
    found: list[Array] = _on_nvidia_p.bind(*leaves, call=traced, elsewhere=elsewhere, tree=tree)
    return tuple(found)


def _kernel(*held: Array, call: Any, **_: Any) -> list[Array]:
    found: list[Array] = jax.extend.core.jaxpr_as_fun(call)(*held)
    return found


def _elsewhere(*held: Array, call: Any, elsewhere: Callable[..., Results], tree: Any) -> Results:
    found = elsewhere(*tree.unflatten(held))
    asked = call.out_avals
    assert [x.shape for x in found] == [x.shape for x in asked]
    return tuple(x.astype(of.dtype) for x, of in zip(found, asked, strict=True))


_on_nvidia_p = jax.extend.core.Primitive("attention_on_nvidia")
_on_nvidia_p.multiple_results = True
_on_nvidia_p.def_impl(
    lambda *held, **how: jax.jit(lambda *held: _on_nvidia_p.bind(*held, **how))(*held)
)
_on_nvidia_p.def_effectful_abstract_eval(lambda *_, call, **__: (call.out_avals, call.effects))
# Mosaic traces parts of a kernel once more while it lowers it.
mlir.register_lowering(
    _on_nvidia_p, none_folded(mlir.lower_fun(_kernel, multiple_results=True)), platform="cuda"
)
mlir.register_lowering(_on_nvidia_p, mlir.lower_fun(_elsewhere, multiple_results=True))
