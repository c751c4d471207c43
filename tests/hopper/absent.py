"""H200s that are not there, to compile for. Imported before jax, it sets what the plugin reads."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AxisType, Mesh

ROOT = pathlib.Path(__file__).resolve().parents[2]


@contextmanager
def h200s(*shape: int) -> Iterator[Mesh]:
    """A mesh of them with axes "x" and "y", in which dispatch knows what it compiles for."""
    config = (ROOT / "training" / "gpus" / "h200.txtpb").read_text()
    topology = topologies.get_topology_desc(
        platform="cuda", topology=f"1x1x{prod(shape)}", target_config=config
    )
    names = ("x", "y")[: len(shape)]
    made = topologies.make_mesh(topo=topology, mesh_shape=shape, axis_names=names)
    mesh = Mesh(made.devices, names, axis_types=(AxisType.Auto,) * len(names))
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="cuda")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh.update(abstract_device=device)):
        yield mesh
