"""Writes a run's config as TOML and reads it back for --config.

TOML has no null: an unset option (None) is an absent key.
"""

import dataclasses
import tomllib
import typing
from pathlib import Path
from typing import Any, TypeVar

import dacite
import tomli_w

from patchmill.pipeline.config import DataConfig
from patchmill.trainer.config.pretrain import PretrainConfig

Config = TypeVar("Config")


def to_toml(config: Any) -> str:
    """Returns a config (any of this folder's dataclasses) as TOML."""
    return tomli_w.dumps(_plain(config))


def from_toml(path: str | Path) -> PretrainConfig:
    """Reads the config.toml of a pretraining run. Raises ValueError that names the file and the wrong key."""
    return read_toml(path, PretrainConfig)


def read_toml(path: str | Path, kind: type[Config]) -> Config:
    """Reads a config of that kind from what `to_toml` wrote. Raises ValueError as `from_toml` does.

    Older probes and fine-tunings saved all options of `DataConfig`. Those that `kind` does not obey are dropped if they
    have their default, and refused otherwise.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        # TOML has arrays only: every array becomes a tuple, the sequence type of all configs
        table = _obeyed(kind, _tuples(table), path)
        return dacite.from_dict(kind, _unset(kind, table), dacite.Config(strict=True))
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror or error}; give the config.toml of a run") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}; give the config.toml of a run") from error
    except dacite.DaciteError as error:
        raise ValueError(f"{path}: {error}; give the config.toml of a run of this version") from error


def _obeyed(kind: type, table: dict[str, Any], path: str | Path) -> dict[str, Any]:
    hint, found, default = typing.get_type_hints(kind).get("data"), table.get("data"), DataConfig()
    if not isinstance(found, dict) or not isinstance(hint, type) or not issubclass(DataConfig, hint):
        return table
    ignored = {f.name for f in dataclasses.fields(DataConfig)} - {
        f.name for f in dataclasses.fields(typing.cast(Any, hint))
    }
    for name in sorted(ignored & found.keys()):
        if found[name] != getattr(default, name):
            raise ValueError(f"{path}: this command does not obey data.{name} = {found[name]!r}; remove that line")
    return table | {"data": {name: value for name, value in found.items() if name not in ignored}}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        items = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {name: _plain(item) for name, item in items if item is not None}
    return list(value) if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _unset(cls: type, table: dict[str, Any]) -> dict[str, Any]:
    """Sets absent keys of optional fields to None: they were unset when the run began, whatever the default is now."""
    filled = dict(table)
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint) and isinstance(table.get(name), dict):
            filled[name] = _unset(typing.cast(type, hint), table[name])
        elif name not in table and type(None) in typing.get_args(hint):
            filled[name] = None
    return filled
