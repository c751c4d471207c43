"""Options of XLA's compiler, given program by program."""

# XLA tries out kernels for products on the device, with buffers as large as the program's: no help
# to a program that does not fit, nothing that a device which is not here could do, and what wins
# may differ the next time, so that a resumed run would. Without, it takes cuBLAS's own choice for
# products instead of tiles that it would have to try.
_UNTUNED: dict[str, int | bool] = {
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,
}


def options(*, is_gpu: bool) -> dict[str, int | bool] | None:
    """What `jax.stages.Lowered.compile` takes as `compiler_options`."""
    return dict(_UNTUNED) if is_gpu else None
