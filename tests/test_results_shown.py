"""What README and docs show of the benchmarks is what the committed result files say."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import pytest

from benchmarks import plot, ratios, tables
from benchmarks.results import Run

README = plot.ROOT / "README.md"
IMAGE = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")


def texts_in(png: Path) -> dict[str, str]:
    """The tEXt chunks of a PNG; ValueError where a checksum is off."""
    data, at, found = png.read_bytes(), 8, {}
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        if zlib.crc32(kind + body) != struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0]:
            raise ValueError(f"{png} is damaged")
        if kind == b"tEXt":
            name, _, value = body.partition(b"\0")
            found[name.decode()] = value.decode("latin-1")
        at += 12 + size
    return found


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda path: path.name)
def test_every_table_says_what_the_files_say(page: Path) -> None:
    text = page.read_text()
    assert len(re.findall("<!-- results: ", text)) == len(re.findall("<!-- end -->", text)) > 0
    assert tables.rewritten(text) == text, "run `make figures`"
    tampered = re.sub(r"(\d)\.(\d\d)", r"\1.99", text)
    assert tables.rewritten(tampered) != tampered


@pytest.mark.parametrize("name", plot.FIGURES)
def test_every_figure_is_drawn_from_the_newest_file(name: str) -> None:
    drawn = texts_in(plot.FOLDER / f"{name}.png")["Source"]
    assert drawn == plot.drawn_from(plot.source_of(name)), "run `make figures`"


def test_readme_opens_with_the_memory_and_the_speed_figure() -> None:
    text = README.read_text()
    first = [Path(found).name for found in IMAGE.findall(text)[:2]]
    assert first == ["memory.png", "speed.png"]
    assert text.index("speed.png") < text.index("\n## ")


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda path: path.name)
def test_every_image_is_there(page: Path) -> None:
    found = IMAGE.findall(page.read_text())
    assert [image for image in found if not (page.parent / image).is_file()] == []


def test_readme_says_what_repeatable_gradients_cost() -> None:
    path = max(plot.RESULTS.glob("nvidia-h200-hopper-backward-*.json"))
    run = Run.load(path)
    speeds = []
    for name in run.cells:
        own = run.get(name, "jattn/flash", "backward")
        same = run.get(name, "jattn/flash-deterministic", "backward")
        if own is not None and own.ms and same is not None and same.ms:
            speeds.append(own.ms / same.ms)
    said = re.search(
        rf"\[(\d\.\d+) to (\d\.\d+)\]\({path.relative_to(plot.ROOT)}\) of its speed",
        " ".join(README.read_text().split()),
    )
    assert said is not None
    assert said.groups() == (f"{min(speeds):.2f}", f"{max(speeds):.2f}")


def test_ratios_are_to_the_fastest_rival_and_sorted() -> None:
    found = ratios.sorted_ratios(Run.load(plot.source_of("rivals")))
    assert [r.ratio for r in found] == sorted(r.ratio for r in found)
    run = Run.load(plot.source_of("rivals"))
    for r in found:
        times = {m.peer: m.ms for m in run.measurements[r.cell.name] if m.which == r.which and m.ms}
        rivals = {peer: ms for peer, ms in times.items() if not peer.startswith("jattn/")}
        assert r.rival_ms == min(rivals.values())
        assert r.ratio == min(rivals.values()) / times["jattn/flash"]
