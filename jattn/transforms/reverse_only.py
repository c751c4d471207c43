"""Refuses, with a reason, the derivatives that recomputing attention does not have.

`jax.custom_vjp` alone would end a `jax.jvp` with an error that names neither attention nor a way
out. An identity on the inputs does better: its tangent is a primitive that can be transposed, which
is all that reverse mode needs, but neither evaluated nor lowered, which forward mode would need.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any, NoReturn

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import Array
from jax.interpreters import ad, batching, mlir

from jattn.call.errors import UnsupportedAttentionError

__all__ = ["first_order_only", "naming_eager", "reverse_only"]

_ADVICE = "use implementation='eager' (or jattn.eager_attention), which has derivatives of any kind"
FORWARD_MODE = f"this attention backend has no forward-mode derivative (jvp): {_ADVICE}"
SECOND_ORDER = f"this attention backend has no second derivative: {_ADVICE}"


@jax.custom_jvp
def _reverse_only(x: Array) -> Array:
    return x


@_reverse_only.defjvp
def _reverse_only_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return primals[0], _tangent_p.bind(tangents[0])


def reverse_only[T](tree: T) -> T:
    """The same arrays; forward-mode differentiation through the inexact ones is refused."""

    def guard(x: Array) -> Array:
        return _reverse_only(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    guarded: T = jax.tree.map(guard, tree)
    return guarded


def first_order_only[**P, R](backward: Callable[P, R]) -> Callable[P, R]:
    """The same function of arrays, by position; differentiating it, in either mode, is refused."""

    @jax.custom_vjp
    def guarded(*args: P.args, **_: P.kwargs) -> R:
        return backward(*args, **_)

    def no_second(*_: Any) -> NoReturn:
        raise UnsupportedAttentionError(SECOND_ORDER)

    guarded.defvjp(lambda *args: (guarded(*args), None), no_second)

    def refusing(*args: P.args, **kwargs: P.kwargs) -> R:
        with naming_eager():
            return guarded(*reverse_only(args), **kwargs)

    return refusing


@contextlib.contextmanager
def naming_eager() -> Generator[None]:
    """Rewords jax's own refusal of a forward-mode derivative.

    It comes before the primitive's where a vmap stands outside the jvp, as in a jitted `jacfwd`.
    """
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise UnsupportedAttentionError(FORWARD_MODE) from error


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise UnsupportedAttentionError(FORWARD_MODE)


_tangent_p = jax.extend.core.Primitive("reverse_only_tangent")
_tangent_p.def_impl(_refuse)
_tangent_p.def_abstract_eval(lambda x: x)
ad.deflinear2(_tangent_p, lambda cotangent, _: [cotangent])
batching.defvectorized(_tangent_p)
mlir.register_lowering(_tangent_p, _refuse)
