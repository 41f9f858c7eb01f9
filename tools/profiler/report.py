"""Reads and writes report.json: everything that was measured, concluded and assumed.

docs/profile.md documents the schema. It has a number, and reports of another number are refused.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from patchmill.pipeline.atomic import whole_file

SCHEMA = 1
FILE = "report.json"


def write(report: dict[str, Any], folder: Path) -> Path:
    """Writes report.json whole or not at all; returns its path."""
    with whole_file(folder / FILE) as path:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return folder / FILE


def read(path: Path) -> dict[str, Any]:
    """Reads a report from its file or its folder. Raises ValueError for anything else."""
    file = path / FILE if path.is_dir() else path
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no report at {path}: `patchmill profile loader --out {path} ...` writes one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a report ({error}); give a folder that `patchmill profile` wrote") from None
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        found = report.get("schema") if isinstance(report, dict) else None
        raise ValueError(f"{file} has schema {found!r}, expected {SCHEMA}: profile again")
    return report


def plain(value: Any) -> Any:
    """Converts to JSON's types: dicts of dataclasses, lists, string keys, and None for floats that are not finite."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(vars(value))
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, Path | torch.device):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
