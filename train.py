"""Trains a transformer on real text and reports how its attention's memory scales.

python train.py                              sized for this machine, on the standard library
python train.py --data PATH --steps 1000     on any file or folder
python train.py --model FOLDER               fine-tunes a folder in Hugging Face's format
python train.py --resume runs/NAME           exactly as if it had not stopped
python train.py --sequence-parallel 2        with each sequence cut over two devices
python train.py --coordinator-address auto   in several processes, as Slurm and others start them
python train.py --report memory              memory and time of attention at growing lengths
python train.py --report step                the same of the whole training step
python train.py --report longest             the longest sequence that trains, and two steps of it
python train.py --target h100                any of them for a GPU that is not here, compiled only
python train.py --help                       every option
"""

from training import environment  # isort: skip  (what jax reads when loaded)

if __name__ == "__main__":
    environment.keep_all()
    environment.open_device()

import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from signal import Signals
from typing import Any

import jax
from rich.console import Console

from training import (
    cli,
    compiler,
    fine_tuning,
    kept_programs,
    kernel_text,
    kernels_ahead,
    plots,
    processes,
    run_folder,
    start,
)
from training.ahead import Programs, is_kept
from training.checkpoints import Checkpoints
from training.config import DataConfig, TrainConfig
from training.data import Corpus, first_long_step, load_corpus
from training.devices import Devices, check_count, check_lengths, own
from training.errors import REFUSALS, AgreedError, one_line
from training.interrupt import stop_on_signals
from training.kept_programs import KeptPrograms
from training.loop import Outputs, train
from training.progress import TrainingProgress, make_console, say
from training.reports.command import Screen, report_layer, report_longest, report_step
from training.reports.place import here, place_of, start_again_with_compilers
from training.run_folder import MetricsLog, RunFolder, read_metrics
from training.step import TrainState, check_model_runs, parameter_count
from training.tokens import tokenized


