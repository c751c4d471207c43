"""What to learn from: the files, the split by file, the batches, and how well zlib and xz do.

A batch is a function of (seed, step) alone, so a resumed run sees what it would have seen.
"""

import dataclasses
import functools
import hashlib
import lzma
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.config import DataConfig
from training.errors import TrainingError

_COMPRESSED_AT_MOST = 8 << 20  # bytes; xz takes about a second per MiB
NO_TARGET = -1  # a target that is not learnt: what follows a document's last token
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclasses.dataclass(frozen=True)
class Text:
    """Files one after another, and where each begins."""

    data: NDArray[Any]  # uint8 bytes or int32 tokens
    starts: NDArray[np.int64]

    @classmethod
    def join(cls, files: Sequence[bytes]) -> "Text":
        ends = np.cumsum([len(file) for file in files], dtype=np.int64)
        data = np.frombuffer(b"".join(files), np.uint8)
        return cls(data, np.concatenate([np.zeros(1, np.int64), ends[:-1]]))

    def windows(self, starts: NDArray[np.int64], length: int) -> NDArray[Any]:
        """(len(starts), length) bytes or tokens."""
        return np.take(self.data, starts[:, None] + np.arange(length))

    def segment_ids(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int32]:
        """(len(starts), length): which file each byte or token is from."""
        index = np.searchsorted(self.starts, starts[:, None] + np.arange(length), side="right")
        return index.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Inputs and what follows each: (B, T); segment ids are None if files may mix.

    Bytes are uint8. Tokens are int32, and of packed documents the last has `NO_TARGET`.
    """

    inputs: NDArray[Any]
    targets: NDArray[Any]
    segment_ids: NDArray[np.int32] | None


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text for training and text held out; of several files each is wholly in one of them."""

    source: str
    train: Text
    held_out: Text
    train_files: tuple[str, ...]
    held_out_files: tuple[str, ...]
    unreadable: int

    @property
    def unit(self) -> str:
        """What sequences are counted in."""
        return "bytes"

    @property
    def units_per_byte(self) -> tuple[float, float]:
        """Of the text to learn from and of that held out."""
        return 1.0, 1.0

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes when any byte of either part does."""
        digest = hashlib.sha256(self.train.data.tobytes())
        digest.update(hashlib.sha256(self.held_out.data.tobytes()).digest())
        return digest.hexdigest()

    @functools.cached_property
    def held_out_compressed(self) -> dict[str, float]:
        """Bits per byte that zlib at level 9 and xz at 9 extreme make of the held-out text.

        Of a text over 8 MiB its first 8 MiB are compressed.
        """
        data = self.held_out.data[:_COMPRESSED_AT_MOST].tobytes()
        return {
            "zlib -9": 8 * len(zlib.compress(data, 9)) / len(data),
            "xz -9e": 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data),
        }

    def facts(self) -> dict[str, Any]:
        """What config.json keeps of it."""
        return {
            "source": self.source,
            "training_bytes": len(self.train.data),
            "held_out_bytes": len(self.held_out.data),
            "held_out_files": self.held_out_files,
            "unreadable_files": self.unreadable,
            "fingerprint": self.fingerprint,
            "held_out_compressed_bits_per_byte": self.held_out_compressed,
        }

    def __str__(self) -> str:
        unreadable = f", {self.unreadable} unreadable left out" if self.unreadable else ""
        return (
            f"{self.source}: {len(self.train.data):,} bytes of {_files(self.train_files)} to learn"
            f" from, {len(self.held_out.data):,} of {_files(self.held_out_files)} held"
            f" out{unreadable}"
        )


def _files(names: Sequence[str]) -> str:
    return "1 file" if len(names) == 1 else f"{len(names)} files"


def load_corpus(config: DataConfig) -> Corpus:
    """Reads and splits the corpus.

    Raises:
        TrainingError: the path does not exist or holds nothing readable, or a part is shorter than
            one sequence.
    """
    library = config.data is None
    root = Path(sysconfig.get_path("stdlib") if config.data is None else config.data)
    if not root.exists():
        raise TrainingError(f"--data {root} does not exist")
    files: dict[str, bytes] = {}
    unreadable = 0
    for name, path in _paths(root, library=library):
        try:
            files[name] = path.read_bytes()
        except OSError:
            unreadable += 1
    files = {name: content for name, content in files.items() if content}
    source = "standard library" if library else str(root)
    if not files:
        raise TrainingError(
            f"{source} holds no readable, non-empty file ({unreadable} unreadable);"
            " name text with --data PATH"
        )
    train, held_out = _split(files, config.held_out_fraction)
    corpus = Corpus(
        source,
        Text.join(list(train.values())),
        Text.join(list(held_out.values())),
        tuple(train),
        tuple(held_out),
        unreadable,
    )
    check_long_enough(corpus, config)
    return corpus


def check_long_enough(corpus: Corpus, config: DataConfig) -> None:
    """TrainingError if a part is shorter than one sequence and its last target."""
    for part, text in (("to learn from", corpus.train), ("held out", corpus.held_out)):
        if len(text.data) <= config.sequence_length:
            raise TrainingError(
                f"{corpus.source} is too short: {len(text.data)} {corpus.unit} {part}, but one"
                f" sequence and its last target take {config.sequence_length + 1}; lower"
                " --sequence-length, change --held-out-fraction or name more text"
            )


def training_batch(
    text: Text, config: DataConfig, *, seed: int, step: int, steps: int | None = None
) -> Batch:
    """The sequences of one step, drawn uniformly; the same for the same arguments.

    Args:
        text: what to draw from.
        config: lengths and sizes.
        seed: fixes the order of the whole run.
        step: counted from 1.
        steps: number of steps of the run, of which a share takes short sequences; None: all long.
    """
    draw = np.random.default_rng([seed, step])
    length, rows = config.sequence_length, config.batch_size
    short = min(length, config.short_sequence_length)
    if steps is not None and step < first_long_step(config, steps):
        length, rows = short, rows * (length // short)
    return _batch(text, draw.integers(len(text.data) - length, size=rows), length, config)


def first_long_step(config: DataConfig, steps: int) -> int:
    """The first step of a run that takes sequences of full length, counted from 1."""
    return int(config.short_share * steps) + 1


def evaluation_batches(text: Text, config: DataConfig, windows: int) -> Iterator[Batch]:
    """At least `windows` sequences at even distances over the text, in whole batches."""
    batches = -(-windows // config.batch_size)
    latest = len(text.data) - config.sequence_length - 1
    starts = np.linspace(0, latest, batches * config.batch_size).astype(np.int64)
    for rows in np.split(starts, batches):
        yield _batch(text, rows, config.sequence_length, config)


def _batch(text: Text, starts: NDArray[np.int64], length: int, config: DataConfig) -> Batch:
    rows = text.windows(starts, length + 1)
    if not config.pack_documents:
        return Batch(rows[:, :-1], rows[:, 1:], None)
    ids, targets = text.segment_ids(starts, length + 1), rows[:, 1:]
    if text.data.dtype == np.int32:
        targets = np.where(ids[:, 1:] == ids[:, :-1], targets, np.int32(NO_TARGET))
    return Batch(rows[:, :-1], targets, ids[:, :-1])


def _paths(root: Path, *, library: bool) -> Iterator[tuple[str, Path]]:
    """Names relative to the root, and paths, in an order that is the same on every machine."""
    if root.is_file():
        yield root.name, root
        return
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith(".") and not (library and name in _NOT_LIBRARY)
        )
        for name in sorted(names):
            path = Path(folder, name)
            hidden = name.startswith(".") or (library and path.suffix != ".py")
            if not hidden and path.is_file():
                yield path.relative_to(root).as_posix(), path


def _split(files: dict[str, bytes], fraction: float) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Holds out whole files in the order of their names' hashes, as many as the share takes."""
    total = sum(len(content) for content in files.values())
    if len(files) == 1:
        ((name, content),) = files.items()
        cut = total - round(fraction * total)
        return {name: content[:cut]}, {name: content[cut:]}
    held_out: set[str] = set()
    room = fraction * total
    for name in sorted(files, key=lambda name: hashlib.sha256(os.fsencode(name)).digest()):
        if len(files[name]) <= room:
            held_out.add(name)
            room -= len(files[name])
    if not held_out:  # every file is larger than the share
        held_out = {min(files, key=lambda name: (len(files[name]), name))}
    return (
        {name: content for name, content in files.items() if name not in held_out},
        {name: content for name, content in files.items() if name in held_out},
    )
