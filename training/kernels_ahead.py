"""Mosaic's kernels, each lowered once for all programs of a process and compiled at once.

XLA has a program's kernels compiled one after another, where it comes to their calls, which is
after its passes. Mosaic finds a kernel again by its text, for whichever program it was compiled. So
each gets a small program of its own as soon as its text is there, compiled in a thread:

    lower      update: forward, backward, the rest | loss of held-out text (forward is there)
    compile                   forward ---------
                                        backward ---------
                                                   update ----------------
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
from jax._src.interpreters import mlir
from jax._src.pallas.mosaic_gpu import pallas_call_registration
from jaxlib.mlir import ir

_RULE = "mpmd_map_mgpu_lowering_rule"
_CALL = "mosaic_gpu_v2"
_CONFIG = "mhlo.backend_config"
_OVER_DEVICES = "uses_xla_collective_metadata"
_AT_ONCE = 4


@dataclass(frozen=True)
class _Kernel:
    """A lowered call of a kernel, apart from any program."""

    of: Any  # what it was lowered from: kept, as it is known by its identity
    config: dict[str, bytes | bool]
    aliases: dict[int, int]
    arguments: Sequence[Any]  # shapes and dtypes
    results: Sequence[Any]

    def call(self, context: mlir.LoweringRuleContext, operands: Sequence[Any]) -> Any:
        """The same call in another program."""
        return mlir.custom_call(
            _CALL,
            result_types=[mlir.aval_to_ir_type(context.module_context, x) for x in self.results],
            operands=operands,
            operand_layouts=[range(x.ndim)[::-1] for x in self.arguments],
            result_layouts=[range(x.ndim)[::-1] for x in self.results],
            backend_config={name: _attribute(value) for name, value in self.config.items()},
            operand_output_aliases=self.aliases,
            api_version=4,
        ).results

    def compile(
        self, options: dict[str, Any] | None, place: jax.sharding.Sharding | None
    ) -> jax.stages.Compiled:
        """The call as a program."""
        call = jax.ffi.ffi_call(
            _CALL,
            [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in self.results],
            input_output_aliases=self.aliases,
        )
        arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in self.arguments]
        program = jax.jit(lambda *operands: call(*operands, **self.config)).lower(*arguments)
        return program.compile(compiler_options=options)


class Kernels:
    """Stands before JAX's lowering of a kernel's call.

    Args:
        rule: that lowering.
        options: of the compiler; see `training.compiler.options`.
        place: what kernels are compiled for; None for the default device.
    """

    def __init__(
        self,
        rule: Callable[..., Any],
        options: dict[str, Any] | None,
        place: jax.sharding.Sharding | None = None,
    ) -> None:
        self._rule = rule
        self._options, self._place = options, place
        self._pool = ThreadPoolExecutor(max_workers=_AT_ONCE)
        self._known: dict[Any, _Kernel] = {}
        self.compiled: dict[Any, Future[Any]] = {}  # by the text's hash; none waits for them

    def lower(self, context: mlir.LoweringRuleContext, *operands: Any, **params: Any) -> Any:
        """In place of the rule: what a kernel was lowered to before, or what the rule makes."""
        shapes: Any = (context.avals_in, context.avals_out)
        said = (params["compiler_params"], params["meshes"], params["input_output_aliases"])
        key = (
            *map(id, params["jaxprs"]),
            *(tuple((x.shape, x.dtype) for x in each) for each in shapes),
            repr(said),
        )
        if key in self._known:
            return self._known[key].call(context, operands)
        results = self._rule(context, *operands, **params)
        kernel = _kernel(params, results, context)
        if kernel is not None:
            self._known[key] = kernel
            if kernel.config["kernel_hash"] not in self.compiled:
                self.compiled[kernel.config["kernel_hash"]] = self._pool.submit(
                    kernel.compile, self._options, self._place
                )
        return results


def begin(options: dict[str, Any] | None) -> None:
    """From here on, kernels that are lowered are compiled too, with these options."""
    rule = getattr(pallas_call_registration, _RULE)
    if not isinstance(getattr(rule, "__self__", None), Kernels):
        setattr(pallas_call_registration, _RULE, Kernels(rule, options).lower)


def _kernel(
    params: dict[str, Any], results: Any, context: mlir.LoweringRuleContext
) -> _Kernel | None:
    """What was lowered, unless it is more than one call, or one of several devices together."""
    call = results[0].owner
    shapes = (context.avals_in, context.avals_out)
    is_all = (len(call.operands), len(call.results)) == tuple(map(len, shapes))
    if not is_all or _CONFIG not in call.attributes:
        return None
    named: Any = ir.DictAttr(call.attributes[_CONFIG])
    config = {each.name: _value(each.attr) for each in named}
    if config.get(_OVER_DEVICES):
        return None
    return _Kernel(params["jaxprs"], config, dict(params["input_output_aliases"]), *shapes)


def _value(attribute: Any) -> bytes | bool:
    if isinstance(attribute, ir.StringAttr):
        return attribute.value_bytes
    return bool(attribute.value)


def _attribute(value: bytes | bool) -> ir.Attribute:
    return ir.BoolAttr.get(value) if isinstance(value, bool) else ir.StringAttr.get(value)