def main(argv: Sequence[str] | None = None) -> int:
    """Does what the arguments ask; returns 0, 2 for an error, or 128 + n after signal n."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if (target := cli.peek(argv, "--target")) is not None:
            start_again_with_compilers(argv, target)
        processes.join(*(cli.peek(argv, option) for option in processes.OPTIONS))
        request = processes.together(lambda: cli.parse(argv))
        kernel_text.leave_out_counts()
        only_report = request.run.report is not None or request.run.target is not None
        return (report if only_report else run)(request, make_console())
    except KeyboardInterrupt:  # before or after the part that saves
        return processes.leave(130)
    except AgreedError as error:
        if processes.is_first():
            tell(one_line(error))
        return 2
    except REFUSALS as error:
        message = one_line(error)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        remedy = "lower --batch-size or --sequence-length, or recompute more: --rematerialize block"
        message = f"out of memory; {remedy} ({one_line(error)})"
    tell(message)
    return processes.leave(2)


def tell(message: str) -> None:
    """What is wrong."""
    print(f"train.py: error: {message}", file=sys.stderr)


def run(request: cli.Request, console: Console) -> int:
    """Corpus, run folder, memory report, training, plot; checks all before it writes anything."""
    config = request.config
    reports = config.memory.memory_report and not processes.are_several()
    programs_of_runs = runs_folder(request.run) / ".compiled"
    is_own = request.run.sequence_parallel == 1 and config.fine_tune.model is None
    is_alone = is_own and not processes.are_several()
    kept = kept_programs.for_gpu(programs_of_runs) if is_alone else None
    is_known = is_kept(config, kept)
    is_early = kept is not None and not reports
    if is_early:
        compile_ahead()
    corpus, devices, programs = processes.together(
        lambda: prepare(request, kept, is_known=is_known, reports=reports)
    )
    processes.check_alike("options", repr(cli.of_all(request)))
    processes.check_alike("text in --data", corpus.fingerprint)
    with stop_on_signals() as stop:
        folder, state = begin(request, corpus)
        checkpoints = Checkpoints(folder.checkpoints, config, corpus.fingerprint)
        kind = jax.devices()[0].device_kind
        on = kind if devices.count == 1 else f"{devices.count} x {kind}"
        if processes.are_several():
            on += f" in {jax.process_count()} processes"
        say(console, f"{folder.path}: {title_of(config, corpus)}, on {on}")
        say(console, str(corpus))
        began = environment.BEGAN
        if reports and not folder.memory_json.exists():
            environment.start_is_over()
            report_layer(config, here(devices.count), Screen(console, folder, stop))
            began = time.perf_counter()
        if not is_early:
            compile_ahead(programs_of_runs if kept is None else None)
        if state is None:
            first = start.begin(config, corpus, devices, kept, programs)
            if first.note:
                say(console, first.note)
                config = first.config
                if processes.is_first():
                    folder.put_config(config)
                checkpoints = Checkpoints(folder.checkpoints, config, corpus.fingerprint)
        else:
            programs = Programs(config, devices, kept)
            first = start.Start(config, programs, devices.state(state))
        environment.start_is_over()
        done = int(first.state.step)
        with (
            MetricsLog(folder.metrics, after_step=done) as log,
            TrainingProgress(console, total=config.optimizer.steps, done=done) as bar,
        ):
            state = train(
                config,
                corpus,
                first.state,
                first.programs,
                Outputs(log, checkpoints, bar),
                stop,
                began=began,
                held_out_loss=first.held_out_loss,
            )

    stopped = stop.signal if int(state.step) < config.optimizer.steps else None
    if processes.is_first():
        conclude(console, request.run, folder, config, corpus, state, stopped)
    return 128 + stopped if stopped else 0


def conclude(
    console: Console,
    run: cli.RunOptions,
    folder: RunFolder,
    config: TrainConfig,
    corpus: Corpus,
    state: TrainState,
    stopped: Signals | None,
) -> None:
    """Plot, model and last lines of a run that is done or was stopped."""
    rows, references = read_metrics(folder.metrics), corpus.held_out_compressed
    longer = f"from here {config.data.sequence_length:,} {corpus.unit} a sequence"
    events = {first_long_step(config.data, config.optimizer.steps): longer}
    plots.plot_loss(folder.loss_plot, rows, references, title_of(config, corpus), events)
    if stopped is not None:
        say(console, f"{stopped.name}: saved after step {int(state.step)}; to go on:")
        say(console, f"    {resume_command(run, folder)}")
        return
    say(console, summary(rows, references))
    if config.fine_tune.model is not None:
        fine_tuning.save(folder.model, state.graph, own(state.params), config)
        say(console, f"model saved in {folder.model}")
    say(console, f"results in {folder.path}")


def title_of(config: TrainConfig, corpus: Corpus) -> str:
    """What is trained on what."""
    return f"{parameter_count(config) / 1e6:.3g} million weights on {corpus.source}"


def compile_ahead(folder: Path | None = None) -> None:
    """From here on jax keeps programs in a folder, if one is given, and kernels are compiled once
    they are lowered."""
    if folder is not None:
        compiler.keep_programs(folder)
    if jax.default_backend() == "gpu":
        kernels_ahead.begin(compiler.options(is_gpu=True))


def runs_folder(run: cli.RunOptions) -> Path:
    """The folder that holds the run."""
    return Path(run.runs_dir) if run.resume is None else Path(run.resume).parent


def prepare(
    request: cli.Request, kept: KeptPrograms | None, *, is_known: bool, reports: bool
) -> tuple[Corpus, Devices, Programs | None]:
    """The corpus and the devices, once it is known that the model runs on them; and the programs,
    where they can be begun while the corpus is read."""
    config, programs = request.config, None
    with ThreadPoolExecutor(max_workers=1) as beside:  # reads, while the model is traced
        read = beside.submit(read_corpus, config.data)
        devices = Devices.checked(request.run.sequence_parallel, config.data)
        if not is_known:
            check_model_runs(config)
        if reports:
            check_lengths(devices.count, "--memory-lengths", config.memory.memory_lengths)
        is_fine = not read.done() or read.exception() is None
        if kept is not None and request.run.resume is None and is_fine and not reports:
            programs = start.programs_of(config, devices, kept)
        corpus = read.result()
    if config.fine_tune.model is not None:
        corpus = tokenized(corpus, config)
    return corpus, devices, programs


def read_corpus(config: DataConfig) -> Corpus:
    """The corpus, and what compressors make of it, which takes longer than to read it."""
    corpus = load_corpus(config)
    assert corpus.held_out_compressed  # kept from here on
    return corpus


def begin(request: cli.Request, corpus: Corpus) -> tuple[RunFolder, TrainState | None]:
    """A new run's folder, or that of the run to resume and its newest state."""
    config, run = request.config, request.run
    if run.resume is not None:
        folder = RunFolder(Path(run.resume))
        checkpoints = Checkpoints(folder.checkpoints, config, corpus.fingerprint)
        return folder, processes.together(checkpoints.restore)
    facts = {"weights": parameter_count(config), "corpus": corpus.facts()}
    if config.fine_tune.model is not None:
        facts["fine_tuned"] = fine_tuning.facts(config)

    def create() -> str:
        if not processes.is_first():
            return ""
        return str(run_folder.create(run.runs_dir, run.name, config, facts).path)

    path, *_ = processes.gather(processes.together(create))
    return RunFolder(Path(path)), None


