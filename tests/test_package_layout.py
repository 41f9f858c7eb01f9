"""The house keeps its order: who may import whom, what a bare GPU machine can import, no folder shadows a package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "kernels": {"kernels"},
    "pipeline": {"kernels", "pipeline"},
    "trainer": {"kernels", "pipeline", "trainer"},
    "tools": {"kernels", "pipeline", "trainer", "tools"},
}
LIGHT_MODULES = [
    "patchmill.kernels.gather",
    "patchmill.kernels.masked_loss",
    "patchmill.kernels.permute",
    "patchmill.kernels.unshuffle",
    "patchmill.trainer.model.mae",
    "patchmill.trainer.metrics",
    "patchmill.trainer.engine.optim",
    "patchmill.trainer.recipes.pretrain",
    "patchmill.trainer.engine.step",
    "patchmill.trainer.engine.world",
]


def imports(path):
    """Names of the modules a file imports, nested imports included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder):
    files = sorted((ROOT / folder).glob("*.py"))
    assert files
    for path in files:
        rooms = {name.split(".")[1] for name in imports(path) if name.startswith("patchmill.") and name.count(".")}
        rooms &= MAY_IMPORT.keys()
        assert rooms <= MAY_IMPORT[folder], f"{path.name} imports {rooms - MAY_IMPORT[folder]}"


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_are_linked_and_shadow_nothing(folder):
    link = ROOT / "patchmill" / folder
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{folder}"
    # without __init__.py an installed package of the same name wins over the folder
    assert not (ROOT / folder / "__init__.py").exists()


def test_model_and_step_import_with_torch_numpy_and_safetensors_alone():
    allowed = {"patchmill", "torch", "numpy", "safetensors", "triton"}
    script = f"""
import importlib, sys
import torch, numpy, safetensors.torch
before = set(sys.modules)
for name in {LIGHT_MODULES!r}:
    importlib.import_module(name)
import sysconfig
site = sysconfig.get_paths()["purelib"]
new = {{name.split(".")[0] for name in set(sys.modules) - before
       if site in (getattr(sys.modules[name], "__file__", None) or "")}}
print(" ".join(sorted(new - {allowed!r})))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


def test_the_map_of_the_house_names_every_file():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for folder in MAY_IMPORT:
        rooms = text.split(f"### {folder}/", 1)[1].split("### ", 1)[0]
        on_disk = {path.name for path in (ROOT / folder).glob("*.py")}
        on_map = {line.split("`")[1] for line in rooms.splitlines() if line.startswith("| `")}
        assert on_map == on_disk
