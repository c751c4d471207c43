"""A corpus and options so small that a whole training takes seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

STEPS = 300
LENGTH = 64

OPTIONS = [
    *("--preset", "cpu", "--no-memory-report"),
    *("--steps", str(STEPS), "--warmup-fraction", "0.04", "--learning-rate", "0.01"),
    *("--sequence-length", str(LENGTH), "--batch-size", "2", "--short-share", "0"),
    *("--optimizer", "adamw", "--beta1", "0.9", "--beta2", "0.99"),
    *("--hidden-size", "16", "--mlp-size", "24", "--num-layers", "1"),
    *("--num-heads", "2", "--num-key-value-heads", "1", "--head-dim", "8"),
    *("--log-every", "50", "--evaluate-every", "75", "--evaluation-windows", "4"),
    *("--checkpoint-every", "125"),
]

_TIMES = {"seconds", "seconds_since_start", "tokens_per_second", "mfu"}


def write_corpus(folder: Path, files: int = 12) -> Path:
    """Files of made-up assignments, some 20 kB each time the same."""
    draw = random.Random(0)
    folder.mkdir()
    for number in range(files):
        lines = [
            f"{draw.choice('abcxyz')} = {draw.choice('abcxyz')} + {draw.randrange(100)}"
            for _ in range(150)
        ]
        (folder / f"file{number}.py").write_text("\n".join(lines), encoding="ascii")
    return folder


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, every line of which must parse."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def results(run: Path) -> list[dict[str, Any]]:
    """The rows without what the clock decides."""
    return [{name: row[name] for name in row if name not in _TIMES} for row in rows(run)]
