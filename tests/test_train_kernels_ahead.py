"""A kernel is lowered once for all programs, the same as afresh, and compiled meanwhile."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src.interpreters import mlir
from jax._src.pallas.mosaic_gpu import pallas_call_registration
from jax.extend.core import Primitive
from jaxlib.mlir import ir

from tests.programs import VERSIONS, printed
from training import kernels_ahead
from training.kernels_ahead import Kernels

HASH = b"0123456789abcdef0123456789abcde\xff"  # no text


def call_of(kernels: Kernels | None, lowered: list[str], *, over_devices: bool = False) -> Any:
    """A function whose program has a kernel's call, lowered as JAX's rule would."""
    kernel = Primitive("kernel")
    kernel.def_abstract_eval(lambda x, **_: x)
    params = {"compiler_params": None, "meshes": (), "input_output_aliases": {0: 0}}
    jaxprs = (jax.make_jaxpr(jnp.sin)(1.0),)

    def rule(context: Any, x: Any, **params: Any) -> Any:
        lowered.append("a kernel")
        values = {
            "kernel_hash": ir.StringAttr.get(HASH),
            "module": ir.StringAttr.get(b"\x00text"),
            "use_custom_barrier": ir.BoolAttr.get(False),
            "uses_xla_collective_metadata": ir.BoolAttr.get(over_devices),
        }
        return mlir.custom_call(
            "mosaic_gpu_v2",
            result_types=[mlir.aval_to_ir_type(context.module_context, context.avals_out[0])],
            operands=[x],
            operand_layouts=[[1, 0]],
            result_layouts=[[1, 0]],
            backend_config=values,
            operand_output_aliases=params["input_output_aliases"],
            api_version=4,
        ).results

    own = rule if kernels is None else kernels.lower
    if kernels is not None:
        kernels._rule = rule
    mlir.register_lowering(
        kernel, lambda context, x: own(context, x, jaxprs=jaxprs, **params), "cpu"
    )
    return kernel.bind


def text_of(call: Any, *, columns: int = 3, scale: float = 1.0) -> str:
    x = jax.ShapeDtypeStruct((2, columns), jnp.float32)
    return str(jax.jit(lambda x: scale * call(x)).lower(x).as_text())


def test_a_kernel_of_two_programs_is_lowered_once_and_the_same() -> None:
    afresh: list[str] = []
    want = [text_of(call_of(None, afresh), scale=scale) for scale in (1.0, 2.0)]
    lowered: list[str] = []
    kernels = Kernels(lambda *_: None, None)
    call = call_of(kernels, lowered)
    assert [text_of(call, scale=scale) for scale in (1.0, 2.0)] == want
    assert (len(afresh), len(lowered)) == (2, 1)
    assert list(kernels.compiled) == [HASH]


def test_other_shapes_are_other_kernels() -> None:
    lowered: list[str] = []
    call = call_of(Kernels(lambda *_: None, None), lowered)
    assert "tensor<2x3xf32>" in text_of(call)
    assert "tensor<2x5xf32>" in text_of(call, columns=5)
    assert len(lowered) == 2


def test_what_several_devices_do_together_is_left_to_jax() -> None:
    lowered: list[str] = []
    kernels = Kernels(lambda *_: None, None)
    call = call_of(kernels, lowered, over_devices=True)
    assert text_of(call) == text_of(call)
    assert len(lowered) == 2
    assert not kernels.compiled


def test_a_kernel_that_does_not_compile_ahead_is_left_to_the_program() -> None:
    kernels = Kernels(lambda *_: None, None)
    assert "mosaic_gpu_v2" in text_of(call_of(kernels, []))  # which no CPU has
    assert isinstance(kernels.compiled[HASH].exception(timeout=60), Exception)


def test_it_begins_once(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "mpmd_map_mgpu_lowering_rule"
    monkeypatch.setattr(pallas_call_registration, name, rule := object())
    kernels_ahead.begin(None)
    kernels_ahead.begin(None)
    lower: Any = getattr(pallas_call_registration, name)
    assert lower.__self__._rule is rule


@pytest.mark.compile
@pytest.mark.parametrize("version", VERSIONS)
def test_a_program_finds_its_kernels_compiled(version: str) -> None:
    (found,) = printed(version, pathlib.Path(__file__).parent / "compile_kernels_ahead.py")
    assert found["kernels"] > 1
    assert found["lowered"] == found["compiled_ahead"] == found["kernels"]
    assert found["compiled_again"] == 0
    assert found["same_texts"]
