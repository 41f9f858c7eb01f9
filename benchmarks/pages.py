"""Writes result pages to benchmarks/results/, all in one layout."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def results_folder() -> Path:
    """$OUT, or benchmarks/results/."""
    folder = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a table: the first column reads as text, the others as numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def write_page(name: str, title: str, facts: dict[str, str], lines: Sequence[str], data: dict[str, Any]) -> str:
    """Writes NAME.md and NAME.json, and returns the page. Called again with more, it replaces both."""
    page = "\n".join([f"# {title}", "", *(f"- {key}: {value}" for key, value in facts.items()), "", *lines]) + "\n"
    folder = results_folder()
    (folder / f"{name}.md").write_text(page, encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps({"facts": facts, **data}, indent=1) + "\n", encoding="utf-8")
    return page
