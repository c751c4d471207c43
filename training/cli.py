"""The command line: options over a preset, or over the configuration of the run to resume."""

import contextlib
import dataclasses
import io
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from training.config import (
    FINE_TUNING,
    PRESETS,
    STEP_REPORTS,
    PresetName,
    StepReportConfig,
    TrainConfig,
    differences,
    from_json,
)
from training.errors import TrainingError
from training.fine_tuning import APPLY_TO_FOLDERS
from training.reports.place import TargetName
from training.usage import message_of

_DESCRIPTION = """\
Trains a byte-level transformer on real text and reports how its attention's memory scales.

Without options: a memory-scaling report, then a short training on the standard library's source,
both sized for the machine. Results go to runs/<name>/: config.json, metrics.jsonl, checkpoints/,
loss.png, memory_scaling.png and memory_scaling.json. Ctrl-C saves and says how to resume. What is
compiled for a GPU is kept in runs/.compiled, so that the next start is quicker.

The option report asks for one report instead of a training; target has it for a GPU that is not
here, from what XLA compiles for it. With the option model a folder in Hugging Face's format is
fine-tuned instead, and saved so in runs/<name>/model/."""


ReportName = Literal["memory", "step", "longest"]


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Which run."""

    preset: Literal["auto", "cpu", "gpu"] = "auto"
    """Set of defaults for all options below; auto takes gpu if JAX's default device is one."""

    name: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: date and time)")
    ] = None
    """Name of the run and of its folder; a name that exists already is refused."""

    runs_dir: Annotated[str, tyro.conf.arg(metavar="PATH")] = "runs"
    """Folder that holds the runs."""

    resume: Annotated[
        str | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: a new run)")
    ] = None
    """Folder of a run to continue exactly as if it had not stopped, with its own options."""

    sequence_parallel: int = 1
    """Devices over which each sequence is cut, the weights being on all of them; a run may be
    resumed on another number. A report is then of each of them."""

    coordinator_address: Annotated[
        str | None,
        tyro.conf.arg(metavar="HOST:PORT|auto", help_behavior_hint="(default: one process)"),
    ] = None
    """Train in several processes that share their devices, such as one on each host, started with
    the same options: where process 0 is to be found, or auto for what Slurm, Open MPI and other
    schedulers that JAX knows say. All devices take part: those that sequence-parallel leaves get
    sequences of their own. The first process writes the run."""

    num_processes: Annotated[
        int | None, tyro.conf.arg(help_behavior_hint="(default: the scheduler's)")
    ] = None
    """How many processes."""

    process_id: Annotated[
        int | None, tyro.conf.arg(help_behavior_hint="(default: the scheduler's)")
    ] = None
    """Which of them this is, from 0."""

    report: Annotated[
        ReportName | None,
        tyro.conf.arg(help_behavior_hint="(default: what a run consists of)"),
    ] = None
    """Give a report and do nothing else: memory and time of one attention layer (memory) or of the
    whole training step, with and without rematerialisation (step), or the longest sequence that
    trains, blocks rematerialised, with two steps of it (longest)."""

    target: Annotated[
        TargetName | None, tyro.conf.arg(help_behavior_hint="(default: this machine's device)")
    ] = None
    """Give the report, memory unless another is named, for a GPU that is not here: bytes without
    times, from deviceless compilation; needs what `sh scripts/compilers.sh` installs."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What one call of train.py is to do."""

    run: RunOptions
    """The run."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """Its configuration."""

    step_report: StepReportConfig
    """What a report on whole steps measures."""


def parse(argv: Sequence[str] | None) -> Request:
    """The request that the arguments make; None reads those of the process.

    Raises:
        TrainingError: an argument is unknown or has a value that is not allowed, or a resumed run
            is given options it was not started with.
        SystemExit: help was asked for and has been printed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    resume = peek(argv, "--resume")
    if resume is None:
        preset = _preset(peek(argv, "--preset"), target=peek(argv, "--target"))
        if peek(argv, "--model") is None:
            return _parse_over(PRESETS[preset], STEP_REPORTS[preset], argv)
        request = _parse_over(FINE_TUNING[preset], STEP_REPORTS[preset], argv)
        _check_fine_tuning(request, FINE_TUNING[preset])
        return request
    stored = read_config(Path(resume))
    request = _parse_over(stored, StepReportConfig(), argv)
    for option in ("preset", "name", "runs_dir", "report", "target"):
        if getattr(request.run, option) != getattr(RunOptions, option):
            raise TrainingError(
                f"--{option.replace('_', '-')} is for new runs; --resume {resume} continues that"
                " one where it is"
            )
    if changed := differences(stored, request.config):
        raise TrainingError(
            f"cannot resume {resume} with other options than it was started with:"
            f" {', '.join(changed)}"
        )
    return request


def of_all(request: Request) -> Request:
    """The same in each of JAX's processes that were started for it."""
    run = dataclasses.replace(
        request.run, coordinator_address=None, num_processes=None, process_id=None
    )
    return dataclasses.replace(request, run=run)


def _check_fine_tuning(request: Request, defaults: TrainConfig) -> None:
    """Refuses what does not apply to a model that has its own sizes."""
    model = request.config.fine_tune.model
    changed = [
        field.name.replace("_", "-")
        for field in dataclasses.fields(defaults.model)
        if field.name not in APPLY_TO_FOLDERS
        and getattr(request.config.model, field.name) != getattr(defaults.model, field.name)
    ]
    if changed:
        raise TrainingError(f"--{changed[0]} describes a new model; --model {model} says its own")
    if request.config.optimizer.optimizer != "adamw":
        raise TrainingError("--optimizer muon is for new models; --model takes adamw")
    if request.run.report or request.run.target or request.config.memory.memory_report:
        raise TrainingError("reports measure the trainer's own model; leave out --model for them")


def read_config(folder: Path) -> TrainConfig:
    """The configuration stored in a run's folder."""
    path = folder / "config.json"
    try:
        stored: Any = json.loads(path.read_text(encoding="utf-8"))["config"]
    except OSError as error:
        raise TrainingError(
            f"{folder} is not a run: cannot read {path}: {error.strerror}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} is corrupt: {error}") from None
    return from_json(stored, str(path))


def _preset(given: str | None, *, target: str | None) -> PresetName:
    if given in (None, "auto"):
        return "gpu" if target is not None or jax.default_backend() == "gpu" else "cpu"
    return "gpu" if given == "gpu" else "cpu"


def peek(argv: Sequence[str], option: str) -> str | None:
    """Value of an option that decides the defaults of the others, before those are parsed."""
    for argument, following in itertools.pairwise((*argv, None)):
        name, equals, value = (argument or "").partition("=")
        if name.replace("_", "-") == option:
            return value if equals else following
    return None


def _parse_over(
    defaults: TrainConfig, step_report: StepReportConfig, argv: Sequence[str]
) -> Request:
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(
                Request,
                prog="train.py",
                description=_DESCRIPTION,
                default=Request(RunOptions(), defaults, step_report),
                args=argv,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stopped:
        if not stopped.code:
            raise
        raise TrainingError(_one_line(message.getvalue())) from None


def _one_line(box: str) -> str:
    """Tyro's message, without the names of our sections."""
    message = message_of(box).removeprefix("Error parsing step-report: ")
    for section in ("run", "model", "fine-tune", "data", "optimizer", "record", "memory"):
        message = message.removeprefix(f"Error parsing config.{section}: ")
    return f"{message} (see train.py --help)"
