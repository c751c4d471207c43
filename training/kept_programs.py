"""Programs of earlier starts, found again before anything is traced.

jax's own store of what it compiled is asked by a program's text, which takes Python as long as all
else in a later start. Here a program is found by what its text follows from: the model and the
optimiser, the shapes of its batches, the sources of this repository, the versions of what they
call, options of the compiler, and the device.
"""

import functools
import hashlib
import importlib.metadata
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize

import jattn
import models
import pallas_kernels
import training
from training import compiler

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")
_PLUGINS = tuple(
    name.format(cuda)
    for cuda in (12, 13)
    for name in ("jax-cuda{}-plugin", "jax-cuda{}-pjrt", "nvidia-cudnn-cu{}")
)
_READ_BY_JAX = ("JAX_", "XLA_", "JATTN_", "NVIDIA_", "CUDA_")
# Of jax's settings those that say where programs are kept, not what they are.
_NOT_OF_PROGRAMS = ("jax_compilation_cache", "jax_persistent_cache")


class KeptPrograms:
    """A folder of programs for this process's first device, each in a file of its own.

    Loading one runs what is in it, as with the store of jax beside it.

    Args:
        folder: where they are; made when the first is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, name: str, *of: Any) -> bool:
        """Whether the program called so is there."""
        return self._path(name, of).is_file()

    def get(
        self, compiled: Callable[[], jax.stages.Compiled], name: str, *of: Any
    ) -> jax.stages.Compiled:
        """The program called so, or, if it is not there or cannot be loaded, a new one.

        Args:
            compiled: makes it.
            name: what it does.
            of: all that its text follows from beside sources, versions and device; values whose
                `repr` says everything.
        """
        path = self._path(name, of)
        try:
            with path.open("rb") as file:
                program, arguments, results = pickle.load(file)
            loaded: jax.stages.Compiled = deserialize_and_load(
                program, arguments, results, execution_devices=[jax.local_devices()[0]]
            )
            return loaded
        except Exception:  # absent or damaged, or of a driver that is no longer there
            return compiled()

    def put(self, program: jax.stages.Compiled, name: str, *of: Any) -> None:
        """Keeps a program, unless it is there; where that fails the next start compiles it."""
        path = self._path(name, of)
        if path.is_file():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
                pickle.dump(serialize(program), file)
            os.replace(file.name, path)
        except (OSError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError):
            return

    def _path(self, name: str, of: tuple[Any, ...]) -> Path:
        key = hashlib.sha256(repr((_surroundings(), of)).encode()).hexdigest()
        return self.folder / f"{name}-{key[:32]}.program"


def for_gpu(folder: Path) -> KeptPrograms | None:
    """Those in a folder, or in that which the user gave jax; None where there is no GPU, jax is to
    keep nothing, or the user's folder is no path."""
    config = jax.config
    if jax.default_backend() != "gpu" or not config.jax_enable_compilation_cache:
        return None
    given = config.jax_compilation_cache_dir or str(folder)
    return None if "://" in given else KeptPrograms(Path(given))


@functools.cache
def _surroundings() -> tuple[Any, ...]:
    """All that a program follows from, beside what it is of."""
    device = jax.local_devices()[0]
    settings = sorted(
        (name, repr(value))
        for name, value in jax.config.values.items()
        if not name.startswith(_NOT_OF_PROGRAMS)
    )
    return (
        _sources(),
        *map(_version, (*_LIBRARIES, *_PLUGINS)),
        settings,
        sorted(pair for pair in os.environ.items() if pair[0].startswith(_READ_BY_JAX)),
        sorted((compiler.options(is_gpu=device.platform == "gpu") or {}).items()),
        device.client.platform_version,
        device.device_kind,
        *(getattr(device, fact, None) for fact in ("compute_capability", "core_count")),
    )


def _sources() -> str:
    text = hashlib.sha256()
    for package in (jattn, models, pallas_kernels, training):
        (folder,) = package.__path__
        for path in sorted(Path(folder).rglob("*.py")):
            text.update(path.relative_to(folder).as_posix().encode())
            text.update(hashlib.sha256(path.read_bytes()).digest())
    return text.hexdigest()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
