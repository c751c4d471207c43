"""A layer's kernels lowered in processes of their own, while this one traces the model.

Lowering them is half of what Python does before XLA has its program, and Python does one thing at a
time. So the trainer starts a process for each kernel of an attention layer together with itself,
and tells them the layer's shapes once it knows them:

    trainer     import ...............  ask | trace | lower the update: the kernels are there
    forward's   import jax, jattn         | trace a layer, lower forward  |
    backward's  import jax, jattn         | trace a layer, lower backward |

What they make is found by the kernel's jaxpr and shapes, and is what the trainer would have made.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pickle
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from training import environment

_COMMAND = ("-m", "training.kernels_beside")
_PROCESSES = 2  # forward and backward; what is left takes little
_FEWEST_CORES = 8
_LONGEST = 10.0  # seconds that a kernel is waited for before this process lowers it itself
_ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Layer:
    """The call of attention in each layer of a model."""

    device_kind: str
    query: tuple[int, int, int, int]
    key: tuple[int, int, int, int]
    dtype: str
    is_packed: bool
    implementation: Any  # as `jattn.dot_product_attention` takes it


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A kernel's call, as it is sent."""

    name: str  # see `name_of`
    config: dict[str, bytes | bool]
    aliases: dict[int, int]
    arguments: Sequence[Any]  # jax.ShapeDtypeStruct
    results: Sequence[Any]


def name_of(params: dict[str, Any], arguments: Sequence[Any], results: Sequence[Any]) -> str:
    """What a kernel computes: its jaxpr, shapes and parameters; the same in all processes."""
    shapes = [[(x.shape, str(x.dtype)) for x in each] for each in (arguments, results)]
    said = (params["compiler_params"], params["meshes"], params["input_output_aliases"])
    known: dict[int, str] = {}
    return _hash([*(_name_of_jaxpr(x, known) for x in params["jaxprs"]), repr((shapes, said))])


def _name_of_jaxpr(jaxpr: Any, known: dict[int, str]) -> str:
    """Of its text, as if no two parts of it were one object: what is one follows from what else was
    traced before."""
    if id(jaxpr) not in known:
        numbers: dict[Any, str] = {}

        def named(variable: Any) -> str:
            if hasattr(variable, "val"):
                return f"{variable.val!r}:{variable.aval}"
            return numbers.setdefault(variable, f"{len(numbers)}:{variable.aval}")

        lines = [" ".join(map(named, (*jaxpr.constvars, *jaxpr.invars)))]
        for equation in jaxpr.eqns:
            said = (f"{key}={_said(x, known)}" for key, x in sorted(equation.params.items()))
            operands, outcomes = (map(named, x) for x in (equation.invars, equation.outvars))
            lines.append(" ".join([*outcomes, "=", str(equation.primitive), *said, *operands]))
        lines.append(" ".join(map(named, jaxpr.outvars)))
        known[id(jaxpr)] = _hash(lines)
    return known[id(jaxpr)]


def _said(value: Any, known: dict[int, str]) -> str:
    """A parameter; what it hides in an address of this process's memory is found in no other."""
    if hasattr(value, "eqns"):
        inner = _name_of_jaxpr(getattr(value, "jaxpr", value), known)
        return f"{inner}{getattr(value, 'consts', ())!r}"
    if isinstance(value, tuple | list):
        return f"({', '.join(_said(x, known) for x in value)})"
    if isinstance(value, types.FunctionType):  # made while tracing: one of a place in the source
        inside = [cell.cell_contents for cell in value.__closure__ or ()]
        place = f"{value.__module__}.{value.__qualname__}:{value.__code__.co_firstlineno}"
        return f"{place}{_said([*inside, value.__defaults__, value.__kwdefaults__], known)}"
    return repr(value)


