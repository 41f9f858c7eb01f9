"""The runner behind `make gpu-check`: whatever a stage does, what has been written so far is kept and said."""

import importlib
import json
import zipfile

import pytest

from benchmarks import gpu_check, steps
from benchmarks.gpu_check import CALLS, TOTAL_SECONDS, Stage, as_dry_run, chosen_groups, main, reserved, run
from patchmill.tools.profiler.timing import torch_threads

WRITE = "import os, pathlib; pathlib.Path(os.environ['OUT'], 'page.md').write_text('# {}')"
STEP = {"options": {"batch": 64}, "seconds": {"patchmill": [0.5, 0.25, 0.5], "published": [1.0]}}
STAGES = [stage for call in CALLS.values() for group in call() for stage in group]
SAME = {"tests", "step-h14", "ceilings-l16-h14"}
"""run in processes below, or like another stage at the sizes of a dry run"""


def test_every_stage_leaves_what_it_has(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(gpu_check, "SPARE_SECONDS", 0.0)
    guess = tmp_path / "cache" / "ab" / "kernel.best_config"
    guess.parent.mkdir(parents=True)
    guess.touch()
    rates = f"import os, pathlib; pathlib.Path(os.environ['OUT'], 'step_b16.json').write_text({json.dumps(STEP)!r})"
    groups = [
        [Stage("slow", ["-c", WRITE.format("slow") + "; import time; time.sleep(600)"], 10.0)],
        [Stage("beside", ["-c", WRITE.format("beside")], 30.0), Stage("first", ["-c", WRITE.format("first")], 30.0)],
        [Stage("broken", ["-c", WRITE.format("broken") + "; raise SystemExit('of no use')"], 30.0)],
        [Stage("step-b16", ["-c", rates], 30.0)],
    ]
    assert run("gpu_check", "an H200", groups, reserved(groups)) == 2
    (page,) = tmp_path.glob("*.md")
    text = page.read_text()
    for line in ("- an H200", "- beside: passed", "- first: passed", "- broken: FAILED with exit code 1", "# slow"):
        assert line in text
    assert "- slow: FAILED: not done after" in text
    (archive,) = tmp_path.glob("*.zip")
    names = zipfile.ZipFile(archive).namelist()
    assert {f"{name}/page.md" for name in ("beside", "first", "broken", "slow")} <= set(names)
    assert "broken/log.txt" in names
    printed = capfd.readouterr().out
    assert "    of no use" in printed
    assert "step-b16, images/s: patchmill 128; published 64" in printed
    assert not guess.exists()  # launch settings found while stages shared the device


def test_no_stage_begins_without_time(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    groups = [[Stage("first", ["-c", "pass"], 30.0)], [Stage("second", ["-c", "pass"], 30.0)]]
    monkeypatch.setattr(gpu_check, "SPARE_SECONDS", 1e6)
    assert run("gpu_check", "nothing", groups, 100.0) == 2
    (page,) = tmp_path.glob("*.md")
    assert "second: FAILED: no time left" in page.read_text()


@pytest.mark.parametrize("code", [0, 1])
def test_checks_are_left_out_once_tests_have_passed(code, tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    show = Stage("kernels", ["-c", "import sys; print('given', *sys.argv[1:])"], 30.0, once_tested=("--no-check",))
    run("gpu_check", "nothing", [[Stage("tests", ["-c", f"raise SystemExit({code})"], 30.0)], [show]], 100.0)
    (archive,) = tmp_path.glob("*.zip")
    log = zipfile.ZipFile(archive).read("kernels/log.txt").decode()
    assert log.strip() == ("given" if code else "given --no-check")


@pytest.mark.parametrize("name", CALLS)
def test_what_stages_reserve_fits_the_call(name):
    groups = CALLS[name]()
    assert reserved(groups) <= TOTAL_SECONDS
    names = [stage.name for group in groups for stage in group]
    assert len(set(names)) == len(names)


def test_a_step_comes_with_what_compiles_for_it():
    def names(*wanted: str) -> list[list[str]]:
        return [[stage.name for stage in group] for group in chosen_groups(CALLS["gpu_check"](), list(wanted))]

    compiled = ["compile-b16", "compile-b16-published"]
    assert names("step-b16") == names("compile-b16") == [compiled, ["step-b16"]]
    assert names("tests", "kernels") == [["tests"], ["kernels"]]
    assert chosen_groups(CALLS["gpu_check"](), None) == CALLS["gpu_check"]()


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage.name not in SAME], ids=lambda stage: stage.name)
def test_a_dry_run_of_each_stage_writes_its_page(stage, tmp_path, monkeypatch):
    """In this process, with the options that a GPU gets and the sizes of a dry run after them."""
    monkeypatch.setenv("OUT", str(tmp_path))
    with torch_threads(1):
        check_page(stage, tmp_path, monkeypatch)


def check_page(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "COMPILE_BACKEND", "eager")
    module, arguments = stage.arguments[1], as_dry_run(stage).arguments[2:] + list(stage.once_tested)
    assert importlib.import_module(module).main(arguments) == 0
    (page,) = tmp_path.glob("*.md")
    (data,) = tmp_path.glob("*.json")
    facts = json.loads(data.read_text())["facts"]
    assert facts["command"].startswith(f"python -m {module}")
    if stage.name.startswith("step"):
        assert "| patchmill" in page.read_text()


def test_a_dry_run_goes_through_processes(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OUT", str(tmp_path))
    assert main(["--dry-run", "--stages", "tests", "ceilings-b16"]) == 0
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".zip"}
    printed = capfd.readouterr().out
    assert "tests: passed" in printed
    assert "ceilings-b16: passed" in printed


def test_a_name_that_no_stage_has_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--stages", "step-b32"])
    assert "no stage step-b32; expected some of: tests, compile-b16" in capsys.readouterr().err
