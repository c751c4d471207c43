"""GPUs that are not there, to compile for. Imported before jax, it sets what XLA reads."""

from __future__ import annotations

import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod

# The assembler's words come through XLA's log, and only where something is spilled.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"
os.environ["XLA_FLAGS"] = "--xla_gpu_ptx_compiler_extra_flags=-v"

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AxisType, Mesh

GPUS = pathlib.Path(__file__).resolve().parents[2] / "training" / "gpus"
DEVICES = {
    "h200": ("NVIDIA H200", GPUS / "h200.txtpb"),
    "a100": ("NVIDIA A100-SXM4-80GB", GPUS / "a100.txtpb"),
    "b200": ("NVIDIA B200", GPUS / "b200.txtpb"),
    "l4": ("NVIDIA L4", GPUS / "l4.txtpb"),  # the shared memory of a workstation's GPU
}


@contextmanager
def gpus(device: str, *shape: int) -> Iterator[Mesh]:
    """A mesh of absent GPUs with axes "x" and "y", in which dispatch knows what it compiles for."""
    kind, path = DEVICES[device]
    topology = topologies.get_topology_desc(
        platform="cuda", topology=f"1x1x{prod(shape)}", target_config=path.read_text()
    )
    names = ("x", "y")[: len(shape)]
    made = topologies.make_mesh(topo=topology, mesh_shape=shape, axis_names=names)
    mesh = Mesh(made.devices, names, axis_types=(AxisType.Auto,) * len(names))
    absent = AbstractDevice(device_kind=kind, num_cores=None, platform="cuda")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh.update(abstract_device=absent)):
        yield mesh


@contextmanager
def standard_error() -> Iterator[Callable[[], str]]:
    """What is written to it meanwhile, by XLA too."""
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        own = os.dup(2)
        os.dup2(file.fileno(), 2)
        text: list[str] = []
        try:
            yield lambda: text[0]
        finally:
            os.dup2(own, 2)
            os.close(own)
            file.seek(0)
            text.append(file.read().decode())
