"""A program without its kernels' code, for a compiler that is asked of its memory alone.

What a kernel takes of the device's memory is its call's operands and results, which stay as they
are; making its code is most of what compiling an attention layer takes. XLA leaves a call alone of
which it knows nothing, where its option xla_gpu_mock_custom_calls allows that.
"""

import jax
from jaxlib.mlir import ir

_KERNELS = ("mosaic_gpu", "__gpu$xla.gpu.triton")  # how the calls of Pallas's kernels begin
_NOTHING = "left_out"


def leave_out(lowered: jax.stages.Lowered) -> jax.stages.Lowered:
    """The same program, which can no longer run; the one given is changed."""
    module = lowered.compiler_ir("stablehlo")
    assert module is not None

    def visit(operation: ir.Operation) -> ir.WalkResult:
        if operation.name == "stablehlo.custom_call":
            target = ir.StringAttr(operation.attributes["call_target_name"]).value
            if target.startswith(_KERNELS):
                nothing = ir.StringAttr.get(_NOTHING, module.context)
                operation.attributes["call_target_name"] = nothing
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return lowered
