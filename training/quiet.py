"""Keeps what libraries write to standard error, XLA's C++ among them, apart from our lines."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def library_log(path: Path) -> Iterator[None]:
    """Inside, standard error goes to a file, which is only left there if something is in it.

    An exception that leaves the block has it all written to standard error after all: what a
    library said last is then often the reason.

    Args:
        path: the file; what it holds already is kept.
    """
    sys.stderr.flush()
    own = os.dup(2)
    with path.open("ab") as file:
        begin = file.tell()
        os.dup2(file.fileno(), 2)
        try:
            yield
        except Exception:
            sys.stderr.flush()
            os.dup2(own, 2)
            with path.open("rb") as written, os.fdopen(os.dup(own), "wb") as stderr:
                written.seek(begin)
                shutil.copyfileobj(written, stderr)
            raise
        finally:
            sys.stderr.flush()
            os.dup2(own, 2)
            os.close(own)
    if path.stat().st_size == 0:
        path.unlink()
