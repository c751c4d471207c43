"""Whatever module of the kernels is imported first, it can be: no circle runs through `jattn`."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import jattn

ROOT = pathlib.Path(jattn.__file__).parent.parent
# Of what `jattn` itself imports of the kernels, as any circle goes through one of these, each is
# the first import of a fork.
PROGRAM = """
import importlib, os, subprocess, sys, traceback
asked = "import sys, jattn; print(*(x for x in sys.modules if x.startswith('pallas_kernels')))"
names = subprocess.check_output([sys.executable, "-c", asked], text=True).split()
import jax
for name in names:
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
        except BaseException:
            print(name, traceback.format_exc(limit=1).splitlines()[-1], flush=True)
        os._exit(0)
    os.waitpid(child, 0)
print(len(names))
"""


def test_every_module_can_be_the_first() -> None:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *circles, count = run.stdout.splitlines()
    assert circles == []
    assert int(count) > 5
