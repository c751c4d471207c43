"""The table of backends: what each cannot do and why, which one runs, and how to force one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import jax
from jax import Array

from jattn import cudnn, eager, flash_attention, memory_efficient
from jattn.errors import UnsupportedAttentionError
from jattn.spec import AttentionSpec, Operands
from jattn.target import Target

__all__ = ["BACKENDS", "Backend", "Implementation", "attention_backend", "candidates", "choose"]

type Implementation = str | Sequence[str]


@dataclass(frozen=True)
class Backend:
    """One way to compute attention."""

    name: str
    attend: Callable[[AttentionSpec, Operands, Target], tuple[Array, Array]]
    refusals: Callable[[AttentionSpec, Target], list[str]]
    kernel: Callable[[AttentionSpec, Target], str]
    gradient_bytes: Callable[[AttentionSpec, Target], int]
    automatic: bool = True


# In the order in which an unnamed choice tries them. The reason for each place is a measurement in
# benchmarks/results. On an H200 flash's Hopper kernels are ahead of cuDNN's in most cells, forward
# and backward. On a CPU memory_efficient is ahead of the formula at every length from 512 on.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            name="flash",
            attend=flash_attention.attend,
            refusals=flash_attention.refusals,
            kernel=flash_attention.kernel,
            gradient_bytes=flash_attention.gradient_bytes,
        ),
        Backend(
            name="cudnn",
            attend=lambda spec, operands, target: cudnn.attend(spec, operands),
            refusals=cudnn.refusals,
            kernel=lambda spec, target: "cuDNN fused attention",
            gradient_bytes=flash_attention.gradient_bytes,
        ),
        Backend(
            name="memory_efficient",
            attend=memory_efficient.attend,
            refusals=lambda spec, target: [],
            kernel=memory_efficient.kernel,
            gradient_bytes=memory_efficient.gradient_bytes,
        ),
        Backend(
            name="eager",
            attend=lambda spec, operands, target: eager.attend(spec, operands),
            refusals=lambda spec, target: [],
            kernel=lambda spec, target: "XLA, the formula",
            gradient_bytes=eager.gradient_bytes,
            automatic=False,
        ),
    )
}

_forced = jax.make_user_context(None)


@contextmanager
def attention_backend(implementation: Implementation) -> Generator[None]:
    """Makes calls inside that name no `implementation` use this one; part of `jax.jit`'s cache key.

    Args:
      implementation: a backend's name, or several to be tried in order.

    Raises:
      ValueError: a name that is not a backend's.

    >>> import jax.numpy as jnp, jattn
    >>> x = jnp.ones((1, 4, 2, 8))
    >>> with jattn.attention_backend("eager"):
    ...     jattn.explain(x, x, x).chosen
    'eager'
    """
    with _forced(_names(implementation)):
        yield


def candidates(implementation: Implementation | None) -> tuple[Backend, ...]:
    """The backends that may run a call, in the order to try: as named, as forced, or automatic."""
    names = _forced.value if implementation is None else _names(implementation)
    if names is None:
        return tuple(backend for backend in BACKENDS.values() if backend.automatic)
    return tuple(BACKENDS[name] for name in names)


def choose(spec: AttentionSpec, target: Target, implementation: Implementation | None) -> Backend:
    """The first candidate that refuses nothing; raises with every reason if there is none."""
    tried = candidates(implementation)
    reasons: list[str] = []
    for backend in tried:
        refusals = backend.refusals(spec, target)
        if not refusals:
            return backend
        reasons += [f"{backend.name}: {reason}" for reason in refusals]
    names = ", ".join(backend.name for backend in tried)
    raise UnsupportedAttentionError(
        f"no attention backend of ({names}) can run this call on {target} [{spec.describe()}]: "
        + "; ".join(reasons)
    )


def _names(implementation: Implementation) -> tuple[str, ...]:
    named = [implementation] if isinstance(implementation, str) else implementation
    names = tuple(named) if isinstance(named, list | tuple) else ()
    unknown = [name for name in names if not isinstance(name, str) or name not in BACKENDS]
    if unknown or not names:
        allowed = ", ".join(map(repr, BACKENDS))
        raise ValueError(
            f"implementation must be one of {allowed}, a sequence of them, or None; "
            f"got {implementation!r}"
        )
    return names
