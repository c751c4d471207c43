"""runs/<name>/: its name, config.json and metrics.jsonl."""

import dataclasses
import datetime
import json
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import jax

from training import processes
from training.config import TrainConfig
from training.errors import TrainingError

_VERSIONS_OF = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The fine-tuned model, in Hugging Face's format."""
        return self.path / "model"

    @property
    def loss_plot(self) -> Path:
        return self.path / "loss.png"

    def put_config(self, config: TrainConfig) -> None:
        """Stores another configuration in place of the one the run was made with."""
        stored = json.loads(self.config.read_text(encoding="utf-8"))
        write_json(self.config, stored | {"config": dataclasses.asdict(config)})

    def report_plot(self, name: str) -> Path:
        """The picture of a report by its name."""
        return self.path / f"{name}.png"

    def report_json(self, name: str) -> Path:
        """The numbers of a report by its name."""
        return self.path / f"{name}.json"

    @property
    def memory_json(self) -> Path:
        return self.report_json("memory_scaling")

    @property
    def longest_json(self) -> Path:
        return self.path / "longest.json"

    @property
    def library_log(self) -> Path:
        """What libraries said during a report."""
        return self.path / "library.log"


def create(
    runs_dir: str, name: str | None, config: TrainConfig, facts: dict[str, Any]
) -> RunFolder:
    """A new run's folder with its config.json: the configuration, the machine and `facts`.

    Raises:
        TrainingError: the name is taken or not a plain name, or the folder cannot be written.
    """
    if name is not None and (name in ("", ".", "..") or Path(name).name != name):
        raise TrainingError(f"--name must be a plain folder name, got {name!r}")
    now = datetime.datetime.now().astimezone()
    stored = {
        "config": dataclasses.asdict(config),
        "started": now.isoformat(timespec="seconds"),
        "machine": {
            "device": jax.devices()[0].device_kind,
            "system": platform.platform(),
            "python": platform.python_version(),
            **{package: metadata.version(package) for package in _VERSIONS_OF},
        },
        **facts,
    }
    parent = Path(runs_dir)
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = _make(parent, name, now)
        try:
            write_json(folder.config, stored)
        except OSError:
            folder.config.unlink(missing_ok=True)
            folder.path.rmdir()
            raise
    except OSError as error:
        for made in missing:
            if made.exists():
                made.rmdir()
        raise TrainingError(
            f"cannot write the run to {parent}: {error.strerror} ({error.filename})"
        ) from None
    return folder


class MetricsLog:
    """metrics.jsonl: one JSON object per step and line, readable while the run goes on.

    Of JAX's processes the first writes it.
    """

    def __init__(self, path: Path, *, after_step: int) -> None:
        """Keeps the rows up to `after_step`, which a resumed run continues, and drops the rest."""
        kept = [row for row in read_metrics(path) if row["step"] <= after_step]
        self._last = kept[-1]["step"] if kept else -1
        self._file: IO[str] | None = None
        if processes.is_first():
            partial = path.with_suffix(".partial")
            partial.write_text("".join(f"{json.dumps(row)}\n" for row in kept), encoding="utf-8")
            partial.replace(path)
            self._file = path.open("a", encoding="utf-8")

    @property
    def last_step(self) -> int:
        """Step of the newest row, -1 without one."""
        return self._last

    def write(self, row: dict[str, float]) -> None:
        self._last = int(row["step"])
        if self._file is not None:
            self._file.write(f"{json.dumps(row)}\n")
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was cut off is left out."""
    return list(_rows(path)) if path.exists() else []


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                return
            raise TrainingError(
                f"{path}, line {number} is not a row of metrics: {line[:80]!r}"
            ) from None
        yield row


def _make(parent: Path, name: str | None, now: datetime.datetime) -> RunFolder:
    if name is not None:
        path = parent / name
        try:
            path.mkdir()
        except FileExistsError:
            raise TrainingError(
                f"{path} exists already; continue it with --resume {path} or choose another --name"
            ) from None
        return RunFolder(path)
    base = now.strftime("%Y-%m-%d_%H-%M-%S")
    number = 1
    while True:  # two runs may start within a second
        path = parent / (base if number == 1 else f"{base}_{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return RunFolder(path)


def write_json(path: Path, values: Any) -> None:
    """Writes readable JSON, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
