"""GPUs that are not there, to compile for, and what compilers say meanwhile.

Imported before jax: it sets what jax's plugin reads.
"""

from __future__ import annotations

import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Literal

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AxisType, Mesh

GPUS = pathlib.Path(__file__).resolve().parents[1] / "training" / "gpus"
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
def held_back(which: Literal["stdout", "stderr"]) -> Iterator[Callable[[], str]]:
    """What is written there meanwhile, by C++ too; to be asked for afterwards."""
    descriptor = {"stdout": 1, "stderr": 2}[which]
    text: list[str] = []
    with tempfile.TemporaryFile() as file:
        getattr(sys, which).flush()
        own = os.dup(descriptor)
        os.dup2(file.fileno(), descriptor)
        try:
            yield lambda: text[0]
        finally:
            os.dup2(own, descriptor)
            os.close(own)
            file.seek(0)
            text.append(file.read().decode())
