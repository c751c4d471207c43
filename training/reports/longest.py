"""The longest sequence that trains here, by bisection of compiled memory, and the proof of it."""

import dataclasses
import math
import time
from collections.abc import Callable

import jax

from training.config import TrainConfig
from training.errors import TrainingError
from training.reports import whole_step
from training.reports.cells import Watch
from training.reports.place import Place
from training.reports.programs import build, out_of_memory
from training.reports.running import run
from training.step import TrainState
from training.units import bytes_text

_GRAIN = 1024  # tokens
_USABLE = 0.97  # of free memory: the temporary bytes have to be one piece of it
_MOST = 1 << 24  # tokens
_SHORTER = 0.97  # of a length whose proof ran out of memory, for the next
_PROOFS = 3
_MOST_ON_CPU = 1 << 15  # tokens: two steps of the cpu preset take some minutes


@dataclasses.dataclass(frozen=True)
class Longest:
    """What was found, and what two steps of that length showed where they can run."""

    sequence_length: int
    total_bytes: int  # of one step, as the compiler says
    free_bytes: int
    looked_at: dict[int, int | None]  # every length compiled: bytes, None where that failed
    seconds: tuple[float, ...] = ()  # of each step
    losses: tuple[float, ...] = ()  # nats per byte, before each step
    peak_bytes: int | None = None  # the allocator's account
    note: str = ""


def find(config: TrainConfig, place: Place, watch: Watch) -> Longest | None:
    """Searches, then trains two steps of what was found; None once a stop was asked for.

    Raises:
        TrainingError: nothing fits, or how much memory there is is not known.
    """
    free = place.free_bytes()
    if free is None:
        raise TrainingError(f"how much memory is free on {place.device_kind} is not known")
    looked_at: dict[int, int | None] = {}

    def bytes_at(length: int) -> int | None:
        if length not in looked_at:
            watch.status(f"compiling T = {length:,}")
            changed = whole_step.of_length(config, length)
            built = build(lambda: whole_step.lower(changed, place), place)
            if built.refusal:
                raise TrainingError(built.refusal)
            looked_at[length] = None if built.memory is None else built.memory.total
        return looked_at[length]

    grain = math.lcm(_GRAIN, place.count)
    length = search(
        bytes_at,
        int(_USABLE * free),
        start=config.data.sequence_length,
        grain=grain,
        stopped=watch.stopped,
    )
    if watch.stopped():
        return None
    if not length:
        least = f"{grain:,} tokens need {bytes_text(looked_at[grain] or 0)}"
        raise TrainingError(f"nothing trains in {bytes_text(free)}: {least}")
    found = Longest(length, looked_at[length] or 0, free, looked_at)
    if is_too_slow(place, length):
        return dataclasses.replace(found, note="two steps of it would take a CPU too long")
    for _ in range(_PROOFS if place.can_run else 0):
        watch.status(f"two steps at T = {length:,}")
        try:
            return _proved(config, found, place)
        except jax.errors.JaxRuntimeError as error:
            note = f"T = {length:,} ran out of memory: {out_of_memory(error)}"
        length = int(_SHORTER * length) // grain * grain
        found = dataclasses.replace(
            found, sequence_length=length, total_bytes=bytes_at(length) or 0, note=note
        )
    return found


def is_too_slow(place: Place, length: int) -> bool:
    """Whether steps of this length end too late to be waited for: their time is quadratic."""
    return not place.is_gpu and length > _MOST_ON_CPU


def search(
    bytes_at: Callable[[int], int | None],
    budget: int,
    *,
    start: int,
    grain: int = _GRAIN,
    stopped: Callable[[], bool] = lambda: False,
) -> int:
    """The most tokens, a multiple of the grain, that fit the budget; 0 if none do.

    A bisection whose next length is where the line between the bracket's ends meets the budget, as
    memory nearly is a line, and every third time its middle.

    Args:
        bytes_at: memory at a length, which does not fall as that grows; None is too much.
        budget: bytes there are.
        start: the first length to look at.
        grain: what lengths are multiples of.
        stopped: whether to give up, and return what is known to fit.
    """
    most = _MOST // grain * grain
    fits, too_long = (0, 0), (0, 0)  # length and bytes of the ends; a length of 0 is unknown
    length, guesses = max(grain, start // grain * grain), 0
    while not stopped():
        count = bytes_at(length)
        if count is not None and count <= budget:
            fits = (length, count)
        else:
            too_long = (length, count or 2 * budget)
        if fits[0] >= most or (too_long[0] and too_long[0] - fits[0] <= grain):
            break
        guesses += 1
        if not too_long[0]:
            length = min(int(fits[0] * budget / fits[1]) // grain + 1, 16 * fits[0] // grain)
            length = min(max(length * grain, fits[0] + grain), most)
            continue
        share = 0.5 if guesses % 3 == 0 else (budget - fits[1]) / (too_long[1] - fits[1])
        length = fits[0] + int(share * (too_long[0] - fits[0])) // grain * grain
        length = min(max(length, fits[0] + grain), too_long[0] - grain)
    return fits[0]


def _proved(config: TrainConfig, found: Longest, place: Place) -> Longest:
    """Two steps of that length on the device.

    Raises:
        jax.errors.JaxRuntimeError: of memory, mostly.
    """
    changed = whole_step.of_length(config, found.sequence_length)
    built = build(lambda: whole_step.lower(changed, place), place)
    tokens = place.cut(jax.device_put(whole_step.random_tokens(found.sequence_length)))
    seconds: list[float] = []
    losses: list[float] = []

    def two_steps(state: TrainState) -> TrainState:
        for _ in range(2):
            started = time.perf_counter()
            state, scalars = jax.block_until_ready(built.program(state, tokens, tokens, None))
            seconds.append(time.perf_counter() - started)
            losses.append(float(scalars.loss))
            state = place.whole(state)
        return state

    measured = run(
        two_steps,
        lambda: whole_step.first_state(changed, place),
        expected_bytes=found.total_bytes,
        deadline=0.0,
    )
    return dataclasses.replace(
        found, seconds=tuple(seconds), losses=tuple(losses), peak_bytes=measured.peak_bytes
    )
