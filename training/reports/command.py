"""The reports as train.py gives them: printed, stored in the run's folder and drawn."""

import time

from rich.console import Console

from training import plots, run_folder
from training.config import TrainConfig
from training.interrupt import StopRequest
from training.progress import say
from training.quiet import library_log
from training.reports import layer
from training.reports.layer_table import as_json, as_table, notes
from training.reports.place import Place
from training.run_folder import RunFolder

_COLUMNS = """\
temporary: the compiled step's temporary bytes, with the factor to the line above and bytes a token;
in all: with arguments and results"""
_MEASURED = "; measured: the same as the device's allocator gave it out"


def report_layer(
    config: TrainConfig, place: Place, folder: RunFolder, console: Console, stop: StopRequest
) -> None:
    """Memory and time of one attention layer's gradient; a stop leaves none."""
    started = time.perf_counter()
    measured = layer.what_is_measured(config.model)
    with console.status("memory report") as status, library_log(folder.library_log):
        cells = layer.measure(
            config.model,
            config.memory,
            place,
            stopped=lambda: bool(stop),
            status=lambda text: status.update(f"memory report: {text}"),
        )
    if stop:
        return
    seconds = time.perf_counter() - started
    say(console, f"memory report, {place.device_kind}, {measured}:")
    console.print(as_table(cells))
    was_measured = any(cell.peak_bytes is not None for cell in cells)
    say(console, _COLUMNS + (_MEASURED if was_measured else ""))
    for note in notes(cells):
        say(console, note)
    stored = as_json(cells, config.model, device=place.device_kind, seconds=seconds)
    run_folder.write_json(folder.memory_json, stored)
    plots.plot_memory(folder.memory_plot, cells, f"{place.device_kind}: {measured}")
