"""The table of backends: what each cannot do and why, which one runs, and how to force one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import jax
from jax import Array

from jattn.backends import cudnn, eager, flash, kernels, memory_efficient
from jattn.backends.names import nearest
from jattn.call.errors import UnsupportedAttentionError
from jattn.call.spec import AttentionSpec, Operands
from jattn.call.target import Target
from pallas_kernels.hopper import limits as hopper
from pallas_kernels.portable import limits as portable

__all__ = [
    "FORMS",
    "NAMES",
    "Form",
    "Implementation",
    "attention_backend",
    "candidates",
    "choose",
    "forms_of",
]

type Implementation = str | Sequence[str]


@dataclass(frozen=True)
class Form:
    """One way to compute attention. The forms of one name are one backend to its users.

    lacks: what a device lacks to run it; None if nothing.
    refusals: why it cannot do a call, with the values, on a device that lacks nothing.
    takes_free_sizes: whether `jax.export` may leave batch and lengths free.
    takes_parts: whether it may be of one device among several that share the sequence.
    tangents: what makes a call's tangents, of forward and backward, from what it saved.
    """

    name: str
    attend: Callable[[AttentionSpec, Operands, Target], tuple[Array, Array]]
    kernel: Callable[[AttentionSpec, Target], str]
    gradient_bytes: Callable[[AttentionSpec, Target], int]
    lacks: Callable[[Target], str | None] = lambda target: None
    refusals: Callable[[AttentionSpec, Target], list[str]] = lambda spec, target: []
    tangents: Callable[[AttentionSpec, Target], str] = lambda spec, target: "XLA"
    automatic: bool = True
    takes_free_sizes: bool = False
    takes_parts: bool = True

    def reasons(self, spec: AttentionSpec, target: Target) -> list[str]:
        """All that keeps it from running."""
        lack = self.lacks(target)
        if lack is not None:
            return [lack]
        if spec.context is not None and not self.takes_parts:
            return [
                f"the sequence is cut along {spec.context.name} (jattn.context_parallel), and it "
                "gives no parts of a softmax that others could go on with"
            ]
        free = [] if self.takes_free_sizes else spec.free_sizes
        if free:
            return [f"sizes left free ({', '.join(free)}): a kernel is made for numbers"]
        return self.refusals(spec, target)


def _tangents_by(spec: AttentionSpec, target: Target) -> str:
    """What makes the tangents of a call that kernels run."""
    return "XLA" if portable.tangent_refusals(spec) else "Pallas, portable"


def _tangents_beside_hopper(spec: AttentionSpec, target: Target) -> str:
    """The same of a call that Hopper kernels run."""
    if hopper.tangent_refusals(spec):
        return _tangents_by(spec, target)
    left = {
        "queries": hopper.backward_tangent_refusals(spec),
        "keys and values": hopper.key_tangent_refusals(spec),
    }
    names = [name for name, reasons in left.items() if reasons]
    others = []
    if names:
        others += ["of gradients" if len(names) == len(left) else f"of gradients of {names[0]}"]
    if spec.scale is None:
        others += ["if the scale's are wanted"]  # known of an array only where it is differentiated
    return "; ".join(["Pallas, Hopper", *(f"{which} Pallas, portable" for which in others)])


def _hopper_refusals(spec: AttentionSpec, target: Target) -> list[str]:
    # Some gradients of a call with a dense mask or a bias are the portable kernels'.
    return hopper.refusals(spec) + (portable.refusals(spec) if hopper.portable_part(spec) else [])


# In the order in which they are tried: all that are automatic where none is named, or those of the
# name. The reason for each place is a measurement in benchmarks/results. On an H200 flash's Hopper
# kernels are ahead of cuDNN's in most cells, forward and backward, and cuDNN's ahead of flash's
# portable ones. On a CPU memory_efficient is ahead of the formula at every length from 512 on.
FORMS = (
    Form(
        name="flash",
        attend=flash.attend_on_hopper,
        kernel=flash.hopper_kernel,
        gradient_bytes=flash.hopper_gradient_bytes,
        lacks=lambda target: kernels.lacks("hopper", target),
        refusals=_hopper_refusals,
        tangents=_tangents_beside_hopper,
    ),
    Form(
        name="cudnn",
        attend=lambda spec, operands, target: cudnn.attend(spec, operands),
        kernel=lambda spec, target: "cuDNN fused attention",
        gradient_bytes=cudnn.gradient_bytes,
        lacks=cudnn.lacks,
        refusals=cudnn.refusals,
        takes_parts=False,
    ),
    Form(
        name="flash",
        attend=flash.attend_portably,
        kernel=flash.portable_kernel,
        gradient_bytes=flash.portable_gradient_bytes,
        lacks=lambda target: kernels.lacks("portable", target),
        refusals=lambda spec, target: portable.refusals(spec),
        tangents=_tangents_by,
    ),
    Form(
        name="memory_efficient",
        attend=memory_efficient.attend_in_kernels,
        kernel=lambda spec, target: "Pallas, portable, query-chunked",
        gradient_bytes=flash.chunked_gradient_bytes,
        lacks=lambda target: kernels.lacks("portable", target),
        refusals=lambda spec, target: portable.refusals(spec),
        tangents=_tangents_by,
    ),
    Form(
        name="memory_efficient",
        attend=memory_efficient.attend,
        kernel=memory_efficient.kernel,
        gradient_bytes=memory_efficient.gradient_bytes,
        takes_free_sizes=True,
    ),
    Form(
        name="eager",
        attend=lambda spec, operands, target: eager.attend(spec, operands),
        kernel=lambda spec, target: "XLA, the formula",
        gradient_bytes=eager.gradient_bytes,
        tangents=lambda spec, target: "JAX",
        takes_free_sizes=True,
        automatic=False,
        takes_parts=False,
    ),
)
NAMES = tuple(dict.fromkeys(form.name for form in FORMS))

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


def candidates(implementation: Implementation | None) -> tuple[Form, ...]:
    """The forms that may run a call, in the order to try: as named, as forced, or automatic."""
    names = _forced.value if implementation is None else _names(implementation)
    if names is None:
        return tuple(form for form in FORMS if form.automatic)
    return tuple(form for name in names for form in forms_of(name))


def forms_of(name: str) -> tuple[Form, ...]:
    """Those of one backend, in the order to try."""
    return tuple(form for form in FORMS if form.name == name)


def choose(spec: AttentionSpec, target: Target, implementation: Implementation | None) -> Form:
    """The first candidate that refuses nothing; raises with every reason if there is none."""
    tried = candidates(implementation)
    reasons: list[str] = []
    for form in tried:
        refusals = form.reasons(spec, target)
        if not refusals:
            return form
        reasons += [f"{form.name}: {reason}" for reason in refusals]
    names = ", ".join(dict.fromkeys(form.name for form in tried))
    raise UnsupportedAttentionError(
        f"no attention backend of ({names}) can run this call on {target} [{spec.describe()}]: "
        + "; ".join(dict.fromkeys(reasons))
    )


def _names(implementation: Implementation) -> tuple[str, ...]:
    named = [implementation] if isinstance(implementation, str) else implementation
    names = tuple(named) if isinstance(named, list | tuple) else ()
    unknown = [name for name in names if not isinstance(name, str) or name not in NAMES]
    if unknown or not names:
        allowed = ", ".join(map(repr, NAMES))
        advice = (nearest(name, NAMES) for name in unknown)
        raise ValueError(
            f"implementation must be one of {allowed}, a sequence of them, or None; "
            + "; ".join([f"got {implementation!r}", *dict.fromkeys(filter(None, advice))])
        )
    return names
