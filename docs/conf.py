"""How Sphinx builds the site. Every page's code runs, in a process of its own, on the CPU."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version as version_of
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# What the pages' processes are given: this checkout, several devices, and nothing but results on
# their standard error, which would fail the build.
os.environ["PYTHONPATH"] = str(ROOT)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
# A page's process else warns that it talks to the build over an open port of this machine.
os.environ["IPYTHONDIR"] = str(ROOT / "build/ipython")
PROFILE = ROOT / "build/ipython/profile_default"
PROFILE.mkdir(parents=True, exist_ok=True)
(PROFILE / "ipython_kernel_config.py").write_text(
    "c = get_config()\nc.IPKernelApp.log_level = 'ERROR'\nc.HistoryManager.enabled = False\n"
)

project = "jattn"
author = "The jattn authors"
release = version_of("jattn")
html_title = f"jattn {release}"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb"]
exclude_patterns = ["shown"]

html_theme = "furo"
html_static_path = ["style"]
html_css_files = ["site.css"]
html_show_sphinx = html_show_copyright = html_copy_source = False
pygments_style, pygments_dark_style = "friendly", "monokai"

myst_heading_anchors = 3
smartquotes_action = "qe"  # two dashes are an option's
myst_enable_extensions = ["colon_fence", "deflist"]
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # seconds a cell
nb_merge_streams = True
nb_output_stderr = "warn"

default_role = "code"  # a docstring's `x`
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {name: name for name in ("ArrayLike", "Alignment", "Shaped")}
maximum_signature_line_length = 60
python_use_unqualified_type_names = True
add_module_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
