"""Names for what attention's backward needs of its forward, so that a policy can keep it."""

from __future__ import annotations

from typing import Any

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

__all__ = ["CHECKPOINT_NAMES", "named"]

OUTPUT, LOG_SUM_EXP = "jattn_output", "jattn_log_sum_exp"

# For `jax.checkpoint_policies.save_only_these_names(*CHECKPOINT_NAMES)` and its like.
CHECKPOINT_NAMES = (OUTPUT, LOG_SUM_EXP)


def named[T](out: Array, lse: T) -> tuple[Array, T]:
    """A call's output, and its log-sum-exp or all that is kept of it, under those names.

    To stand inside the forward rule of a `custom_vjp`, on what is returned as on what is saved: a
    policy that keeps both leaves nothing of forward to be run again.
    """
    name: Any = checkpoint_name
    return name(out, OUTPUT), jax.tree.map(lambda x: name(x, LOG_SUM_EXP), lse)
