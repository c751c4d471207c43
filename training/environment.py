"""What jax's libraries read when they are loaded. Imported before jax, it sets what nobody has."""

import contextlib
import gc
import os
import sys
import threading
import time

BEGAN = time.perf_counter()  # so much of the command: Python itself

# Of the many small objects that tracing and lowering make, nearly all live on: looking for garbage
# among them every 700th takes a fifth of their time.
gc.set_threshold(100_000, 10, 10)
# Of XLA's log, errors alone: it warns of what it then does well, and of what a report asks about.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# A trainer has its GPU to itself; jax takes three quarters. The rest is for CUDA's own.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
# What a layer of a loop keeps for backward goes into a stack; to write it there at once, XLA would
# compute it a second time, attention too.
_NO_SLICE_FUSION = "--xla_gpu_enable_dynamic_slice_fusion"
if _NO_SLICE_FUSION not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_NO_SLICE_FUSION}=false".strip()

_NOT_AHEAD = (
    "-h",
    "--help",
    "--target",
    "--coordinator-address",
    "--num-processes",
    "--process-id",
)


def keep_all() -> None:
    """Looks for no garbage until the start is over: of what is made till then hardly any is."""
    gc.disable()


def start_is_over() -> None:
    """Looks for garbage again, among what is made from here on."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def open_device() -> None:
    """Begins to open the device, in a thread, while the trainer's other modules are imported.

    CUDA takes about a second, without Python's lock. Not where the arguments ask for no device, as
    for help or a GPU that is not here, or for several processes, which join before they look.
    """
    import jax

    def open_it() -> None:
        with contextlib.suppress(RuntimeError):  # raised again where the device is asked for
            jax.devices()

    words = (word.replace("_", "-") for word in sys.argv[1:])
    if not any(word.startswith(_NOT_AHEAD) for word in words):
        threading.Thread(target=open_it).start()
