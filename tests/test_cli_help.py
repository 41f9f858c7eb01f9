"""`patchmill --help` and `patchmill COMMAND --help`: every command has an example."""

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
