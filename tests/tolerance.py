"""How far from float64 a result may be: never a magic number.

`eager` is held to an a-priori bound: a few units of rounding times the sum of absolute terms,
element by element. Every other backend is held to eager: at most 2x its error (3x for gradients,
5x for second derivatives) plus a few ulp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from tests.reference import Floats, float64

FORWARD = ("out", "lse")
SECOND_ORDER = 5.0


def epsilon(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps)


def internal_epsilon(dtype: Any) -> float:
    """Sums and softmax are float32, or float64 when the inputs are."""
    return min(epsilon(dtype), epsilon(jnp.float32))


def of_sums(terms: int, magnitude: float, dtype: Any = jnp.float32) -> float:
    """The a-priori bound on two sums of one set of so many terms, each in an order of its own.

    magnitude: the sum of their absolute values (Higham, "Accuracy and Stability of Numerical
    Algorithms", 2002, section 4.2).
    """
    return 2 * terms * epsilon(dtype) * magnitude


def underflow(dtype: Any) -> float:
    """What float16 loses of tiny terms, whatever their size; nothing to speak of in the others."""
    return 64 * float(jnp.finfo(dtype).smallest_subnormal)


def error(got: Any, exact: Floats) -> float:
    """Largest absolute error; infinities and NaN must sit in the same places."""
    got = float64(got)
    assert got.shape == exact.shape, f"shape {got.shape}, expected {exact.shape}"
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(got[~finite], exact[~finite])
    difference = np.abs(got[finite] - exact[finite])
    return float(difference.max(initial=0.0)) if not np.isnan(difference).any() else np.inf


def check_a_priori(
    name: str, got: Any, exact: Floats, magnitude: Floats, dtype: Any, condition: float
) -> None:
    """Eager's own bound. `condition` is 1 + the largest logit: what exp makes of its rounding."""
    unit = (0.0 if name == "lse" else epsilon(dtype)) + 2 * condition * internal_epsilon(dtype)
    error(got, exact)
    finite = np.isfinite(exact)
    bound = 4 * unit * np.broadcast_to(magnitude, exact.shape)[finite] + underflow(dtype)
    excess = np.abs(float64(got)[finite] - exact[finite]) - bound
    assert excess.max(initial=0.0) <= 0.0, f"{name}: {excess.max()} over the a-priori bound"


def allowed(
    name: str,
    peer_error: float,
    exact: Floats,
    magnitude: Floats,
    dtype: Any,
    times: float | None = None,
) -> float:
    times = times or (2.0 if name in FORWARD else 3.0)
    result = internal_epsilon(dtype) if name == "lse" else epsilon(dtype)
    largest = float(np.abs(exact[np.isfinite(exact)]).max(initial=0.0))
    few_ulp = 2 * result * largest + 4 * internal_epsilon(dtype) * float(magnitude.max(initial=0.0))
    return times * peer_error + few_ulp + underflow(dtype)


def check_against_peer(
    name: str,
    got: Any,
    peer: Any | Callable[[], Any],
    exact: Floats,
    magnitude: Floats,
    dtype: Any,
    times: float | None = None,
) -> None:
    """`got` is at most 2x (gradients 3x) as far from exact as `peer`, plus a few ulp.

    peer: the array, or what makes it, which is asked only where the few ulp are not enough: to
    compile eager is a good part of a test's time.
    """
    found = error(got, exact)
    if callable(peer):
        if found <= allowed(name, 0.0, exact, magnitude, dtype, times):
            return
        peer = peer()
    bound = allowed(name, error(peer, exact), exact, magnitude, dtype, times)
    assert found <= bound, (
        f"{name}: error {found:.3g}, allowed {bound:.3g}, eager's {error(peer, exact):.3g}"
    )
