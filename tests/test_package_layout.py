"""The house keeps its order: who may import whom, what a bare GPU machine can import, no folder shadows a package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import patchmill
from patchmill.tools.cli import COMMANDS

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "pipeline", "trainer", "tools")
COMMAND_FILES = {path.stem for path in (ROOT / "tools").glob("*.py")} - {"cli", "demo"}
ROOMS = [  # a room imports from its own line and from the lines above
    {"kernels"},
    {"pipeline.config", "pipeline.atomic", "pipeline.observe", "pipeline.waits"},
    {"pipeline.read"},
    {"pipeline.plan"},
    {"pipeline.batch"},
    {"pipeline.decode"},
    {"pipeline.loader"},
    {"trainer.config"},
    {"trainer.recipes"},
    {"trainer.draw"},
    {"trainer.model"},
    {"trainer.flops"},
    {"trainer.engine"},
    {"trainer.checkpoints"},
    {"trainer.evaluate"},
    {"trainer.metrics"},
    {"trainer.run_folder"},
    {"trainer.loop"},
    {"trainer.pretrain"},
    {"tools.packing"},
    {"tools.profiler"},
    {"tools.console"},
    {"tools.cli"},
    {f"tools.{name}" for name in COMMAND_FILES} | {"tools.demo"},
]
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
    """Modules of the project that a file imports, nested imports included, without the leading `patchmill.`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found = [f"{module}.{alias.name}" for alias in node.names] if is_folder(module) else [module]
        else:
            continue
        yield from (name.removeprefix("patchmill.") for name in found if name.startswith("patchmill."))


def is_folder(module):
    """Whether `from module import name` imports modules: `patchmill.tools`, `patchmill.pipeline.read`."""
    return module.startswith("patchmill") and (ROOT / module.replace(".", "/")).is_dir()


def level(module):
    """(line of ROOMS, room) of a module; None for names of patchmill/__init__.py."""
    parts = module.split(".")
    prefixes = [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)]
    found = [(row, room) for room in prefixes for row, rooms in enumerate(ROOMS) if room in rooms]
    return found[0] if found else None


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        assert level(name), f"{name} is in no room of ROOMS"
        for imported in imports(path):
            if imported in patchmill.__all__:
                continue
            assert level(imported), f"{name} imports {imported}, which is in no room of ROOMS"
            assert level(imported)[0] <= level(name)[0], f"{name} imports {imported}, a room further up"


def test_a_file_in_tools_is_a_command_and_commands_import_no_commands():
    assert {name + "_" if name in ("import", "profile") else name for name in COMMANDS} == COMMAND_FILES
    for name in COMMAND_FILES:
        others = {f"tools.{other}" for other in COMMAND_FILES - {name}}
        assert not others & set(imports(ROOT / "tools" / f"{name}.py")), name


def test_public_names_load_on_first_use():
    script = "import sys, patchmill; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "False"]
    assert set(patchmill.__all__) <= set(dir(patchmill))
    for name in patchmill.__all__:
        assert getattr(patchmill, name) is not None
    assert patchmill.build_loader.__module__ == "patchmill.pipeline.loader"
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = patchmill.no_such_name


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_are_linked_and_shadow_nothing(folder):
    link = ROOT / "patchmill" / folder
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{folder}"
    # without __init__.py an installed package of the same name wins over the folder
    assert not list((ROOT / folder).rglob("__init__.py"))


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


def test_the_table_of_rooms_names_every_room():
    """docs/architecture.md has one row a room; `trainer/` and `tools/` stand for the files at their top."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = {line.split("`")[1].rstrip("/") for line in text.splitlines() if line.startswith("| `")}
    on_disk = {str(path.parent.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert named == on_disk
