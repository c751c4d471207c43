"""Options and fixtures of all tests."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import zlib

# The workers are as many as the cores; to be read, this comes before NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Interpreted kernels wait for each other on XLA's threads, which are else as few as the cores.
os.environ.setdefault("NPROC", "16")
# On a GPU most of a small test's time goes to trying kernels for the formula's products. On a CPU
# compiling takes it: half of that are MLIR's passes over every fusion, which XLA's older emitter of
# the same operations does without, and for small programs the rest is many threads.
os.environ["XLA_FLAGS"] = (
    "--xla_gpu_autotune_level=0 "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
    "--xla_cpu_parallel_codegen_split_count=1 "
) + os.environ.get("XLA_FLAGS", "")

import jax
import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.promotion import be_strict

# Programs of their own, which set what XLA reads: not to be imported in search of doctests.
collect_ignore_glob = [
    "*/absent.py",
    "*/compile_*.py",
    "compile_*.py",
    "*/make_checkpoints.py",
    "*/memcheck.py",
]

COMMON = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile(
    "fixed", derandomize=True, database=None, phases=[Phase.explicit, Phase.generate], **COMMON
)
settings.register_profile("explore", **COMMON)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed", type=int, default=0, help="seed of the random operands of the case table"
    )
    parser.addoption(
        "--thorough", action="store_true", help="also more calls of each kind on the CPU"
    )
    parser.addoption(
        "--fuzz", type=int, default=40, help="random calls of the GPU kernels, on a GPU"
    )


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
    be_strict()
    if jax.default_backend() == "cpu":
        # Compiling is most of the tests' time. The same operations, less of LLVM's work on each;
        # other processes compile alike, for the same bits.
        jax.config.update("jax_disable_most_optimizations", True)
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    elif config.option.markexpr == "gpu":  # others set where jax keeps programs
        share_programs(config)
    # Tracing makes many objects that live on: looking through them is a twentieth of the time.
    gc.set_threshold(100_000)


SHARED = "JATTN_TESTS_PROGRAMS"  # what workers know the folder by


def share_programs(config: pytest.Config) -> None:
    """On a GPU what one worker has compiled the others load: the references', and small ones."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.mkdtemp(prefix="jattn-tests-")
        os.environ[SHARED] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    jax.config.update("jax_compilation_cache_dir", os.environ[SHARED])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    # Of an entry that another worker is writing yet.
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache")


def left_out(config: pytest.Config) -> dict[str, str]:
    """The markers of what does not run here, and why."""
    found = {}
    if jax.default_backend() != "gpu" and "gpu" not in config.option.markexpr:
        found["gpu"] = "there is no NVIDIA GPU here"
    if not config.getoption("thorough") and "thorough" not in config.option.markexpr:
        found["thorough"] = "--thorough runs them, in half an hour on two cores"
    return found


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves some out, and keeps those of one case together, whose results they share."""
    markers = left_out(config)
    out = [item for item in items if any(map(item.get_closest_marker, markers))]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if not any(map(item.get_closest_marker, markers))]
    for item in items:
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        if case is not None:
            # Several files have one of that name, which has nothing to do with it.
            group = f"{case}-{zlib.crc32(repr(case).encode()):08x}"
            item.add_marker(pytest.mark.xdist_group(group))


def pytest_report_header(config: pytest.Config) -> list[str]:
    out = [f"left out, {marker}: {why}" for marker, why in left_out(config).items()]
    return [f"seed of the operands: {config.getoption('seed')} (--seed to change)", *out]


@pytest.fixture(scope="session")
def seed(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("seed"))
