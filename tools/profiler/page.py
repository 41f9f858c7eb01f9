"""Writes report.html: one page, with nothing outside it, that says what binds and shows why."""

import html
import io
from typing import Any

from rich.console import Console

from patchmill.tools.profiler.bottleneck import rounded
from patchmill.tools.profiler.diff import numbers
from patchmill.tools.profiler.tables import table, tables

STYLE = """
body { margin: 0 auto; max-width: 1180px; padding: 28px 24px; background: #f5f7fa; color: #1d2733; }
body, figcaption { font: 15px/1.5 system-ui, Helvetica, Arial, sans-serif; }
h1 { background: #1f4e8c; color: white; border-radius: 10px; padding: 22px 26px; font-size: 22px; font-weight: normal; }
h1.unsure { background: #8a6314; }
main { columns: 2 500px; column-gap: 16px; }
figure, pre { background: white; border: 1px solid #dde3ea; border-radius: 8px; padding: 12px 16px; }
figure { break-inside: avoid; margin: 0 0 16px; }
svg { width: 100%; height: auto; display: block; margin-top: 8px; }
pre { font: 13px/1.4 ui-monospace, Menlo, Consolas, monospace; overflow-x: auto; }
"""
WIDTH = 150
"""characters of a line of the tables"""


def page(report: dict[str, Any], charts: list[tuple[str, str]]) -> str:
    """Returns the whole page.

    Args:
        charts: captions and SVG elements.
    """
    verdict = report.get("verdict", {"sentence": f"patchmill profile {report['mode']}", "certain": True})
    whole = [(number.name, f"{rounded(number.value)} {number.unit}") for number in numbers(report)
             if not number.name.startswith(("stage", "storage", "part", "operator"))]  # fmt: skip
    facts = [("command", report["command"]), *report["machine"].items(), ("neighbours", report["noise"] or "quiet")]
    text = Console(record=True, file=io.StringIO(), width=WIDTH)
    for each in (
        table("in short", ("", ""), whole),
        *reversed(list(tables(report))),
        table("how it was measured", ("", ""), facts),
    ):
        text.print(each, "")
    figures = "".join(
        f"<figure><figcaption>{html.escape(caption)}</figcaption>{svg}</figure>" for caption, svg in charts
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>patchmill profile</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f"<h1{'' if verdict['certain'] else ' class=unsure'}>{html.escape(verdict['sentence'])}</h1>"
        f"<main>{figures}</main>{text.export_html(inline_styles=True, code_format='<pre>{code}</pre>')}<footer>Medians "
        "of repeated runs that took turns. docs/profile.md says how each is measured.</footer></body></html>\n"
    )
