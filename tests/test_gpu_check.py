"""The runner behind `make gpu-check`: whatever a stage does, what has been written so far is kept and said."""

import json
import zipfile

from benchmarks import gpu_check
from benchmarks.gpu_check import Stage, all_stages, run

WRITE = "import os, pathlib; pathlib.Path(os.environ['OUT'], 'page.md').write_text('# {}')"
STEP = {"options": {"batch": 64}, "seconds": {"patchmill": [0.5, 0.25, 0.5], "published": [1.0]}}


def test_every_stage_leaves_what_it_has(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu_check, "SPARE_SECONDS", 0.0)
    rates = f"import os, pathlib; pathlib.Path(os.environ['OUT'], 'step_b16.json').write_text({json.dumps(STEP)!r})"
    stages = [
        Stage("beside", ["-c", WRITE.format("beside")], 30.0, beside=True),
        Stage("first", ["-c", WRITE.format("first")], 30.0),
        Stage("broken", ["-c", WRITE.format("broken") + "; raise SystemExit('of no use')"], 30.0),
        Stage("slow", ["-c", WRITE.format("slow") + "; import time; time.sleep(60)"], 2.0),
        Stage("step-b16", ["-c", rates], 30.0),
    ]
    assert run("an H200", stages, 100.0) == 2
    (page,) = tmp_path.glob("*.md")
    text = page.read_text()
    for line in ("- an H200", "- beside: passed", "- first: passed", "- broken: FAILED with exit code 1", "# slow"):
        assert line in text
    assert "- slow: FAILED: not done after 2 s" in text
    (archive,) = tmp_path.glob("*.zip")
    names = zipfile.ZipFile(archive).namelist()
    assert {f"{name}/page.md" for name in ("beside", "first", "broken", "slow")} <= set(names)
    assert "broken/log.txt" in names
    printed = capfd.readouterr().out
    assert "    of no use" in printed
    assert "step-b16, images/s: patchmill 128; published 64" in printed


def test_no_stage_begins_without_time(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    stages = [Stage("first", ["-c", "pass"], 30.0), Stage("second", ["-c", "pass"], 30.0)]
    monkeypatch.setattr(gpu_check, "SPARE_SECONDS", 1e6)
    assert run("nothing", stages, 100.0) == 2
    (page,) = tmp_path.glob("*.md")
    assert "second: FAILED: no time left" in page.read_text()


def test_stages_name_modules_that_are_there():
    names = [stage.name for stage in all_stages()]
    assert len(set(names)) == len(names)
    assert not all_stages()[-1].beside
    for stage in all_stages():
        if stage.name != "tests":
            module = stage.arguments[1].removeprefix("benchmarks.")
            assert (gpu_check.ROOT / "benchmarks" / f"{module}.py").is_file()
