"""Options and fixtures of all tests."""

from __future__ import annotations

import os

# The workers are as many as the cores; to be read, this comes before NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Interpreted kernels wait for each other on XLA's threads, which are else as few as the cores.
os.environ.setdefault("NPROC", "16")
# On a GPU most of a small test's time goes to trying kernels for the formula's products.
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 " + os.environ.get("XLA_FLAGS", "")

import jax
import pytest
from hypothesis import HealthCheck, Phase, settings

# Programs of their own, which set what XLA reads: not to be imported in search of doctests.
collect_ignore_glob = ["*/absent.py", "*/compile_*.py", "*/memcheck.py"]

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
        "--fuzz", type=int, default=40, help="random calls of the GPU kernels, on a GPU"
    )


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what needs a GPU where there is none, unless it is what was asked for."""
    if jax.default_backend() == "gpu" or "gpu" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = [f"seed of the operands: {config.getoption('seed')} (--seed to change)"]
    if jax.default_backend() != "gpu":
        lines.append("tests of GPU kernels on a GPU are left out: there is no NVIDIA GPU here")
    return lines


@pytest.fixture(scope="session")
def seed(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("seed"))
