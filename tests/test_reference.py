"""The float64 reference itself: gradients by finite differences, masks against drawings."""

from __future__ import annotations

import numpy as np
import pytest

from tests import reference


def drawn(rows: str) -> reference.Bools:
    return np.array([[c == "#" for c in row] for row in rows.split()])


@pytest.mark.parametrize(
    ("sizes", "options", "rows"),
    [
        ((3, 5), {"causal": True}, "#.... ##... ###.."),
        ((3, 5), {"causal": True, "alignment": "bottom_right"}, "###.. ####. #####"),
        ((4, 2), {"causal": True, "alignment": "bottom_right"}, ".. .. #. ##"),
        ((4, 4), {"window": (1, 0)}, "#... ##.. .##. ..##"),
        ((4, 4), {"window": 1}, "##.. ###. .### ..##"),
        ((2, 4), {"window": (1, 1), "alignment": "bottom_right"}, ".### ..##"),
        ((3, 3), {"key_lengths": [2], "query_lengths": [2]}, "##. ##. ..."),
        ((3, 3), {"query_segments": [[4, 4, 1]], "key_segments": [[1, 4, 4]]}, ".## .## #.."),
        ((2, 2), {"causal": True, "mask": np.array([[False, True], [True, True]])}, ".. ##"),
    ],
)
def test_the_mask_is_the_drawing(sizes: tuple[int, int], options: dict, rows: str) -> None:
    seen = reference.visible(1, *sizes, **options)
    np.testing.assert_array_equal(seen[0, 0], drawn(rows))


def test_without_options_it_is_softmax() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, n, 1, 3)) for n in (2, 4, 4))
    got = reference.attention(q, k, v, seen=reference.visible(1, 2, 4))
    weights = np.exp(q[0, :, 0] @ k[0, :, 0].T / np.sqrt(3.0))
    expected = (weights / weights.sum(axis=1, keepdims=True)) @ v[0, :, 0]
    np.testing.assert_allclose(got.out[0, :, 0], expected, rtol=1e-12)
    np.testing.assert_allclose(got.lse[0, :, 0], np.log(weights.sum(axis=1)), rtol=1e-12)


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize(
    "bias_shape", [None, (2, 4, 3, 5), (1, 4, 1, 5), (2, 1, 3, 1), (1, 1, 1, 1)]
)
@pytest.mark.parametrize("extras", [False, True])
def test_gradients_are_finite_differences(
    soft_cap: float | None, bias_shape: tuple[int, ...] | None, extras: bool
) -> None:
    rng = np.random.default_rng(1)
    b, t, s, n, k, h, d = 2, 3, 5, 4, 2, 3, 2
    x = {
        "q": rng.standard_normal((b, t, n, h)),
        "k": rng.standard_normal((b, s, k, h)),
        "v": rng.standard_normal((b, s, k, d)),
    }
    if bias_shape is not None:
        x["bias"] = rng.standard_normal(bias_shape)
    keep, rate = None, 0.0
    seen = reference.visible(b, t, s)
    if extras:
        x["sinks"] = rng.standard_normal(n)
        keep, rate = rng.random((b, n, t, s)) < 0.6, 0.4
        seen = reference.visible(
            b, t, s, causal=True, alignment="bottom_right", query_lengths=[3, 2], key_lengths=[5, 0]
        )
    dout, dlse = rng.standard_normal((b, t, n, d)), rng.standard_normal((b, t, n))

    def run() -> reference.Attention:
        operands = dict(x)
        return reference.attention(
            **operands, seen=seen, scale=0.7, soft_cap=soft_cap, keep=keep, rate=rate
        )

    def objective() -> float:
        result = run()
        alive = np.isfinite(result.lse)
        return float((result.out * dout).sum() + (result.lse[alive] * dlse[alive]).sum())

    gradients = run().gradients(dout, dlse)
    assert gradients.keys() == x.keys()
    step = 1e-5
    for name, value in x.items():
        numeric = np.zeros_like(value)
        for index in np.ndindex(value.shape):
            kept = value[index]
            value[index] = kept + step
            above = objective()
            value[index] = kept - step
            numeric[index] = (above - objective()) / (2 * step)
            value[index] = kept
        np.testing.assert_allclose(gradients[name], numeric, rtol=1e-6, atol=1e-8, err_msg=name)


def test_magnitudes_bound_the_results() -> None:
    rng = np.random.default_rng(2)
    q, k, v, dout = (rng.standard_normal((1, 6, 2, 4)) for _ in range(4))
    bias, dlse = rng.standard_normal((1, 1, 1, 6)), rng.standard_normal((1, 6, 2))
    result = reference.attention(q, k, v, seen=reference.visible(1, 6, 6, causal=True), bias=bias)
    magnitudes = result.magnitudes(dout, dlse)
    for name, value in {"out": result.out, **result.gradients(dout, dlse)}.items():
        assert (np.abs(value) <= magnitudes[name] * (1 + 1e-12)).all(), name
