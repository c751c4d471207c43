"""What jax's libraries read when they are loaded. Imported before jax, it sets what nobody has."""

import os

# Of XLA's log, errors alone: it warns of what it then does well, and of what a report asks about.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# A trainer has its GPU to itself; jax takes three quarters. The rest is for CUDA's own.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