def _hash(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class Beside:
    """The processes, waiting to be asked."""

    def __init__(self, count: int = _PROCESSES) -> None:
        settings = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
        settings["PYTHONPATH"] = os.pathsep.join(
            filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))
        )
        self._processes = [
            subprocess.Popen(
                [sys.executable, *_COMMAND, str(number), str(count)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=settings,
            )
            for number in range(count)
        ]
        self._changed = threading.Condition()
        self._found: dict[str, Lowered] = {}
        self._at_work = 0

    def ask(self, layer: Layer, found: Callable[[Lowered], None]) -> None:
        """Has a layer's kernels lowered; each is given to `found` in a thread."""
        self._at_work = len(self._processes)
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                pickle.dump(layer, process.stdin)
                process.stdin.close()
            threading.Thread(target=self._read, args=(process, found), daemon=True).start()

    def find(self, name: str) -> Lowered | None:
        """The kernel called so, once it is lowered; None if it is none of theirs."""
        with self._changed:
            self._changed.wait_for(lambda: name in self._found or not self._at_work, _LONGEST)
            return self._found.get(name)

    def close(self) -> None:
        """Lets those end that were not asked."""
        for process in self._processes:
            if process.stdin is not None and not process.stdin.closed:
                threading.Thread(target=process.communicate, daemon=True).start()

    def _read(self, process: subprocess.Popen[bytes], found: Callable[[Lowered], None]) -> None:
        assert process.stdout is not None
        try:
            with process.stdout as answers:
                while True:
                    kernel: Lowered = pickle.load(answers)
                    found(kernel)
                    with self._changed:
                        self._found[kernel.name] = kernel
                        self._changed.notify_all()
        except Exception:  # it has ended, or failed: the trainer then lowers by itself
            pass
        finally:
            process.wait()
            with self._changed:
                self._at_work -= 1
                self._changed.notify_all()


_SMALL = Layer("NVIDIA H100 80GB HBM3", (1, 256, 2, 128), (1, 256, 2, 128), "bfloat16", True, None)
_started: list[Beside] = []


def start() -> None:
    """Starts the processes, where there is a GPU to train on and cores are free."""
    is_there = any(Path("/dev").glob("nvidia[0-9]*"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    is_run = environment.asks_for_device() and not any(x.startswith("--report") for x in sys.argv)
    if is_run and is_there and cores >= _FEWEST_CORES:
        _started.append(Beside())


def take() -> Beside | None:
    """The processes that were started, once."""
    return _started.pop() if _started else None


def main(number: int, count: int, answers: IO[bytes]) -> None:
    """Lowers each count-th of the kernels that a layer read from standard input has."""
    import jax
    import jax.numpy as jnp
    from jax._src.interpreters import mlir
    from jax._src.pallas.mosaic_gpu import pallas_call_registration
    from jax.sharding import AbstractDevice, AbstractMesh

    import jattn
    from training import kernel_text, kernels_ahead

    kernel_text.leave_out_counts()
    rule = getattr(pallas_call_registration, kernels_ahead.RULE)
    names: list[str] = []

    def lower(context: mlir.LoweringRuleContext, *operands: Any, **params: Any) -> Any:
        name = name_of(params, context.avals_in, context.avals_out)
        if name not in names:
            names.append(name)
            if names.index(name) % count == number:
                results = rule(context, *operands, **params)
                kernel = kernels_ahead.kernel_of(params, results, context)
                if kernel is not None:
                    shapes = (
                        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in each]
                        for each in (kernel.arguments, kernel.results)
                    )
                    pickle.dump(Lowered(name, kernel.config, kernel.aliases, *shapes), answers)
                    answers.flush()
                return results
        types = [mlir.aval_to_ir_type(context.module_context, x) for x in context.avals_out]
        return mlir.custom_call("another's", result_types=types, operands=operands).results

    def traced(layer: Layer) -> jax.stages.Traced:
        query, key = (
            jax.ShapeDtypeStruct(x, jnp.dtype(layer.dtype)) for x in (layer.query, layer.key)
        )
        ids = jax.ShapeDtypeStruct(layer.query[:2], jnp.int32) if layer.is_packed else None
        device = AbstractDevice(device_kind=layer.device_kind, num_cores=None, platform="cuda")
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            return jax.jit(functools.partial(gradient, layer.implementation)).trace(
                query, key, key, ids
            )

    def gradient(implementation: Any, query: Any, key: Any, value: Any, ids: Any) -> Any:
        def attended(query: Any, key: Any, value: Any) -> Any:
            return jattn.dot_product_attention(
                query,
                key,
                value,
                is_causal=True,
                query_segment_ids=ids,
                key_value_segment_ids=ids,
                implementation=implementation,
            )

        out, pull = jax.vjp(attended, query, key, value)
        return out, pull(out)

    setattr(pallas_call_registration, kernels_ahead.RULE, lower)
    traced(_SMALL)  # loads what is loaded then, while the trainer still does
    layer: Layer = pickle.load(sys.stdin.buffer)
    device = AbstractDevice(device_kind=layer.device_kind, num_cores=None, platform="cuda")
    of_layer = traced(layer)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        of_layer.lower(lowering_platforms=("cuda",))


if __name__ == "__main__":
    from training import kernels_beside  # under this name what is sent is known to the trainer

    own = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries say is none of the answers
    kernels_beside.main(int(sys.argv[1]), int(sys.argv[2]), own)
