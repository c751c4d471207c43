"""The Hopper kernel of the output's tangent, interpreted on a CPU, and on a Hopper GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.call.row_arrays import TangentRows
from pallas_kernels.hopper.forward import forward
from pallas_kernels.hopper.limits import tangent_refusals
from pallas_kernels.hopper.tangent import tangent
from tests.backends import Results
from tests.cases import Case, operands
from tests.hopper.calls import LARGE, SHARED, SMALL, Half, spec_of
from tests.hopper.exact import check_repeats, hopper
from tests.portable.tangents import (
    arrays_of,
    called,
    check_pushed,
    directions,
    of_sinks,
    tangents_of,
    with_sinks,
)

__all__ = ["hopper"]

thorough = pytest.mark.thorough

TAKEN = [case for case in SMALL if not tangent_refusals(spec_of(case))]
ON_A_GPU = [case for case in SMALL + LARGE + SHARED if not tangent_refusals(spec_of(case))]


def pushed_by_kernel(
    arrays: Results, moving: Results, *, case: Case, seed: int, interpret: bool
) -> Results:
    """Output and log-sum-exp by Hopper's forward, and their tangents."""
    spec, own = called(case, seed, arrays)
    out, top, rest = forward(spec, own, interpret=interpret)
    own, rest, share = with_sinks(own, top * np.log(2, dtype=np.float32), rest)
    t_out, mu = tangent(
        spec, own, TangentRows(top, rest, out, of_sinks(moving, share)), tangents_of(case, moving),
        interpret=interpret,
    )  # fmt: skip
    return {"t_out": t_out, "t_lse": mu}


def check(
    case: Case,
    seed: int,
    names: str = "",
    *,
    interpret: bool,
    arrays: Results | None = None,
    moving: Results | None = None,
) -> Results:
    """The kernel's tangents are as exact as eager's; gives what it found."""
    arrays = arrays_of(case, seed) if arrays is None else arrays
    moving = directions(case, seed, names) if moving is None else moving
    run: Any = partial(pushed_by_kernel, case=case, seed=seed, interpret=interpret)
    # The interpreter's effects cannot be compiled where a call is partitioned.
    found: Results = (run if interpret else jax.jit(run))(*jax.device_put((arrays, moving)))
    check_pushed(found, case, seed, arrays, moving)
    return found


SCALE = jax.ShapeDtypeStruct((), jnp.float32)  # an array's, which may be differentiated


@thorough
@pytest.mark.parametrize("case", TAKEN, ids=str)
def test_interpreted_as_exact_as_the_formula(case: Case, seed: int) -> None:
    check(case, seed, interpret=True)


@pytest.mark.parametrize(
    ("head_dim", "options", "by"),
    [
        (64, {}, "Pallas, Hopper"),
        (64, {"scale": SCALE}, "Pallas, Hopper; if the scale's are wanted Pallas, portable"),
        (128, {}, "Pallas, Hopper; of gradients of keys and values Pallas, portable"),
        (128, {"logits_soft_cap": 5.0}, "Pallas, Hopper; of gradients Pallas, portable"),
        (192, {"scale": SCALE}, "Pallas, portable"),
    ],
)
def test_explain_says_what_makes_them(head_dim: int, options: dict[str, Any], by: str) -> None:
    x = jax.ShapeDtypeStruct((1, 64, 2, head_dim), jnp.bfloat16)
    report = jattn.explain(x, x, x, **options, device="H100").reports[0]
    assert (report.name, report.tangents) == ("flash", by)


@thorough
@pytest.mark.parametrize("names", ["q", "k", "v", "q k", "v sinks", "q v"])
def test_interpreted_what_has_no_tangent_adds_nothing(names: str, seed: int) -> None:
    case = Half("some", 1, 80, 150, 2, 1, 64, sinks=True, causal=True, alignment="bottom_right")
    check(case, seed, names, interpret=True)


