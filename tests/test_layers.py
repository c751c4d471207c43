"""The order of the layers: each imports only what stands below it."""

from __future__ import annotations

import ast
import pathlib

import jattn

ROOT = pathlib.Path(jattn.__file__).parent.parent
# From the ground up; a name stands for a module or a whole folder.
LAYERS = (
    "jattn.call jattn.zigzag",
    "pallas_kernels",
    "jattn.transforms",
    "jattn.backends",
    "jattn.attention jattn.explain",
    "jattn jattn.flash_attention jattn.flax",
)


def layer_of(module: str) -> int | None:
    """The layer with the longest of the names that the module's begins with."""
    names = {name: i for i, layer in enumerate(LAYERS) for name in layer.split()}
    parents = [module.rsplit(".", n)[0] for n in range(module.count(".") + 1)]
    return next((names[name] for name in parents if name in names), None)


def imported(file: pathlib.Path) -> set[str]:
    found = set[str]()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def test_each_layer_imports_only_what_stands_below_it() -> None:
    files = [*ROOT.glob("jattn/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")]
    assert len(files) > 50
    for file in files:
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        own = layer_of(module)
        assert own is not None
        for name in imported(file):
            other = layer_of(name)
            assert other is None or other <= own, f"{module} imports {name}"


def test_the_ground_has_no_import_circle() -> None:
    """Nor has any folder: modules are imported in some order, one at a time."""
    kernels = ("pallas_kernels/portable", "pallas_kernels/hopper")
    for folder in ("jattn/call", "jattn/transforms", "jattn/backends", *kernels):
        files = {file.stem: imported(file) for file in (ROOT / folder).glob("*.py")}
        dotted = folder.replace("/", ".")
        needs = {
            stem: {o for o in files if o != stem for name in names
                   if name == f"{dotted}.{o}" or name.startswith(f"{dotted}.{o}.")}
            for stem, names in files.items()
        }  # fmt: skip
        while needs:
            free = [stem for stem, others in needs.items() if not others & needs.keys()]
            assert free, f"a circle in {folder}: {sorted(needs)}"
            needs = {stem: others for stem, others in needs.items() if stem not in free}
