"""A new run's programs and its state before the first step.

Layers compiled apart are faster than a loop over one, and take more memory, as XLA orders all of
them as one piece. How much is known once the update is compiled, so that is when a run whose update
fits in a loop alone takes the loop instead:

    compile    loss of held-out text, update      only then: both, in a loop
    run            the first measurement    fits?               the first measurement
"""

import dataclasses

from training import processes
from training.ahead import Programs
from training.config import TrainConfig
from training.data import Corpus
from training.devices import Devices
from training.free_memory import free_bytes
from training.loop import batch_of, held_out_batches
from training.program_memory import Memory
from training.step import TrainState, abstract_state
from training.units import bytes_text

_USABLE = 0.97  # of free memory: the temporary bytes have to be one piece of it


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run begins with."""

    config: TrainConfig  # the one given, or with its layers in a loop
    programs: Programs
    state: TrainState
    held_out_loss: float | None = None  # nats, of that state, if it has been measured
    note: str = ""  # why the configuration is another


def begin(config: TrainConfig, corpus: Corpus, devices: Devices) -> Start:
    """Compiles a new run's programs, and makes its state."""
    programs = Programs(config, devices)
    programs.prepare_initial_state()
    _prepare(programs, config, corpus)
    state = programs.initial_state()
    if config.fine_tune.model is not None or config.model.scan_blocks:
        return Start(config, programs, state)
    free = _free(devices)
    if free is None:
        return Start(config, programs, state)
    batch, held_out = batch_of(config, corpus, step=1), next(held_out_batches(config, corpus))
    loss = None
    if _fits(programs.memory_of_held_out_loss(held_out), free):  # runs while the update compiles
        loss = programs.held_out_loss(state, held_out_batches(config, corpus))
    apart = programs.memory_of_update(batch)
    if _fits(apart, free):
        return Start(config, programs, state, loss)
    looped = dataclasses.replace(config, model=dataclasses.replace(config.model, scan_blocks=True))
    in_a_loop = Programs(looped, devices)
    _prepare(in_a_loop, looped, corpus)
    memory = in_a_loop.memory_of_update(batch)
    if not _fits(memory, free):  # the error of what then runs says what else takes less
        in_a_loop.close()
        return Start(config, programs, state, loss)
    programs.close()
    note = (
        f"one block is compiled and looped over: a step takes {bytes_text(memory.added)} beside the"
        f" weights, with blocks apart {bytes_text(apart.added)} of {bytes_text(free)} free"
    )
    state = dataclasses.replace(state, graph=abstract_state(looped).graph)
    return Start(looped, in_a_loop, state, note=note)


def _free(devices: Devices) -> int | None:
    """Bytes that are free on each device, other processes' too; None if unknown."""
    known = [free_bytes(device) for device in devices.here]
    own = None if None in known else min(free for free in known if free is not None)
    said = processes.gather("" if own is None else str(own))
    return None if "" in said else min(map(int, said))


def _prepare(programs: Programs, config: TrainConfig, corpus: Corpus) -> None:
    programs.prepare_update(batch_of(config, corpus, step=1))
    programs.prepare_held_out_loss(next(held_out_batches(config, corpus)))


def _fits(memory: Memory, free: int) -> bool:
    return memory.added <= _USABLE * free
