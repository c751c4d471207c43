"""The Hopper kernels of the gradients' tangents, interpreted on a CPU, and on a Hopper GPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.backends.kernels import Kernels
from jattn.call.masking import past_zeroed
from jattn.call.row_arrays import BackwardTangentRows
from jattn.call.spec import Operands, Tangents
from jattn.transforms.rows import row_term
from pallas_kernels.hopper.backward_tangent import query_gradient_tangent
from pallas_kernels.hopper.forward import forward
from pallas_kernels.hopper.key_tangents import key_gradient_tangents
from pallas_kernels.hopper.limits import backward_tangent_refusals, key_tangent_refusals
from tests.backends import Results
from tests.cases import Case, operands
from tests.hopper.calls import LARGE, SHARED, SMALL, Half, spec_of
from tests.hopper.exact import check_repeats, hopper
from tests.hopper.test_tangent import past_lengths
from tests.portable.tangents import (
    arrays_of,
    called,
    directions,
    expected_pulled,
    expected_pushed,
    tangents_of,
    with_sinks,
    within,
)
from tests.shapes import arguments

__all__ = ["hopper"]

thorough = pytest.mark.thorough


def takes(case: Case) -> list[str]:
    """The gradients whose tangents there are kernels of."""
    spec = spec_of(case)
    found = [] if backward_tangent_refusals(spec) else ["q"]
    return found if key_tangent_refusals(spec) else [*found, "k", "v"]


TAKEN = [case for case in SMALL if takes(case)]
ON_A_GPU = [case for case in SMALL + LARGE + SHARED if takes(case)]


def pulled_by_kernels(
    arrays: Results,
    moving: Results,
    gradients: Results,
    t_results: Results,
    *,
    case: Case,
    seed: int,
    interpret: bool,
) -> Results:
    """The tangents of the gradients, from those of output and log-sum-exp."""
    spec, own = called(case, seed, arrays)
    out, top, rest = forward(spec, own, interpret=interpret)
    own, rest, _ = with_sinks(own, top * np.log(2, dtype=np.float32), rest)
    d_out, t_d_out = gradients["dout"], gradients.get("t_dout")
    if own.query_lengths is not None:
        d_out = past_zeroed(d_out, own.query_lengths)
        t_d_out = None if t_d_out is None else past_zeroed(t_d_out, own.query_lengths)
    t_out, mu = t_results["t_out"], t_results["t_lse"].astype(jnp.float32)
    term = row_term(top, out, d_out, gradients["dlse"])
    t_term = row_term(top, t_out, d_out, gradients.get("t_dlse", 0))
    if t_d_out is not None:
        t_term = t_term + row_term(top, out, t_d_out)
    rows = BackwardTangentRows(top, rest, d_out, term, mu, t_term, t_d_out)
    given = (spec, own, rows, tangents_of(case, moving))
    found, names = {}, takes(case)
    if "q" in names:
        found["q"] = query_gradient_tangent(*given, interpret=interpret)
    if "k" in names:
        found["k"], found["v"] = key_gradient_tangents(*given, interpret=interpret)
    return found


def check(
    case: Case,
    seed: int,
    names: str | None = None,
    *,
    moves_gradients: bool = True,
    interpret: bool,
) -> None:
    """The kernels' tangents are as exact as eager's.

    names: of the operands that move, all by default.
    """
    arrays = arrays_of(case, seed)
    moving = directions(case, seed, names or "") if names != "" else {}
    gradients = gradients_of(case, seed, moves=moves_gradients)
    # Those of the results as eager makes them in the call's dtype.
    t_results = results_moved(case, seed, arrays, moving)
    run: Any = partial(pulled_by_kernels, case=case, seed=seed, interpret=interpret)
    given = jax.device_put((arrays, moving, gradients, t_results))
    # The interpreter's effects cannot be compiled where a call is partitioned.
    found = (run if interpret else jax.jit(run))(*given)
    still = {name: np.zeros_like(arrays[name]) for name in found if name not in moving}
    expected = expected_pulled(case, seed, arrays, moving | still, gradients)
    for name, got in found.items():
        within(name, got, expected, case=case, times=5)


def gradients_of(case: Case, seed: int, *, moves: bool = True) -> Results:
    """Gradients of output and log-sum-exp, and their tangents."""
    drawn = operands(case, seed)
    found = {"dout": drawn["dout"], "dlse": drawn["dlse"]}
    rng = np.random.default_rng([seed, 78])
    for name in ("dout", "dlse") if moves else ():
        x = drawn[name]
        found[f"t_{name}"] = np.asarray(rng.standard_normal(x.shape), x.dtype)
    return found


def results_moved(case: Case, seed: int, arrays: Results, moving: Results) -> Results:
    """The tangents of output and log-sum-exp, as exact as their dtypes are."""
    if not moving:
        drawn = operands(case, seed)
        return {"t_out": np.zeros_like(drawn["dout"]), "t_lse": np.zeros(drawn["dlse"].shape)}
    exact = expected_pushed(case, seed, arrays, moving).exact
    dtype = arrays["q"].dtype
    return {"t_out": np.asarray(exact["t_out"], dtype), "t_lse": np.float32(exact["t_lse"])}


def test_interpreted_as_exact_as_the_formula(seed: int) -> None:
    case = Half("few", 1, 30, 140, 1, 1, 64, causal=True, alignment="bottom_right")
    check(case, seed, interpret=True)


# Of this width a product with masked blocks runs by itself.
WIDE = [
    Half("full_128", 1, 130, 200, 2, 1, 128),
    Half("window_128", 1, 200, 300, 1, 1, 128, window=(70, 20)),
]


@pytest.mark.parametrize("wanted", [("query",), ("key",), ("value",), ("query", "value")])
def test_each_alone_is_made_by_the_kernel_that_explain_names(
    wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Half("some", 2, 80, 150, 2, 1, 64, 40, causal=True)
    spec = spec_of(case)
    row: Any = jax.ShapeDtypeStruct((2, 80, 2), jnp.float32)
    floats: dict[str, Any] = arguments(case)[0]
    d_out: Any = jax.ShapeDtypeStruct((2, 80, 2, 40), jnp.bfloat16)
    rows = BackwardTangentRows(row, row, d_out, row, row, row, d_out)
    monkeypatch.setitem(sys.modules, "pallas_kernels.portable.backward_tangent", None)
    kernels = Kernels("hopper", "flash", deterministic=False, interpret=False)
    made = partial(kernels.backward_tangent, spec, wanted=wanted)
    found = jax.eval_shape(made, Operands(**floats), rows, Tangents(**floats))
    assert [x.shape for x in found] == [floats[name].shape for name in wanted]
    assert jattn.explain(**floats, is_causal=True, device="H100").reports[0].tangents == (
        "Pallas, Hopper"
    )


@thorough
@pytest.mark.parametrize("case", TAKEN + WIDE, ids=str)
def test_interpreted_every_feature_as_exact_as_the_formula(case: Case, seed: int) -> None:
    check(case, seed, interpret=True)


@thorough
@pytest.mark.parametrize("moves_gradients", [True, False])
@pytest.mark.parametrize("names", ["", "q", "k", "v", "q v"])
def test_interpreted_what_has_no_tangent_adds_nothing(
    names: str, moves_gradients: bool, seed: int
) -> None:
    case = Half("some", 1, 80, 150, 2, 1, 64, causal=True, alignment="bottom_right")
    check(case, seed, names, moves_gradients=moves_gradients, interpret=True)


@thorough
def test_interpreted_what_lies_past_a_length_changes_no_bit(seed: int) -> None:
    case = Half("padded", 2, 70, 150, 1, 1, 64, query_lengths=(70, 13), key_lengths=(100, 0))
    arrays, moving = arrays_of(case, seed), directions(case, seed)
    gradients = gradients_of(case, seed)
    t_results = results_moved(case, seed, arrays, moving)
    run = partial(pulled_by_kernels, case=case, seed=seed, interpret=True)
    clean, dirty = (
        run(past_lengths(case, arrays, x), past_lengths(case, moving, x), gradients, t_results)
        for x in (0.0, np.nan)
    )
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in clean.values())


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
class TestOnAGpu:
    @pytest.mark.parametrize("case", ON_A_GPU, ids=str)
    def test_as_exact_as_the_formula(self, case: Case, seed: int) -> None:
        check(case, seed, interpret=False)

    @pytest.mark.parametrize("names", ["", "q", "k", "v", "q v"])
    def test_what_has_no_tangent_adds_nothing(self, names: str, seed: int) -> None:
        for head_dim in (64, 128):
            case = Half("some", 2, 500, 500, 4, 2, head_dim, causal=True)
            check(case, seed, names, interpret=False)

    @pytest.mark.parametrize("case", LARGE[::5], ids=str)
    def test_a_hundred_runs_are_bitwise_equal(self, case: Case, seed: int) -> None:
        if not takes(case):
            case = replace(
                case, head_dim=128, value_dim=None, soft_cap=None, segments=None, causal=True
            )
        arrays, moving = arrays_of(case, seed), directions(case, seed)
        given = jax.device_put(
            (arrays, moving, gradients_of(case, seed), results_moved(case, seed, arrays, moving))
        )
        run = jax.jit(partial(pulled_by_kernels, case=case, seed=seed, interpret=False))
        check_repeats(partial(run, *given), 100)
