"""What `import jattn` imports of the kernels: any of it can be first, and none is a kernel."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import jattn

ROOT = pathlib.Path(jattn.__file__).parent.parent
# Of what `jattn` itself imports of the kernels, as any circle goes through one of these, each is
# the first import of a fork.
PROGRAM = """
import importlib, os, traceback
import jax
asked, answer = os.pipe()
if os.fork() == 0:
    import sys, jattn
    os.write(answer, " ".join(sys.modules).encode())
    os._exit(0)
os.close(answer)
loaded = os.fdopen(asked).read().split()
os.wait()
print(*(x for x in loaded if x.startswith(("jax.experimental.pallas", "jax.experimental.mosaic"))))
names = [x for x in loaded if x.startswith("pallas_kernels")]
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


def test_every_module_can_be_the_first_and_imports_no_kernel() -> None:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    languages, *circles, count = run.stdout.splitlines()
    assert circles == []
    # Not every build of jax has Mosaic GPU, which takes a third of a second to import.
    assert languages == ""
    assert int(count) > 5
