"""What loading and saving a folder take beside the model itself, as the system counts it."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.four_devices import REPOSITORY
from tests.models.folders import LLAMA, SHAPES, drawn, write

MIB = 1 << 20
# Whatever the size: what is read and cast at once, and what the allocator and compilers keep.
ROOM = 96 * MIB

PROGRAM = """
import sys, jax, numpy as np, models
from jax.sharding import NamedSharding, PartitionSpec as P

def resident(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

small, large, dtype, out = sys.argv[1:]
everywhere = NamedSharding(jax.make_mesh((jax.device_count(),), ("x",)), P("x"))
sharding = everywhere if jax.device_count() > 1 else None
models.save_pretrained(models.from_pretrained(small, dtype=dtype, sharding=sharding), out + "small")
before = resident("VmRSS")
model = models.from_pretrained(large, dtype=dtype, sharding=sharding)
loaded = resident("VmHWM") - before
models.save_pretrained(model, out + "large")
print(loaded, resident("VmHWM") - before)
"""


def sparse_folder(folder: Path, *, hidden: int) -> int:
    """A folder whose weights are all zero and take no room on the disk; their bytes in memory."""
    folder.mkdir()
    fields = LLAMA | {
        "hidden_size": hidden, "intermediate_size": 3 * hidden, "vocab_size": 40 * hidden // 16,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    sizes = {16: hidden, 8: hidden // 2, 24: 3 * hidden, 40: 40 * hidden // 16}
    header, offset = {}, 0
    for name, shape in SHAPES.items():
        scaled = [sizes[size] for size in shape]
        end = offset + 2 * int(np.prod(scaled))
        header[name] = {"dtype": "BF16", "shape": scaled, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return offset


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the count is Linux's")
@pytest.mark.parametrize(("dtype", "devices"), [("bfloat16", 1), ("float32", 1), ("bfloat16", 4)])
def test_model_is_all_that_stays_and_all_that_is_taken(
    tmp_path: Path, dtype: str, devices: int
) -> None:
    """Whatever is left over of its reading and writing is far less than the model."""
    write(tmp_path / "small", LLAMA, drawn())
    size = sparse_folder(tmp_path / "large", hidden=3136)
    size *= 2 if dtype == "float32" else 1
    assert size > 5 * ROOM
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    paths = [str(tmp_path / name) for name in ("small", "large")]
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, *paths, dtype, str(tmp_path / "out_")],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    loaded, saved = map(int, ended.stdout.split())
    assert 0.9 * size < loaded < size + ROOM
    assert saved < size + 2 * ROOM