def report(request: cli.Request, console: Console) -> int:
    """One report into a folder of its own."""
    if processes.are_several():
        raise AgreedError("a report is of one process; leave out --coordinator-address for it")
    environment.start_is_over()
    options, config = request.run, request.config
    count = options.sequence_parallel
    check_count(count, None if options.target is not None else len(jax.devices()))
    if options.report == "step":
        check_lengths(count, "--step-lengths", request.step_report.step_lengths)
    elif options.report != "longest":
        check_lengths(count, "--memory-lengths", config.memory.memory_lengths)
    with stop_on_signals() as stop, place_of(options.target, count) as place:
        facts = {"report": options.report or "memory", "target": options.target}
        folder = run_folder.create(options.runs_dir, options.name, config, facts)
        screen = Screen(console, folder, stop)
        match options.report:
            case "step":
                report_step(config, request.step_report, place, screen)
            case "longest":
                report_longest(config, place, screen)
            case _:
                report_layer(config, place, screen)
    if stop.signal is not None:
        return 128 + stop.signal
    say(console, f"results in {folder.path}")
    return 0


def summary(rows: Sequence[dict[str, Any]], references: dict[str, float]) -> str:
    """Held-out bits per byte before and after, beside the compressors'."""
    held_out = [row["held_out_bits_per_byte"] for row in rows if "held_out_bits_per_byte" in row]
    compressors = ", ".join(f"{name} {value:.3f}" for name, value in references.items())
    return f"held-out bits/byte: {held_out[0]:.3f} -> {held_out[-1]:.3f} ({compressors})"


def resume_command(run: cli.RunOptions, folder: RunFolder) -> str:
    """What continues the run, or this process of it, when typed where this one was started."""
    here = Path.cwd()
    words = [Path(sys.executable), Path(__file__)]
    shown = [str(word.relative_to(here) if word.is_relative_to(here) else word) for word in words]
    same = ("sequence_parallel", "coordinator_address", "num_processes", "process_id")
    for option in same:
        value = getattr(run, option)
        if value != getattr(cli.RunOptions, option):
            shown += [f"--{option.replace('_', '-')}", str(value)]
    return shlex.join([*shown, "--resume", str(folder.path)])


if __name__ == "__main__":
    sys.exit(main())
