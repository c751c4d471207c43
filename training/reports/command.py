"""The reports as train.py gives them: printed, stored in the run's folder and drawn."""

import dataclasses
import time
from collections.abc import Callable, Sequence

from rich.console import Console

from training import plots, run_folder
from training.config import StepReportConfig, TrainConfig
from training.interrupt import StopRequest
from training.progress import say
from training.quiet import library_log
from training.reports import layer, longest, whole_step
from training.reports.cells import Cell, Watch, notes
from training.reports.place import Place
from training.reports.tables import as_json, as_table
from training.run_folder import RunFolder
from training.units import bytes_text, seconds_text

_LEGEND = """\
temporary: the compiled step's temporary bytes, with the factor to the line above and bytes a token;
in all: with arguments and results"""
_EACH = "; of each device"
_MEASURED = "; measured: the same as the device's allocator gave it out"


@dataclasses.dataclass(frozen=True)
class Screen:
    """What is written to, and what may ask to stop."""

    console: Console
    folder: RunFolder
    stop: StopRequest


def report_layer(config: TrainConfig, place: Place, screen: Screen) -> None:
    """Memory and time of one attention layer's gradient; a stop leaves none."""
    _cells(
        lambda watch: layer.measure(config.model, config.memory, place, watch),
        f"{place.name}, {layer.what_is_measured(config.model)}",
        "memory_scaling",
        place,
        screen,
    )


def report_step(
    config: TrainConfig, report: StepReportConfig, place: Place, screen: Screen
) -> None:
    """Memory and time of the whole training step; a stop leaves none."""
    _cells(
        lambda watch: whole_step.measure(config, report, place, watch),
        f"{place.name}, {whole_step.what_is_measured(config.model)}",
        "training_step",
        place,
        screen,
    )


def report_longest(config: TrainConfig, place: Place, screen: Screen) -> None:
    """The longest sequence that trains with blocks rematerialised; a stop leaves nothing."""
    name = config.model.attn_implementation
    model = whole_step.variant(config.model, name, rematerialized=True)
    config = dataclasses.replace(config, model=model)
    with (
        screen.console.status("longest sequence") as status,
        library_log(screen.folder.library_log),
    ):
        found = longest.find(config, place, _watch(screen, status.update, "longest sequence"))
    if found is None:
        return
    measured = whole_step.what_is_measured(config.model)
    of_each = " of each" if place.count > 1 else ""
    say(
        screen.console,
        f"longest sequence on {place.name}, {measured}, attention {name}, blocks"
        f" rematerialised: {found.sequence_length:,} tokens,"
        f" {bytes_text(found.total_bytes)}{of_each} a step of {bytes_text(found.free_bytes)} free;"
        f" {len(found.looked_at)} lengths compiled",
    )
    if found.note:
        say(screen.console, found.note)
    if found.seconds:
        peak = f", measured {bytes_text(found.peak_bytes)}" if found.peak_bytes else ""
        say(
            screen.console,
            f"two steps: {', '.join(map(seconds_text, found.seconds))}{peak}; loss"
            f" {', '.join(f'{loss:.4f}' for loss in found.losses)} nats per byte",
        )
    stored = {"device": place.name} | dataclasses.asdict(found)
    run_folder.write_json(screen.folder.longest_json, stored)


def _cells(
    measure: Callable[[Watch], Sequence[Cell]],
    measured: str,
    name: str,
    place: Place,
    screen: Screen,
) -> None:
    console, folder, started = screen.console, screen.folder, time.perf_counter()
    title = name.replace("_", " ")
    with console.status(title) as status, library_log(folder.library_log):
        cells = measure(_watch(screen, status.update, title))
    if screen.stop:
        return
    seconds = time.perf_counter() - started
    say(console, f"{title}, {measured}:")
    console.print(as_table(cells))
    was_measured = any(cell.peak_bytes is not None for cell in cells)
    each = _EACH if place.count > 1 else ""
    say(console, _LEGEND + each + (_MEASURED if was_measured else ""))
    for note in notes(cells):
        say(console, note)
    stored = as_json(cells, measured=measured, device=place.name, seconds=seconds)
    run_folder.write_json(folder.report_json(name), stored)
    plots.plot_memory(folder.report_plot(name), cells, measured)


def _watch(screen: Screen, update: Callable[[str], None], title: str) -> Watch:
    return Watch(lambda: bool(screen.stop), lambda text: update(f"{title}: {text}"))
