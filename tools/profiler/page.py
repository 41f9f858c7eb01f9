"""Writes report.html: one page, with nothing outside it, that says what binds and shows why."""

import html
from collections.abc import Iterator
from typing import Any

from patchmill.tools.profiler.bottleneck import rounded
from patchmill.tools.profiler.charts import charts, svg
from patchmill.tools.profiler.diff import numbers
from patchmill.tools.profiler.tables import Table, tables

STYLE = """
:root { --ink: #1d2733; --soft: #5c6b7a; --line: #dde3ea; --blue: #1f4e8c; --wash: #f5f7fa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink); font: 15px/1.5 system-ui, Helvetica, Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 15px; color: var(--soft); margin: 0 0 10px; }
h2 { font-size: 17px; margin: 30px 0 10px; }
.verdict { background: var(--blue); color: white; border-radius: 10px; padding: 22px 26px; font-size: 22px; }
.verdict.unsure { background: #8a6314; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin: 16px 0 22px; }
.tile, figure, .card { background: white; border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px; }
.tile b { display: block; font-size: 21px; white-space: nowrap; }
.tile span, figcaption, footer { color: var(--soft); font-size: 13px; }
.grid { columns: 2 500px; column-gap: 16px; }
figure { break-inside: avoid; margin: 0 0 16px; }
figure svg { width: 100%; height: auto; display: block; margin-top: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
td, th { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font: 12.5px/1.4 ui-monospace, Menlo, monospace; overflow-wrap: anywhere; }
footer { margin-top: 28px; }
"""


def page(report: dict[str, Any]) -> str:
    """Returns the whole page."""
    figures = "".join(
        f"<figure><figcaption>{html.escape(caption)}</figcaption>{svg(report, draw, height)}</figure>"
        for caption, draw, height in charts(report).values()
    )
    tiles = "".join(f"<div class=tile><b>{value}</b><span>{html.escape(what)}</span></div>"
                    for value, what in _tiles(report))  # fmt: skip
    facts = [("command", report["command"]), *report["machine"].items(), ("neighbours", report["noise"] or "quiet")]
    last = Table("how it was measured", ("", ""), facts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>patchmill profile</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main><h1>patchmill profile {html.escape(report['mode'])}</h1>"
        f'{_verdict(report)}<div class="tiles">{tiles}</div><div class="grid">{figures}</div>'
        f"{''.join(map(_table, [*reversed(list(tables(report))), last]))}<footer>Medians of repeated runs that took "
        "turns. docs/profile.md says how each is measured.</footer></main></body></html>\n"
    )


def _verdict(report: dict[str, Any]) -> str:
    if "verdict" not in report:
        return ""
    kind = "verdict" if report["verdict"]["certain"] else "verdict unsure"
    return f'<div class="{kind}">{html.escape(report["verdict"]["sentence"])}</div>'


def _tiles(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Returns the numbers of the whole: (value, name)."""
    for number in numbers(report):
        if not number.name.startswith(("stage", "storage", "part", "operator")):
            yield f"{rounded(number.value)} {number.unit}", number.name


def _table(table: Table) -> str:
    kinds = [" class=n" if column.startswith("*") else "" for column in table.columns]
    head = [html.escape(column.lstrip("*")) for column in table.columns]
    lines = [("th", head)] if any(head) else []
    lines += [("td", [_cell(str(cell)) for cell in row]) for row in table.rows]
    rows = "".join(
        "<tr>" + "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for tag, row in lines
    )
    return (
        f'<h2>{html.escape(table.title[0].upper() + table.title[1:])}</h2><div class="card"><table>{rows}</table></div>'
    )


def _cell(text: str) -> str:
    escaped = html.escape(text)
    return f"<code>{escaped}</code>" if text.startswith(("--", "patchmill ")) else escaped
