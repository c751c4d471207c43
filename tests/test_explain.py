"""What `jattn.explain` says beside the choice: its hints, and of devices that are not here."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jattn


def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


class TestHints:
    @pytest.mark.parametrize("kv_heads", [8, 2, 1])
    def test_heads_and_lengths_that_look_swapped(self, kv_heads: int) -> None:
        query, key = shape(2, 8, 1024, 64), shape(2, kv_heads, 1024, 64)
        (hint,) = jattn.explain(query, key, key).hints
        assert "(B, N, T, H)" in hint
        assert "jnp.swapaxes(x, 1, 2)" in hint
        assert f"hint: {hint}" in str(jattn.explain(query, key, key)).splitlines()
        query, key = (shape(2, 1024, n, 64) for n in (8, kv_heads))
        assert jattn.explain(query, key, key).hints == ()

    def test_one_query_of_a_cache_is_no_reason_for_it(self) -> None:
        query, key = shape(2, 1, 8, 64), shape(2, 1024, 8, 64)
        assert jattn.explain(query, key, key).hints == ()


class TestDevice:
    """The answer of a device that is not here, as a call traced for it would get it."""

    x = shape(1, 1024, 8, 64)

    @pytest.mark.parametrize(
        ("device", "kernel"),
        [
            ("cpu", "XLA"),
            ("V100", "XLA"),
            ("T4", "XLA"),
            ("A100", "cuDNN"),
            ("NVIDIA A100-SXM4-80GB", "cuDNN"),
            ("h100", "Hopper"),
            ("NVIDIA H100 80GB HBM3", "Hopper"),
            ("B200", "cuDNN"),
            ("L4", "cuDNN"),
            ("RTX 4090", "cuDNN"),
        ],
    )
    def test_its_kernel_runs(self, device: str, kernel: str) -> None:
        explained = jattn.explain(self.x, self.x, self.x, is_causal=True, device=device)
        assert kernel in str(explained.kernel)
        assert explained.target in str(explained)

    @pytest.mark.parametrize(("length", "by"), [(4096, True), (8, False)])
    def test_it_is_said_where_documents_tiles_are_counted(self, length: int, *, by: bool) -> None:
        x, ids = shape(1, length, 8, 128), shape(1, length, dtype=jnp.int32)
        segments: dict[str, Any] = {"query_segment_ids": ids, "key_value_segment_ids": ids}
        found = jattn.explain(x, x, x, implementation="flash", device="H100", **segments)
        assert ("from a counter" in str(found.kernel)) == by
        assert "counter" not in str(jattn.explain(x, x, x, device="H100").kernel)

    def test_its_limits_are_those_that_count(self) -> None:
        """Shared memory bounds float32's head dims: 227 KiB on an H100, 163 on A100, 99 on L4."""
        widest = {}
        for device in ("H100", "A100", "L4"):
            for head_dim in (128, 256, 512):
                x = shape(1, 128, 2, head_dim, dtype=jnp.float32)
                found = jattn.explain(x, x, x, implementation="flash", device=device)
                if found.chosen is not None:
                    widest[device] = head_dim
        assert widest == {"H100": 512, "A100": 256, "L4": 128}

    def test_the_rest_of_the_process_is_as_before(self) -> None:
        before = jattn.explain(self.x, self.x, self.x)
        jattn.explain(self.x, self.x, self.x, device="H100")
        assert jattn.explain(self.x, self.x, self.x) == before

    @pytest.mark.parametrize("device", ["", "H1000", "gpu", "TPU v5", 3])
    def test_an_unknown_name_is_answered_with_the_known_ones(self, device: Any) -> None:
        with pytest.raises(ValueError, match=r"device must be one of 'cpu', .*'H100'") as caught:
            jattn.explain(self.x, self.x, self.x, device=device)
        assert repr(device) in str(caught.value)


def test_where_nothing_can_run_a_line_says_what_would_help() -> None:
    x = shape(1, 8, 2, 64)
    explained = jattn.explain(x, x, x, implementation=("flash", "cudnn"), device="cpu")
    assert explained.chosen is None
    (line,) = [line for line in str(explained).splitlines() if line.startswith("nothing")]
    assert "(flash, cudnn)" in line
    assert "UnsupportedAttentionError" in line
    assert line.endswith("these can: memory_efficient, eager")
    assert "nothing that may run" not in str(jattn.explain(x, x, x, device="cpu"))
