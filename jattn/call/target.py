"""The device that a call is traced for."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import jax

__all__ = ["Target", "asking_about", "current_target", "target_of"]

# Compute capability by device name, for a device that is not there to be asked: compiling on one
# machine for another. NVIDIA, "CUDA GPU compute capability", by data-centre and workstation part.
_CAPABILITY_OF_NAME = {
    "V100": (7, 0), "T4": (7, 5), "A100": (8, 0), "A30": (8, 0), "A10": (8, 6), "A10G": (8, 6),
    "A40": (8, 6), "RTX A6000": (8, 6), "RTX 3080": (8, 6), "RTX 3090": (8, 6), "L4": (8, 9),
    "L40": (8, 9), "L40S": (8, 9), "RTX 4080": (8, 9), "RTX 4090": (8, 9), "RTX 6000 Ada": (8, 9),
    "H100": (9, 0), "H200": (9, 0), "H800": (9, 0), "H20": (9, 0), "GH200": (9, 0),
    "B200": (10, 0), "GB200": (10, 0), "B300": (10, 3), "GB300": (10, 3), "RTX 5080": (12, 0),
    "RTX 5090": (12, 0),
    "RTX PRO 6000": (12, 0), "RTX PRO 5000": (12, 0), "RTX PRO 4500": (12, 0),
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A platform ("cpu", "gpu" for NVIDIA, "rocm", "tpu", ...) and what matters of its device.

    is_supposed: only asked about; what this process lacks to run there does not matter.
    """

    platform: str
    device_kind: str
    compute_capability: tuple[int, int] | None = None
    is_supposed: bool = False

    @property
    def is_nvidia(self) -> bool:
        """Whether CUDA kernels run there."""
        return self.platform == "gpu"

    def __str__(self) -> str:
        if self.compute_capability is None:
            return self.device_kind
        return (
            f"{self.device_kind}, compute capability {'.'.join(map(str, self.compute_capability))}"
        )


_supposed = jax.make_user_context(None)


@contextmanager
def asking_about(device: str | None) -> Generator[None]:
    """Makes a device the target inside, by "cpu" or a GPU's name; None leaves it as it is.

    Raises:
      ValueError: a name that is not known; the text has those that are.
    """
    if device is None:
        yield
        return
    with _supposed(_named(device)):
        yield


def _named(device: object) -> Target:
    text = device.strip() if isinstance(device, str) else ""
    if text.casefold() == "cpu":
        return Target("cpu", "cpu", is_supposed=True)
    words = [n for n in _CAPABILITY_OF_NAME if re.search(rf"\b{n}\b", text, re.IGNORECASE)]
    if not words:
        known = ", ".join(map(repr, ("cpu", *_CAPABILITY_OF_NAME)))
        raise ValueError(f"device must be one of {known}, or None; got {device!r}")
    name = max(words, key=len)
    return Target("gpu", f"NVIDIA {name}", _CAPABILITY_OF_NAME[name], is_supposed=True)


def target_of(arrays: object) -> Target:
    """The device of a tree of arrays, if they are there and committed to it; else the current one.

    What `jax.jit` traces is nowhere yet. Differentiated or mapped outside it, arrays still are.
    """
    values = [_value(x) for x in jax.tree.leaves(arrays)]
    known = [x for x in values if x is not None]
    committed = [x for x in known if x.committed]
    if not committed or len(known) < len(values) or _is_set():
        return current_target()
    return _of_device(next(iter(committed[0].devices())))


def _is_set() -> bool:
    """Whether a context says what the target is."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return _supposed.value is not None or abstract is not None


def _value(x: object) -> jax.Array | None:
    """The array inside, below what differentiates and maps it; None if there is none yet."""
    while isinstance(x, jax.core.Tracer):
        x = getattr(x, "primal", getattr(x, "val", None))
    return x if isinstance(x, jax.Array) else None


def current_target() -> Target:
    """The abstract mesh's device if one is set, else the default device; read while tracing."""
    supposed: Target | None = _supposed.value
    if supposed is not None:
        return supposed
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return Target(
            _platform(abstract.platform, abstract.device_kind),
            abstract.device_kind,
            _capability_of_name(abstract.device_kind),
        )
    return _of_device(_default_device())


def _of_device(device: jax.Device) -> Target:
    capability = getattr(device, "compute_capability", None)
    return Target(
        _platform(device.platform, device.device_kind),
        device.device_kind,
        _parse(capability) if isinstance(capability, str) else None,
    )


def _default_device() -> jax.Device:
    chosen = jax.config.jax_default_device
    if isinstance(chosen, str):
        return jax.devices(chosen)[0]
    if chosen is not None:
        return chosen
    return jax.devices()[0]


def _platform(platform: str, device_kind: str) -> str:
    if platform in ("gpu", "cuda", "rocm"):
        is_amd = platform == "rocm" or any(name in device_kind for name in ("AMD", "Radeon", "MI3"))
        return "rocm" if is_amd else "gpu"
    return platform


def _capability_of_name(device_kind: str) -> tuple[int, int] | None:
    matches = [name for name in _CAPABILITY_OF_NAME if name in device_kind]
    return _CAPABILITY_OF_NAME[max(matches, key=len)] if matches else None


def _parse(capability: str) -> tuple[int, int] | None:
    major, _, minor = capability.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
