"""What a block's backward computes again instead of keeping it."""

from collections.abc import Callable
from typing import Literal

import jax

from jattn import CHECKPOINT_NAMES

Rematerialize = Literal["nothing", "elementwise", "block", "everything"]

# What a block keeps for backward, beside its input; "nothing" is recomputed where all is kept.
NORMALIZED, HEADS, GATES = "normalized", "rotated heads", "gates"
_KEPT: dict[str, tuple[str, ...]] = {
    "elementwise": (*CHECKPOINT_NAMES, NORMALIZED, HEADS, GATES),
    "block": tuple(CHECKPOINT_NAMES),
    "everything": (),
}


def rematerialized[**P, R](
    block: Callable[P, R], what: Rematerialize, *, in_a_loop: bool = False
) -> Callable[P, R]:
    """A block of which backward finds its arguments and what is not to be computed again.

    Args:
        block: a function of arrays; what it names NORMALIZED, HEADS and GATES can be kept.
        what: nothing is computed again; or what is no matrix product (elementwise); or the whole
            block but attention, of which the output and log-sum-exp are kept (block); or attention
            too (everything).
        in_a_loop: it is the body of a loop, which already keeps backward's computations apart from
            forward's.
    """
    if what == "nothing":
        return block
    keep = jax.checkpoint_policies.save_only_these_names(*_KEPT[what])
    return jax.checkpoint(block, policy=keep, prevent_cse=not in_a_loop)
