"""Compiles the Hopper kernel for an absent H200 and prints what the assembler says, as JSON lines.

Run as a program in an environment with jax's CUDA plugin wheels (and no CUDA libraries) and ptxas.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import sys
import tempfile

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
DUMP = pathlib.Path(tempfile.mkdtemp(prefix="mosaic-dump-"))
os.environ.update(MOSAIC_GPU_DUMP_TO=str(DUMP), MOSAIC_GPU_DUMP_PTX="1", MOSAIC_GPU_DUMP_PTXAS="1")

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from pallas_kernels.hopper.forward import forward  # noqa: E402
from tests.hopper.calls import Call  # noqa: E402

CAUSAL = {"is_causal": True}
CALLS = [
    *(Call(f"full_{h}", 1, 2048, 2048, 16, 16, h) for h in (64, 128, 256)),
    *(Call(f"causal_{h}", 1, 2048, 2048, 16, 16, h, options=CAUSAL) for h in (64, 128, 256)),
    Call("causal_64_short", 16, 1024, 1024, 16, 16, 64, options=CAUSAL),
    Call("window_128", 1, 4096, 4096, 16, 16, 128, options={"local_window_size": (1023, 0)}),
    Call("one_query", 1, 1, 4096, 32, 8, 128),
]


def main() -> None:
    """One line for each call: its registers, spilled bytes and the assembler's notes."""
    config = (pathlib.Path(__file__).parent / "h200.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=config)
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))
    place = NamedSharding(mesh, PartitionSpec())
    for call in CALLS:
        for old in DUMP.iterdir():
            old.unlink()
        made = call.call()
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), made.operands
        )
        jax.jit(lambda x, spec=made.spec: forward(spec, x)).lower(shapes).compile()
        text = "".join(path.read_text() for path in DUMP.glob("*.ptxas"))
        found = {
            "call": call.name,
            "registers": max(map(int, re.findall(r"Used (\d+) registers", text)), default=0),
            "spilled": sum(map(int, re.findall(r"(\d+) bytes spill stores", text))),
            "notes": sorted(set(re.findall(r"\(C7\d+\)[^\n]*", text))),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
