"""The order in which a warpgroup's registers hold a matrix, against the PTX manual's figure."""

from __future__ import annotations

import numpy as np
import pytest

from pallas_kernels.hopper.instructions import from_fragments, to_fragment


@pytest.mark.parametrize("columns", [8, 64])
def test_fragment_order_is_that_of_the_manual(columns: int) -> None:
    """Figure "WGMMA .m64nNk16 register fragment layout for accumulator matrix D"."""
    x = np.arange(64 * columns, dtype=np.float32).reshape(64, columns)
    fragment = np.asarray(to_fragment(x)).reshape(columns // 8, 128, 4)
    for thread in range(128):
        row, column = 16 * (thread // 32) + thread % 32 // 4, thread % 4 * 2
        for group in range(columns // 8):
            first = 8 * group + column
            expected = [x[row, first], x[row, first + 1], x[row + 8, first], x[row + 8, first + 1]]
            np.testing.assert_array_equal(fragment[group, thread], expected)


def test_fragments_come_back_as_they_were() -> None:
    x = np.random.default_rng(0).standard_normal((3, 64, 24)).astype(np.float32)
    fragments = np.stack([np.asarray(to_fragment(one)) for one in x])
    np.testing.assert_array_equal(from_fragments(fragments, 24), x)