def common_keys(seed: int) -> tuple[Case, Results, Results]:
    """Keys of a large mean, as models have; the first rows see none of the first block visited."""
    case = Half("common_keys", 1, 150, 200, 1, 1, 64, causal=True)
    arrays = {name: np.array(x) for name, x in operands(case, seed).differentiable.items()}
    arrays["k"] += np.asarray(30, arrays["k"].dtype)
    arrays["q"] /= np.asarray(16, arrays["q"].dtype)
    return case, arrays, dict(directions(case, seed, "q"))


def test_interpreted_what_all_keys_of_a_row_have_in_common_cancels(seed: int) -> None:
    """Rounded, P tS V and mu O would differ by much."""
    case, arrays, moving = common_keys(seed)
    check(case, seed, interpret=True, arrays=arrays, moving=moving)


@thorough
def test_interpreted_what_lies_past_a_length_changes_no_bit(seed: int) -> None:
    case = Half("padded", 2, 70, 150, 1, 1, 64, query_lengths=(70, 13), key_lengths=(100, 0))
    arrays, moving = arrays_of(case, seed), directions(case, seed)
    clean, dirty = (
        pushed_by_kernel(
            past_lengths(case, arrays, poison), past_lengths(case, moving, poison),
            case=case, seed=seed, interpret=True,
        )
        for poison in (0.0, np.nan)
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in clean.values())


def past_lengths(case: Case, arrays: Results, poison: float) -> Results:
    """The same with poison in what lies past the lengths."""
    found = {name: np.array(x) for name, x in arrays.items()}
    for b in range(case.batch):
        found["q"][b, case.query_lengths[b] :] = poison  # type: ignore[index]
        for name in ("k", "v"):
            found[name][b, case.key_lengths[b] :] = poison  # type: ignore[index]
    return {name: jnp.asarray(x) for name, x in found.items()}


@thorough
def test_interpreted_hidden_values_may_be_as_large_as_their_dtype(seed: int) -> None:
    case = Half("hidden", 1, 20, 150, 1, 1, 64, causal=True)
    arrays, moving = arrays_of(case, seed), directions(case, seed)
    run = partial(pushed_by_kernel, case=case, seed=seed, interpret=True)
    expected = run(jax.device_put(arrays), jax.device_put(moving))
    large = [{name: np.array(x) for name, x in found.items()} for found in (arrays, moving)]
    for found in large:
        for name in ("k", "v"):
            found[name][:, 20:] = jnp.finfo(jnp.bfloat16).max
    for name, x in run(*jax.device_put(large)).items():
        np.testing.assert_array_equal(x, expected[name], err_msg=name)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
class TestOnAGpu:
    @pytest.mark.parametrize("case", ON_A_GPU, ids=str)
    def test_as_exact_as_the_formula(self, case: Case, seed: int) -> None:
        check(case, seed, interpret=False)

    @pytest.mark.parametrize("names", ["q", "k", "v", "q k", "v sinks", "q v"])
    def test_what_has_no_tangent_adds_nothing(self, names: str, seed: int) -> None:
        case = Half("some", 2, 500, 500, 4, 2, 128, sinks=True, causal=True)
        check(case, seed, names, interpret=False)

    def test_what_all_keys_of_a_row_have_in_common_cancels(self, seed: int) -> None:
        case, arrays, moving = common_keys(seed)
        check(case, seed, interpret=False, arrays=arrays, moving=moving)

    @pytest.mark.parametrize("case", LARGE[::5], ids=str)
    def test_two_hundred_runs_are_bitwise_equal(self, case: Case, seed: int) -> None:
        if tangent_refusals(spec_of(case)):
            case = replace(case, head_dim=128, value_dim=None)
        run = jax.jit(partial(pushed_by_kernel, case=case, seed=seed, interpret=False))
        arrays, moving = jax.device_put((arrays_of(case, seed), directions(case, seed)))
        check_repeats(partial(run, arrays, moving), 200)
