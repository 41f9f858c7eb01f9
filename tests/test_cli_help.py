"""`patchmill --help` and `patchmill COMMAND --help`: every command has an example."""

import re
import subprocess
import sys

import pytest

from patchmill.tools import cli


@pytest.mark.parametrize("command", [*cli.COMMANDS, "profile plan", "profile diff"])
def test_every_command_s_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run(command.split()[0], [*command.split()[1:], "--help"])
    assert ended.value.code == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert any(line == f"patchmill {command}" or line.startswith(f"patchmill {command} ") for line in lines)


@pytest.mark.parametrize("word", ["help", "--help", "-h"])
def test_help_lists_every_command(word, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["patchmill", word])
    assert cli.main() == 0
    said = capsys.readouterr().out
    assert all(f"  {command} " in said for command in cli.COMMANDS)


READ = {"decoder", "interpolation", "workers", "prefetch-batches", "max-bad-fraction", "timeout-seconds", "cache-dir"}
READ |= {"cache-limit-gib"}
VIEW = READ | {"path", "crop", "crop-rule", "scale", "ratio", "crop-fraction", "flip", "colour-jitter"}
VIEW |= {"quarantine-path"}
EPOCH = VIEW | {"shuffle", "window-shards", "last-batch"}


@pytest.mark.parametrize(
    ("command", "needed", "obeyed"),
    [
        ("evaluate", ["--classifier", "x", "--tests", "x"], READ),
        ("knn", [], READ | {"path"}),
        ("spectrum", ["--checkpoints", "x", "--out", "x.png"], READ | {"path"}),
        ("features", ["--checkpoint", "x", "--out", "x.parquet"], VIEW),
        ("probe", [], EPOCH),
        ("finetune", [], EPOCH),
    ],
)
def test_a_command_shows_the_options_of_data_that_it_obeys_and_refuses_others(command, needed, obeyed, capsys):
    with pytest.raises(SystemExit):
        cli.run(command, ["--help"])
    assert set(re.findall(r"--data\.([a-z-]+)", capsys.readouterr().out)) - {"no-flip"} == obeyed
    with pytest.raises(SystemExit) as ended:
        cli.run(command, [*needed, "--data.repeats", "2"])
    assert ended.value.code == 2
    assert "Unrecognized options: --data.repeats" in capsys.readouterr().err


def test_the_package_runs_as_a_module_like_the_script():
    line = [sys.executable, "-m", "patchmill", "recipes", "mae-tiny"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert "[model]" in done.stdout


@pytest.mark.parametrize("words", [["recipes"], ["info", "--help"], ["shard", "--help"], ["launch", "--help"]])
def test_commands_that_only_print_text_load_no_torch(words):
    """It takes seconds to import."""
    script = """
import sys
from patchmill.tools import cli
try:
    cli.run(sys.argv[1], sys.argv[2:])
except SystemExit:
    pass
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script, *words], stdout=subprocess.DEVNULL, check=True)
