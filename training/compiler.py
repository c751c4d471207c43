"""Options of XLA's compiler, given program by program, and where its programs are kept."""

from pathlib import Path

import jax

type Option = int | bool | str

# XLA tries out kernels for products on the device, with buffers as large as the program's: no help
# to a program that does not fit, nothing that a device which is not here could do, and what wins
# may differ the next time, so that a resumed run would. Without, it takes cuBLAS's own choice for
# products instead of tiles that it would have to try.
_UNTUNED: dict[str, Option] = {
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,
}

# What two devices of one process send each other goes by their copy engines: NCCL's kernels would
# take multiprocessors from attention's. Not run with several processes.
_BY_COPY_ENGINES: dict[str, Option] = {
    "xla_gpu_collective_permute_mode": "COLLECTIVES_PEER_MEMORY",
}


# Of a program that only its memory is asked of, and that is settled before code is made; calls that
# XLA does not know are let pass, as kernels' are left out.
_ONLY_MEMORY: dict[str, Option] = {
    "xla_backend_optimization_level": 0,
    "xla_gpu_mock_custom_calls": True,
}


def options(*, is_gpu: bool, runs: bool = True) -> dict[str, Option] | None:
    """What `jax.stages.Lowered.compile` takes as `compiler_options`.

    Args:
        is_gpu: of the device that it is compiled for.
        runs: whether it will run there.
    """
    if not is_gpu:
        return None
    if not runs:
        return _UNTUNED | _ONLY_MEMORY
    return _UNTUNED if jax.distributed.is_initialized() else _UNTUNED | _BY_COPY_ENGINES


def keep_programs(folder: Path) -> None:
    """From here on, what is compiled for a GPU is kept in a folder, where later starts find it.

    A folder that the user gave jax, in JAX_COMPILATION_CACHE_DIR, stays. On a CPU nothing is kept:
    programs there are for one kind of processor, and folders travel.
    """
    if jax.default_backend() != "gpu" or jax.config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
