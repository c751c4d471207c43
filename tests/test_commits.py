"""Two commits timed by turns: what is kept of a run, and that each commit is its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import commits
from benchmarks.results import Run

ROOT = commits.ROOT


def test_a_commit_is_compared_with_a_checkout_of_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other is one whose attention fails in a way of its own."""
    (tmp_path / "before" / "jattn").mkdir(parents=True)
    (tmp_path / "before" / "jattn" / "__init__.py").write_text(
        "def dot_product_attention(*args, **options):\n    raise RuntimeError('of before')\n"
    )
    cells = ["--preset", "cpu", "--cells", "causal-b1-t512", "--repeats", "1"]
    kept = ["--implementation", "memory_efficient", "--out", str(tmp_path / "kept.json")]
    assert commits.main([str(tmp_path / "before"), *cells, *kept]) == 0
    run = Run.load(tmp_path / "kept.json")
    (name,) = run.cells
    before, after = (run.get(name, who, "forward") for who in (commits.BEFORE, commits.AFTER))
    assert before is not None
    assert before.reason == "RuntimeError: of before"
    assert after is not None
    assert after.ms is not None
    assert after.samples == commits.ROUNDS
    assert "RuntimeError: of before" in capsys.readouterr().out


def test_a_checkout_that_is_not_named_is_asked_for() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "commits.py")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "name a checkout" in run.stderr
