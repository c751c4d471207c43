"""Which backend runs, how it is forced, how it is refused, and what `explain` says of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.backends import kernels, table
from tests import formula
from tests.backends import computed_by, largest_array
from tests.cases import Case
from tests.hopper.calls import spec_of

pytestmark = pytest.mark.skipif(
    jax.default_backend() == "gpu", reason="what is chosen and refused on a machine without a GPU"
)
T = 600
X = jnp.asarray(np.random.default_rng(0).standard_normal((1, T, 1, 4)), jnp.float32)
NAMES = ("flash", "cudnn", "memory_efficient", "eager")


def attend(x: jax.Array, **options: Any) -> jax.Array:
    return jattn.dot_product_attention(x, x, x, is_causal=True, **options)


def ran(**options: Any) -> str:
    """What a call runs: `eager` holds the T x T logits, memory_efficient does not."""
    quadratic = largest_array(lambda x: attend(x, **options), X) >= T * T
    return "eager" if quadratic else "memory_efficient"


def explained(**options: Any) -> Any:
    return jattn.explain(X, X, X, is_causal=True, **options)


@pytest.mark.parametrize(
    ("implementation", "expected"),
    [
        (None, "memory_efficient"),
        ("memory_efficient", "memory_efficient"),
        ("eager", "eager"),
        (("flash", "memory_efficient"), "memory_efficient"),
        (["flash", "cudnn", "eager"], "eager"),
        (("eager", "memory_efficient"), "eager"),
        (("memory_efficient", "eager"), "memory_efficient"),
    ],
)
def test_what_runs_is_what_explain_says(implementation: Any, expected: str) -> None:
    assert ran(implementation=implementation) == expected
    assert explained(implementation=implementation).chosen == expected
    if implementation is not None:
        with jattn.attention_backend(implementation):
            assert ran() == expected
            assert explained().chosen == expected


def test_named_functions_run_themselves() -> None:
    assert largest_array(jattn.eager_attention, X, X, X) >= T * T
    assert largest_array(jattn.memory_efficient_attention, X, X, X) < T * T
    with jattn.attention_backend("eager"):
        assert largest_array(jattn.memory_efficient_attention, X, X, X) < T * T
    with jattn.attention_backend("memory_efficient"):
        assert largest_array(jattn.eager_attention, X, X, X) >= T * T


@pytest.mark.parametrize("implementation", ["flash", "cudnn"])
@pytest.mark.parametrize("forced", [False, True])
def test_what_needs_a_gpu_is_refused_with_the_reason(implementation: str, forced: bool) -> None:
    def run() -> Any:
        if not forced:
            return attend(X, implementation=implementation)
        with jattn.attention_backend(implementation):
            return attend(X)

    with pytest.raises(jattn.UnsupportedAttentionError) as caught:
        run()
    text = str(caught.value)
    assert implementation in text
    assert "NVIDIA" in text
    assert "cpu" in text
    assert isinstance(caught.value, NotImplementedError)


def test_flash_attention_is_refused_with_the_reason() -> None:
    with pytest.raises(jattn.UnsupportedAttentionError, match=r"flash.*NVIDIA"):
        jattn.flash_attention(X, X, X)
    with pytest.raises(jattn.UnsupportedAttentionError, match=r"flash.*NVIDIA"):
        jax.jit(jax.grad(lambda x: jattn.flash_attention(x, x, x).sum()))(X)


def test_a_refusal_lists_every_backend_and_every_reason() -> None:
    options: dict[str, Any] = {
        "sinks": jnp.zeros(1),
        "logits_soft_cap": 7.25,
        "dropout_rate": 0.375,
        "dropout_rng": jax.random.key(0),
    }
    with pytest.raises(jattn.UnsupportedAttentionError) as caught:
        attend(X, implementation=("flash", "cudnn"), **options)
    text = str(caught.value)
    for word in ("flash", "cudnn", "NVIDIA"):
        assert word in text
    assert "memory_efficient" not in text.split("[")[0]
    for report in explained(implementation=("flash", "cudnn"), **options).reports:
        if report.name in ("flash", "cudnn"):
            assert report.refusals
            assert all(reason in text for reason in report.refusals)


@pytest.mark.parametrize("name", ["xla", "Flash", "triton", "", "flash "])
def test_an_unknown_name_is_answered_with_the_known_ones(name: str) -> None:
    for run in (
        lambda: attend(X, implementation=name),
        lambda: attend(X, implementation=("eager", name)),
        lambda: explained(implementation=name),
        lambda: jattn.attention_backend(name).__enter__(),
    ):
        with pytest.raises(ValueError, match="implementation") as caught:
            run()
        assert all(known in str(caught.value) for known in (*NAMES, repr(name)))


@pytest.mark.parametrize("implementation", [(), [], 3, True, ("eager", 3), jnp.zeros(2)])
def test_what_is_no_name_is_an_error_of_its_own(implementation: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="implementation"):
        attend(X, implementation=implementation)
    with pytest.raises((ValueError, TypeError), match="implementation"):
        jattn.attention_backend(implementation).__enter__()


def test_the_backend_in_force_is_part_of_the_key_of_a_jitted_function() -> None:
    traces: list[str] = []

    @jax.jit
    def f(x: jax.Array) -> jax.Array:
        traces.append("trace")
        return attend(x)

    def in_force() -> str:
        quadratic = max(array.size for array in computed_by(f.trace(X).jaxpr.jaxpr)) >= T * T
        return "eager" if quadratic else "memory_efficient"

    first = f(X)
    assert in_force() == "memory_efficient"
    count = len(traces)
    with jattn.attention_backend("eager"):
        second = f(X)
        assert in_force() == "eager"
        assert len(traces) == count + 1
        with jattn.attention_backend("flash"), pytest.raises(jattn.UnsupportedAttentionError):
            f(X)
        assert in_force() == "eager"
        count = len(traces)
        f(X)
        assert len(traces) == count, "the entry of the outer backend must still be there"
    third = f(X)
    assert in_force() == "memory_efficient"
    assert len(traces) == count, "the entry made before must still be there"
    np.testing.assert_array_equal(first, third)
    expected = formula.expected(lambda of, x: {"out": of(x, x, x, is_causal=True)}, X)
    for found in (first, second):
        formula.compare({"out": found}, expected)


def test_a_forced_backend_reaches_gradients_and_forward_mode() -> None:
    f = jax.jit(attend)

    def quadratic() -> bool:
        traced = jax.make_jaxpr(lambda x: jax.jvp(jax.grad(lambda x: f(x).sum()), (x,), (x,)))(X)
        return max(array.size for array in computed_by(traced.jaxpr)) >= T * T

    assert not quadratic()
    with jattn.attention_backend("eager"):
        assert quadratic()
    assert not quadratic()


def test_an_argument_outweighs_the_context_and_inner_contexts_outer_ones() -> None:
    with jattn.attention_backend("eager"):
        assert ran(implementation="memory_efficient") == "memory_efficient"
        with jattn.attention_backend("memory_efficient"):
            assert ran() == "memory_efficient"
            assert ran(implementation="eager") == "eager"
        assert ran() == "eager"
    assert ran() == "memory_efficient"


def test_the_context_ends_with_an_exception_too() -> None:
    with pytest.raises(RuntimeError, match="inside"), jattn.attention_backend("eager"):
        raise RuntimeError("inside")
    assert ran() == "memory_efficient"


def test_the_context_holds_for_its_thread_alone() -> None:
    with jattn.attention_backend("eager"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(ran).result() == "memory_efficient"
        assert ran() == "eager"


@pytest.mark.parametrize("name", NAMES)
def test_eager_is_never_chosen_unless_named(name: str) -> None:
    def automatic() -> Any:
        return jattn.explain(X, X, X, sinks=jnp.zeros(1), logits_soft_cap=3.0)

    reports = {report.name: report for report in automatic().reports}
    assert set(reports) == set(NAMES)
    assert reports["eager"].may_run is False
    assert automatic().chosen != "eager"


class TestExplain:
    def test_shapes_are_enough(self) -> None:
        shape = jax.ShapeDtypeStruct((4, 2**20, 32, 128), jnp.bfloat16)
        report = jattn.explain(
            shape,
            shape,
            shape,
            jax.ShapeDtypeStruct((1, 32, 1, 2**20), jnp.float32),
            is_causal=True,
            key_value_seq_lengths=jax.ShapeDtypeStruct((4,), jnp.int32),
            dropout_rate=0.1,
            dropout_rng=jax.eval_shape(lambda: jax.random.key(0)),
        )
        assert report.chosen == "memory_efficient"
        eager = next(r for r in report.reports if r.name == "eager")
        chosen = next(r for r in report.reports if r.name == "memory_efficient")
        assert eager.gradient_bytes >= 4 * 32 * 2**40 * 2
        assert chosen.gradient_bytes < eager.gradient_bytes / 1000

    def test_the_table_has_every_backend_and_every_reason(self) -> None:
        report = explained()
        text = str(report)
        for name in NAMES:
            assert name in text
        for line in report.reports:
            assert all(reason in text for reason in line.refusals)
        assert "> memory_efficient" in text
        assert "NVIDIA" in text
        assert "cpu" in text

    def test_none_is_chosen_where_the_call_would_raise(self) -> None:
        report = explained(implementation=("flash", "cudnn"))
        assert report.chosen is None
        assert report.kernel is None
        assert "NVIDIA" in str(report)

    def test_it_works_while_tracing(self) -> None:
        seen = []

        @jax.jit
        def f(x: jax.Array) -> jax.Array:
            seen.append(jattn.explain(x, x, x).chosen)
            return x

        f(X)
        with jattn.attention_backend("eager"):
            f(X)
        assert seen == ["memory_efficient", "eager"]

    def test_memory_is_near_what_the_compiler_says(self) -> None:
        def loss(x: jax.Array, implementation: str) -> jax.Array:
            return attend(x, implementation=implementation).sum()

        x = jax.ShapeDtypeStruct((1, 1024, 4, 32), jnp.float32)
        for line in jattn.explain(x, x, x, is_causal=True).reports:
            if line.refusals:
                continue
            lowered = jax.jit(jax.grad(loss), static_argnums=1).lower(x, line.name)
            measured = lowered.compile().memory_analysis().temp_size_in_bytes
            assert measured / 3 < line.gradient_bytes < measured * 3, line.name


def on(device_kind: str) -> Any:
    """Inside, calls are traced for a GPU that is not there."""
    device = jax.sharding.AbstractDevice(device_kind=device_kind, num_cores=None, platform="cuda")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def report_on(device_kind: str, name: str, *, dtype: Any = jnp.bfloat16, **options: Any) -> Any:
    head_dim = options.pop("head_dim", 64)
    x = jax.ShapeDtypeStruct((1, 128, 2, head_dim), dtype)
    with on(device_kind):
        explained = jattn.explain(x, x, x, **options)
    return explained, next(report for report in explained.reports if report.name == name)


class TestForms:
    """Which of a backend's kernels a GPU and a call get, and what is said of the others."""

    bias = jax.ShapeDtypeStruct((1, 2, 128, 128), jnp.bfloat16)
    bias_of_keys = jax.ShapeDtypeStruct((1, 2, 1, 128), jnp.bfloat16)

    @pytest.mark.parametrize("gpu", ["NVIDIA A100-SXM4-80GB", "NVIDIA L4", "NVIDIA B200"])
    def test_flash_is_portable_where_there_is_no_hopper(self, gpu: str) -> None:
        _, report = report_on(gpu, "flash")
        assert report.kernel == "Pallas, portable"
        assert report.passed_over == ()

    def test_flash_is_hoppers_own_on_a_hopper_gpu(self) -> None:
        explained, report = report_on("NVIDIA H200", "flash")
        assert (explained.chosen, explained.kernel) == ("flash", report.kernel)
        assert report.kernel == "Pallas Mosaic GPU, Hopper"

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"mask": jax.ShapeDtypeStruct((128, 128), jnp.bool_)}, "more than 128 queries"),
            ({"dtype": jnp.float32}, "not float32"),
            ({"head_dim": 320}, "not 320"),
            ({"head_dim": 32, "bias": bias_of_keys}, "from 64 on, not 32"),
        ],
    )
    def test_flash_is_portable_where_hoppers_cannot_and_says_why(
        self, options: dict[str, Any], reason: str
    ) -> None:
        explained, report = report_on("NVIDIA H200", "flash", **options)
        assert report.kernel == "Pallas, portable"
        assert any(reason in why for why in report.passed_over)
        assert reason in str(explained)

    @pytest.mark.parametrize(
        ("form", "head_dim", "part"),
        [
            ("BNTS", 64, ""),
            ("1NTS", 128, ""),
            ("1N1S", 64, "; gradients, if the bias's is wanted: Pallas, portable"),
            ("BNTS", 256, "; gradients: Pallas, portable"),
        ],
    )
    def test_what_the_portable_kernels_make_of_a_call_with_a_bias_is_said(
        self, form: str, head_dim: int, part: str
    ) -> None:
        sizes = {"B": 2, "N": 8, "T": 512, "S": 512, "1": 1}
        x = jax.ShapeDtypeStruct((2, 512, 8, head_dim), jnp.bfloat16)
        bias = jax.ShapeDtypeStruct(tuple(sizes[axis] for axis in form), jnp.bfloat16)
        with on("NVIDIA H200"):
            explained = jattn.explain(x, x, x, bias=bias)
        assert explained.chosen == "flash"
        assert explained.kernel == "Pallas Mosaic GPU, Hopper" + part

    def test_a_large_bias_that_ends_within_a_tile_is_left_to_portable_kernels(self) -> None:
        x = jax.ShapeDtypeStruct((1, 1001, 8, 64), jnp.bfloat16)
        bias = jax.ShapeDtypeStruct((1, 8, 1001, 1001), jnp.bfloat16)
        many = jax.ShapeDtypeStruct((32, 1001, 8, 64), jnp.bfloat16)
        with on("NVIDIA H200"):
            assert str(jattn.explain(x, x, x, bias=bias).kernel).startswith("Pallas, portable")
            assert "Hopper" in str(jattn.explain(many, many, many, bias=bias).kernel)

    def test_what_neither_can_is_refused_with_the_reasons_of_both(self) -> None:
        _, report = report_on("NVIDIA H200", "flash", head_dim=520)
        assert report.kernel is None
        assert any("Hopper" in reason and "520" in reason for reason in report.refusals)
        assert any("portable" in reason and "520" in reason for reason in report.refusals)
        x = jax.ShapeDtypeStruct((1, 8, 2, 520), jnp.bfloat16)
        with on("NVIDIA H200"), pytest.raises(jattn.UnsupportedAttentionError) as caught:
            jax.eval_shape(jattn.flash_attention, x, x, x)
        assert all(reason in str(caught.value) for reason in report.refusals)

    @pytest.mark.parametrize("gpu", ["Tesla T4", "NVIDIA V100"])
    def test_older_gpus_have_neither(self, gpu: str) -> None:
        explained, report = report_on(gpu, "flash")
        assert report.refusals == (
            "needs an NVIDIA GPU of compute capability 8.0 or later, the target is "
            + explained.target,
        )
        assert explained.chosen == "memory_efficient"
        assert explained.kernel.startswith("XLA")

    def test_memory_efficient_is_a_kernel_up_to_its_limits_and_xla_beyond(self) -> None:
        _, report = report_on("NVIDIA A100-SXM4-80GB", "memory_efficient", bias=self.bias)
        assert report.kernel == "Pallas, portable, query-chunked"
        explained, report = report_on("NVIDIA H200", "memory_efficient", head_dim=520)
        assert explained.chosen == "memory_efficient"
        assert report.kernel.startswith("XLA")
        assert any("520" in why for why in report.passed_over)

    def test_asking_for_chunk_sizes_asks_for_xla(self) -> None:
        x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)

        def traced(**sizes: int) -> str:
            attend = partial(jattn.memory_efficient_attention, **sizes)
            with on("NVIDIA H200"):
                return str(jax.make_jaxpr(attend)(x, x, x))

        assert "pallas_call" in traced()
        assert "pallas_call" not in traced(query_chunk_size=64)
        assert "pallas_call" not in traced(key_chunk_size=64)

    def test_cudnn_comes_after_hoppers_kernels_and_before_portable_ones(self) -> None:
        automatic = [form.name for form in table.candidates(None)]
        assert automatic == ["flash", "cudnn", "flash", "memory_efficient", "memory_efficient"]
        named = [form.name for form in table.candidates(("cudnn", "flash"))]
        assert named == ["cudnn", "flash", "flash"]
        hopper, _, portable = table.candidates(None)[:3]
        spec = spec_of(Case("plain", head_dim=64, dtype="bfloat16"))
        assert "Hopper" in hopper.kernel(spec, None)
        assert "portable" in portable.kernel(spec, None)

    def test_float32_in_full_precision_runs_in_kernels(self) -> None:
        x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.float32)
        with on("NVIDIA H200"):
            assert jattn.explain(x, x, x).kernel == "Pallas, portable"

    def test_one_family_can_be_left_alone(self) -> None:
        x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
        with on("NVIDIA H200"):
            with kernels.only("portable"):
                assert jattn.explain(x, x, x).kernel == "Pallas, portable"
            with kernels.only("hopper"):
                kernel = next(r.kernel for r in jattn.explain(x, x, x).reports if r.name == "flash")
                assert kernel == "Pallas Mosaic GPU, Hopper"
