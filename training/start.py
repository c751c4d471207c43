"""A new run's programs and its state before the first step.

Layers compiled apart are faster than a loop over one, and take more memory, as XLA orders all of
them as one piece. How much is known once the update is compiled, so that is when a run whose update
fits in a loop alone takes the loop instead:

    compile    loss of held-out text, update      only then: both, in a loop
    run            the first measurement    fits?               the first measurement
"""

import dataclasses

import numpy as np

from training import processes
from training.ahead import Programs
from training.config import TrainConfig
from training.data import Corpus, Text
from training.devices import Devices
from training.free_memory import free_bytes
from training.kept_programs import KeptPrograms
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


def programs_of(config: TrainConfig, devices: Devices, kept: KeptPrograms | None) -> Programs:
    """Begins to compile a new run's programs, or to load those kept, for which shapes are enough.

    Not of a folder's model, whose tokens are in the corpus.
    """
    length = config.data.sequence_length
    any_text = Text(np.zeros(length + 2, np.uint8), np.zeros(1, np.int64))
    programs = Programs(config, devices, kept)
    _prepare_new(programs, config, any_text, any_text)
    return programs


def begin(
    config: TrainConfig,
    corpus: Corpus,
    devices: Devices,
    kept: KeptPrograms | None = None,
    programs: Programs | None = None,
) -> Start:
    """A new run's programs and its state.

    Args:
        config: the run's.
        corpus: its text or tokens.
        devices: where it runs.
        kept: programs of earlier starts.
        programs: its own, if they have been begun.
    """
    if programs is None:
        programs = Programs(config, devices, kept)
        _prepare_new(programs, config, corpus.train, corpus.held_out)
    state = programs.initial_state()
    if config.fine_tune.model is not None or config.model.scan_blocks:
        return Start(config, programs, state)
    free = _free(devices)
    if free is None:
        return Start(config, programs, state)
    batch = batch_of(config, corpus.train, step=1)
    held_out = next(held_out_batches(config, corpus.held_out))
    loss = None
    if _fits(programs.memory_of_held_out_loss(held_out), free):  # runs while the update compiles
        loss = programs.held_out_loss(state, held_out_batches(config, corpus.held_out))
    apart = programs.memory_of_update(batch)
    if _fits(apart, free):
        return Start(config, programs, state, loss)
    looped = dataclasses.replace(config, model=dataclasses.replace(config.model, scan_blocks=True))
    in_a_loop = Programs(looped, devices, kept)
    _prepare(in_a_loop, looped, corpus)
    memory = in_a_loop.memory_of_update(batch)
    if not _fits(memory, free):  # the error of what then runs says what else takes less
        in_a_loop.close()
        return Start(config, programs, state, loss)
    programs.keep()
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
    programs.prepare_update(batch_of(config, corpus.train, step=1))
    programs.prepare_held_out_loss(next(held_out_batches(config, corpus.held_out)))


def _prepare_new(programs: Programs, config: TrainConfig, train: Text, held_out: Text) -> None:
    batch = batch_of(config, train, step=1)
    if not programs.is_kept(batch):
        programs.prepare_update(batch)  # what takes longest is begun first
    programs.prepare_initial_state()
    programs.prepare_held_out_loss(next(held_out_batches(config, held_out)))
    programs.prepare_update(batch)


def _fits(memory: Memory, free: int) -> bool:
    return memory.added <= _USABLE * free
