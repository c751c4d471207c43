"""`jax.shard_map` over rows and heads of calls that other processes than this would compile.

Those of the Hopper kernels interpreted, and of cuDNN as it is lowered for a CPU, with fewer key
heads than query heads. (tests/test_cudnn_compiled.py and tests/hopper/compile_sharded.py have both
as they are lowered for GPUs.)
"""

from __future__ import annotations

import pytest

from tests.cases import thorough
from tests.four_devices import run

HOPPER = """
from jax._src.pallas.mosaic_gpu.interpret.shared_memory import GPUSharedMemory
from tests.hopper import exact
from tests.hopper.calls import Half
from tests.shard_mapped import check

# At a kernel's end the interpreter looks for barriers left over, and finds other devices' own.
GPUSharedMemory.assert_no_barriers_allocated = lambda self: None
case = Half("sharded", 2, 70, 90, 4, 2, 64, causal=True, sinks=True)
check(exact.INTERPRETED, case, check_vma={check_vma}, inside={inside})
"""
CUDNN = """
from jattn.call.target import asking_about
from tests import cudnn_calls
from tests.cases import Case
from tests.shard_mapped import check

case = Case("sharded", 2, 40, 24, 4, 2, 16, causal=True, dtype="bfloat16")
with cudnn_calls.assumed(), asking_about("A100"):
    check(
        cudnn_calls.CUDNN, case, check_vma={check_vma}, inside={inside}, residual=False
    )
"""
PROGRAMS = {"cudnn": CUDNN, "hopper": HOPPER}


@pytest.mark.parametrize(
    ("name", "check_vma", "inside"),
    [
        ("cudnn", True, False),
        *thorough(
            ("cudnn", True, True),
            ("cudnn", False, False),
            ("cudnn", False, True),
            ("hopper", True, False),
            ("hopper", False, True),
        ),
    ],
)
def test_gradients_are_as_exact(name: str, *, check_vma: bool, inside: bool) -> None:
    program = PROGRAMS[name].format(check_vma=check_vma, inside=inside)
    run(program, kind="hopper" if name == "hopper" else "")
