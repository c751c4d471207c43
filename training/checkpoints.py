"""Checkpoints: the exact state, written by Orbax, what it belongs to, and a digest of each file.

    checkpoints/<step>/state/             the arrays
    checkpoints/<step>/belongs_to.json    configuration and fingerprint of the corpus
    checkpoints/<step>/digests.json       sha256 of each file above; Orbax misses a flipped bit

A checkpoint is written beside its place and renamed into it, so that one that is there is whole.
Of JAX's processes the first writes it, for any number of them to read.
"""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax

from training import processes
from training.config import TrainConfig, differences, from_json
from training.devices import own
from training.errors import TrainingError, one_line
from training.step import TrainState, abstract_state

_STATE = "state"
_BELONGS_TO = "belongs_to.json"
_DIGESTS = "digests.json"
_PARTIAL = ".partial"


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The newest checkpoints of one run, in the folder `path`."""

    path: Path
    config: TrainConfig
    corpus_fingerprint: str

    def save(self, state: TrainState) -> None:
        """Writes the state under its step unless that is there already, and drops old ones."""
        if not processes.is_first():
            return
        step = int(state.step)
        final = self.path / str(step)
        if final.exists():
            return
        partial = final.with_suffix(_PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        belongs_to = {
            "config": dataclasses.asdict(self.config),
            "corpus": self.corpus_fingerprint,
        }
        (partial / _BELONGS_TO).write_text(json.dumps(belongs_to), encoding="utf-8")
        tree = jax.device_get(own(_tree(state)))
        with _checkpointer() as checkpointer:
            checkpointer.save((partial / _STATE).absolute(), args=_args().StandardSave(tree))
        (partial / _DIGESTS).write_text(json.dumps(_digests(partial)), encoding="utf-8")
        partial.rename(final)
        for old in _steps(self.path)[: -self.config.record.keep_checkpoints]:
            shutil.rmtree(self.path / str(old))

    def restore(self) -> TrainState:
        """The newest state.

        Raises:
            TrainingError: there is none, a file of it has changed, or it belongs to another
                configuration or corpus.
        """
        steps = _steps(self.path)
        if not steps:
            raise TrainingError(f"{self.path} holds no checkpoint to resume from")
        path = self.path / str(steps[-1])
        _check_digests(path)
        self._check_belongs(path)
        abstract = abstract_state(self.config)
        # Not where they were saved, which may be devices that are not here.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), _tree(abstract)
        )
        try:
            with _checkpointer() as checkpointer:
                tree = checkpointer.restore(
                    (path / _STATE).absolute(), args=_args().StandardRestore(wanted)
                )
        except Exception as error:  # its files are sound, so another version must have written it
            raise TrainingError(
                f"checkpoint {path} cannot be read by the installed versions"
                f" ({type(error).__name__}: {one_line(error)[:200]})"
            ) from error
        return dataclasses.replace(abstract, **tree)

    def _check_belongs(self, path: Path) -> None:
        stored = json.loads((path / _BELONGS_TO).read_text(encoding="utf-8"))
        config = from_json(stored["config"], f"checkpoint {path}")
        if changed := differences(config, self.config):
            raise TrainingError(
                f"checkpoint {path} belongs to another configuration: {', '.join(changed)}"
            )
        if stored["corpus"] != self.corpus_fingerprint:
            raise TrainingError(
                f"checkpoint {path} was trained on other text than --data holds now (sha256"
                f" {stored['corpus'][:12]}, now {self.corpus_fingerprint[:12]})"
            )


def _check_digests(path: Path) -> None:
    try:
        stored = json.loads((path / _DIGESTS).read_text(encoding="utf-8"))
        found = _digests(path)
        changed = sorted(name for name in stored | found if stored.get(name) != found.get(name))
    except (OSError, ValueError, TypeError, AttributeError):
        changed = [_DIGESTS]
    if changed:
        raise TrainingError(
            f"checkpoint {path} is corrupt ({', '.join(changed)} changed or missing); delete that"
            " folder to resume from an earlier one"
        )


def _digests(path: Path) -> dict[str, str]:
    digests = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.name != _DIGESTS:
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            digests[file.relative_to(path).as_posix()] = digest
    return digests


def _steps(path: Path) -> list[int]:
    if not path.is_dir():
        return []
    return sorted(int(entry.name) for entry in path.iterdir() if entry.name.isdecimal())


def _tree(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "params": state.params, "optimizer": state.optimizer}


def _orbax() -> Any:
    """Imported by runs that start and by no help text or refusal: it takes seconds."""
    import orbax.checkpoint  # type: ignore[import-untyped]

    return orbax.checkpoint


def _args() -> Any:
    return _orbax().args


def _checkpointer() -> Any:
    """One that asks nothing of other processes."""
    number = jax.process_index()
    alone = _orbax().options.MultiprocessingOptions(
        primary_host=number, active_processes={number}, barrier_sync_key_prefix=str(number)
    )
    handler = _orbax().StandardCheckpointHandler(multiprocessing_options=alone)
    return _orbax().Checkpointer(handler, multiprocessing_options=alone)
