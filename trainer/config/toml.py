"""config <-> [config.toml]: a run's config as a file that can be given back with --config.

An option that is unset (None) is an absent key, since TOML has no null.
"""

import dataclasses
import tomllib
import typing
from pathlib import Path
from typing import Any, TypeVar

import dacite
import tomli_w

from patchmill.trainer.config.pretrain import PretrainConfig

Config = TypeVar("Config")


def to_toml(config: Any) -> str:
    """A config (any frozen dataclass of ours) as TOML text."""
    return tomli_w.dumps(_plain(config))


def from_toml(path: str | Path) -> PretrainConfig:
    """Reads a pretraining run's config.toml. Raises ValueError naming the file and the key that is wrong."""
    return read_toml(path, PretrainConfig)


def read_toml(path: str | Path, kind: type[Config]) -> Config:
    """Reads what `to_toml` wrote of a config of that kind. Raises ValueError as `from_toml`."""
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        # tuples are arrays in TOML; an array stays a list only where the field wants a list
        return dacite.from_dict(kind, _unset(kind, _tuples(table)), dacite.Config(strict=True))
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror or error}; give the config.toml of a run") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}; give the config.toml of a run") from error
    except dacite.DaciteError as error:
        raise ValueError(f"{path}: {error}; give the config.toml of a run of this version") from error


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
    """Absent keys of optional fields as None: they were unset when the run began, whatever today's default."""
    filled = dict(table)
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint) and isinstance(table.get(name), dict):
            filled[name] = _unset(typing.cast(type, hint), table[name])
        elif name not in table and type(None) in typing.get_args(hint):
            filled[name] = None
    return filled
