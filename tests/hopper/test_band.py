"""What a band hides from a tile's queries, by a minimum of exponents."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hopper.seam import Seam


@pytest.mark.parametrize(
    ("lower", "upper"), [(None, 0), (None, -37), (-300, 0), (5, 133), (-1100, -972), (-50, None)]
)
def test_powers_of_what_a_band_hides_are_zero(lower: int | None, upper: int | None) -> None:
    seam = Seam(interpret=True)
    x = np.random.default_rng(0).uniform(-9, 9, (64, 64)).astype(np.float32)
    x[0, 0] = x[63, 63] = np.nan
    edges = [end for end in (lower, upper) if end is not None]
    for ahead in {end + more for end in edges for more in (-64, -63, -1, 0, 1, 40, 63, 64)}:
        given = jnp.asarray(x), jnp.int32(ahead), lower, upper
        expected = np.asarray(jnp.exp2(seam.banded(*given, -np.inf)))
        hidden = np.isneginf(seam.banded(jnp.zeros((64, 64)), *given[1:], -np.inf))
        found = np.asarray(jnp.exp2(seam.hidden_by_band(*given)))
        np.testing.assert_array_equal(found[hidden], 0)
        seen = ~hidden & ~np.isnan(x)
        np.testing.assert_array_equal(found[seen], expected[seen])
        assert not np.isfinite(found[~hidden & np.isnan(x)]).any()
