"""Programs of earlier starts: found by all that they follow from, and the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import models
import train
from tests.promotion import of_others
from tests.tiny_training import OPTIONS, results, write_corpus
from training import ahead, kept_programs
from training.kept_programs import KeptPrograms


@pytest.fixture(scope="module", autouse=True)
def optax_promotes() -> Iterator[None]:
    """The optimiser is of another library."""
    with of_others():
        yield


@pytest.fixture
def doubled() -> jax.stages.Compiled:
    return jax.jit(lambda x: 2 * x).lower(jax.ShapeDtypeStruct((3,), jnp.float32)).compile()


def refused() -> Any:
    raise AssertionError("compiled, though it is kept")


def test_a_later_start_traces_and_compiles_nothing_and_has_the_same_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_programs, "for_gpu", KeptPrograms)
    write_corpus(tmp_path / "corpus")
    runs = tmp_path / "runs"
    few = ["--steps", "3", "--data", str(tmp_path / "corpus"), "--runs-dir", str(runs)]
    options = [*OPTIONS, *few]
    assert train.main([*options, "--name", "first"]) == 0
    kept = sorted(path.name.split("-")[0] for path in (runs / ".compiled").iterdir())
    assert kept == ["held", "initial", "update"]
    monkeypatch.setattr(train, "check_model_runs", refused)
    monkeypatch.setattr(ahead, "_compiled", refused)
    assert train.main([*options, "--name", "later"]) == 0
    assert results(runs / "later") == results(runs / "first")


def test_a_program_is_kept_and_found(tmp_path: Path, doubled: jax.stages.Compiled) -> None:
    kept = KeptPrograms(tmp_path / "new")
    assert not kept.has("doubled", 3)
    kept.put(doubled, "doubled", 3)
    assert kept.has("doubled", 3)
    assert kept.get(refused, "doubled", 3)(jnp.arange(3.0)).tolist() == [0, 2, 4]


def test_a_damaged_one_is_compiled_again(tmp_path: Path, doubled: jax.stages.Compiled) -> None:
    kept = KeptPrograms(tmp_path)
    kept.put(doubled, "doubled")
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    assert kept.get(lambda: doubled, "doubled") is doubled


def test_a_folder_that_cannot_be_written_is_let_be(
    tmp_path: Path, doubled: jax.stages.Compiled
) -> None:
    (tmp_path / "file").touch()
    KeptPrograms(tmp_path / "file").put(doubled, "doubled")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("what", ["configuration", "source", "setting", "flag", "version"])
def test_what_a_program_follows_from_is_in_its_name(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doubled: jax.stages.Compiled
) -> None:
    of: Any = "as before"
    kept = KeptPrograms(tmp_path)
    kept_programs._surroundings.cache_clear()
    kept.put(doubled, "doubled", of)
    match what:
        case "configuration":
            of = "another"
        case "source":
            (tmp_path / "more.py").touch()
            monkeypatch.setattr(models, "__path__", [str(tmp_path)])
        case "setting":
            jax.config.update("jax_default_prng_impl", "rbg")
        case "flag":
            monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
        case "version":
            monkeypatch.setattr(kept_programs, "_version", lambda distribution: "0")
    kept_programs._surroundings.cache_clear()
    assert not kept.has("doubled", of)
    monkeypatch.undo()
    jax.config.update("jax_default_prng_impl", "threefry2x32")
    kept_programs._surroundings.cache_clear()
    assert kept.has("doubled", "as before")


@pytest.mark.parametrize(
    ("setting", "value", "where"),
    [
        ("jax_enable_compilation_cache", True, "runs"),
        ("jax_enable_compilation_cache", False, None),
        ("jax_compilation_cache_dir", "users", "users"),
        ("jax_compilation_cache_dir", "gs://users", None),
    ],
)
def test_programs_for_a_gpu_are_where_jax_is_to_keep_its_own(
    setting: str, value: object, where: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kept_programs.for_gpu(Path("runs")) is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    before = getattr(jax.config, setting)
    jax.config.update(setting, value)
    try:
        found = kept_programs.for_gpu(Path("runs"))
    finally:
        jax.config.update(setting, before)
    assert (None if found is None else found.folder) == (None if where is None else Path(where))
