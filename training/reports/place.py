"""Where a report's programs are compiled for: devices of this process, or GPUs not here."""

import contextlib
import dataclasses
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AxisType, Mesh, NamedSharding, PartitionSpec

from training.errors import TrainingError
from training.free_memory import free_bytes

TargetName = Literal["a100", "b200", "h100", "h200"]

_ROOT = Path(__file__).resolve().parents[2]
_GPUS = _ROOT / "training" / "gpus"
_STARTED_FOR_TARGET = "JATTN_COMPILES_FOR"
# What jax.Device.memory_stats leaves of a GPU: XLA_PYTHON_CLIENT_MEM_FRACTION of environment.py.
_USABLE = 0.92
_AXIS = "sequence"


@dataclasses.dataclass(frozen=True)
class Place:
    """A device, there or not; or several of a kind, over which sequences are cut."""

    device_kind: str
    can_run: bool
    mesh: Mesh | None = None  # of the programs' arguments; None for the default device
    memory: int | None = None  # bytes, of a device that is not here

    @property
    def count(self) -> int:
        """How many devices."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def name(self) -> str:
        """In words."""
        return self.device_kind if self.count == 1 else f"{self.count} x {self.device_kind}"

    @property
    def is_gpu(self) -> bool:
        return not self.can_run or jax.default_backend() == "gpu"

    def free_bytes(self) -> int | None:
        """What a program may take now; None if unknown."""
        return free_bytes(jax.devices()[0]) if self.can_run else self.memory

    def whole(self, tree: Any) -> Any:
        """Arrays, or shapes of arrays, that each device has."""
        return self._placed(tree, PartitionSpec())

    def cut(self, tree: Any) -> Any:
        """The same of (batch, positions, ...), of which each device has its own positions."""
        return self._placed(tree, PartitionSpec(None, _AXIS))

    def _placed(self, tree: Any, spec: PartitionSpec) -> Any:
        if self.mesh is None:
            return tree
        sharding = NamedSharding(self.mesh, spec)

        def placed(x: Any) -> Any:
            if isinstance(x, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
            return jax.device_put(x, sharding)

        return jax.tree.map(placed, tree)


def here(count: int = 1) -> Place:
    """The device that JAX takes by itself, or so many of them."""
    found = jax.devices()
    mesh = None
    if count > 1:
        mesh = jax.make_mesh((count,), (_AXIS,), axis_types=(AxisType.Auto,), devices=found[:count])
    return Place(found[0].device_kind, can_run=True, mesh=mesh)


@contextlib.contextmanager
def place_of(target: TargetName | None, count: int = 1) -> Iterator[Place]:
    """Devices of this process, or GPUs by name, for which everything traced inside is meant.

    Raises:
        TrainingError: XLA's compiler for NVIDIA's GPUs is not there.
    """
    if target is None:
        yield here(count)
        return
    config = (_GPUS / f"{target}.txtpb").read_text(encoding="ascii")
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology=f"1x1x{count}", target_config=config
        )
    except (RuntimeError, NotImplementedError) as error:
        raise TrainingError(_missing(target)) from error
    kind = _fact(config, "name").strip('"')
    mesh = Mesh(
        topologies.make_mesh(topo=topology, mesh_shape=(count,), axis_names=(_AXIS,)).devices,
        (_AXIS,),
        axis_types=(AxisType.Auto,),
    )
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="cuda")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh.update(abstract_device=device)):
        yield Place(
            kind,
            can_run=False,
            mesh=mesh,
            memory=int(_USABLE * int(_fact(config, "device_memory_size"))),
        )


def start_again_with_compilers(argv: Sequence[str], target: str) -> None:
    """Replaces this process by one that has XLA's compiler for GPUs; returns once in that one.

    JAX finds its plugins when it is loaded; where there is no GPU they are in a folder of their
    own, since an environment with them would look for CUDA's libraries.

    Raises:
        TrainingError: that folder is missing, or the target is unknown.
    """
    if os.environ.get(_STARTED_FOR_TARGET) or target not in get_args(TargetName):
        return  # of an unknown target the parser of the command line has more to say
    folder = _ROOT / ".compilers" / jax.__version__
    own = importlib.util.find_spec("jax_cuda13_plugin") is not None
    if not own and not (folder / "jax_cuda13_plugin").is_dir():
        raise TrainingError(_missing(target))
    paths = [*([] if own else [str(folder)]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        _STARTED_FOR_TARGET: target,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }
    sys.stdout.flush()
    program = str(_ROOT / "train.py")
    os.execve(sys.executable, [sys.executable, program, *argv], environment)


def _missing(target: str) -> str:
    return (
        f"--target {target} needs XLA's compiler for NVIDIA's GPUs, jax-cuda13-plugin"
        f" {jax.__version__}: `sh scripts/compilers.sh` puts it into .compilers (1.5 GB, once)"
    )


def _fact(config: str, name: str) -> str:
    found = re.search(rf"^  {name}: (.+)$", config, flags=re.MULTILINE)
    assert found is not None
    return found[1]
