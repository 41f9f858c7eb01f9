"""report -> [profile_page] -> report.html: one page that says what binds and shows why, with nothing outside it."""

import html
from collections.abc import Sequence
from typing import Any

from patchmill.tools.profiler.bottleneck import rounded
from patchmill.tools.profiler.charts import charts, svg

STYLE = """
:root { --ink: #1d2733; --soft: #5c6b7a; --line: #dde3ea; --blue: #1f4e8c; --paper: #ffffff; --wash: #f5f7fa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 15px; font-weight: 600; color: var(--soft); margin: 0 0 10px; }
.verdict { background: var(--blue); color: white; border-radius: 10px; padding: 22px 26px;
  font-size: 22px; line-height: 1.35; }
.verdict.unsure { background: #8a6314; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin: 16px 0 22px; }
.tile { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px; }
.tile b { display: block; font-size: 21px; font-variant-numeric: tabular-nums; white-space: nowrap; }
.tile span { color: var(--soft); font-size: 13px; }
.grid { columns: 2 500px; column-gap: 16px; }
.grid figure { break-inside: avoid; margin-bottom: 16px; }
figure, .card { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; margin: 0;
  padding: 14px 16px; }
figcaption { font-size: 13.5px; color: var(--soft); margin-bottom: 8px; }
figure svg { width: 100%; height: auto; display: block; }
h2 { font-size: 17px; margin: 30px 0 10px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
td, th { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font: 12.5px/1.4 ui-monospace, "DejaVu Sans Mono", Menlo, monospace; overflow-wrap: anywhere; }
footer { color: var(--soft); font-size: 13px; margin-top: 28px; }
"""


def page(report: dict[str, Any]) -> str:
    """The whole page."""
    figures = [
        f"<figure><figcaption>{html.escape(caption)}</figcaption>{svg(report, draw, height)}</figure>"
        for caption, draw, height in charts(report).values()
    ]
    body = [
        f"<h1>patchmill profile {html.escape(report['mode'])}</h1>",
        _verdict(report),
        _tiles(report),
        f'<div class="grid">{"".join(figures)}</div>',
        _remedies(report),
        _stages(report),
        _plan(report),
        _facts(report),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>patchmill profile</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def _verdict(report: dict[str, Any]) -> str:
    if "verdict" not in report:
        return ""
    kind = "verdict" if report["verdict"]["certain"] else "verdict unsure"
    return f'<div class="{kind}">{html.escape(report["verdict"]["sentence"])}</div>'


def _tiles(report: dict[str, Any]) -> str:
    found: list[tuple[str, str]] = []
    loader, step, train = report.get("loader"), report.get("step"), report.get("train")
    if train:
        found.append((rounded(train["images_per_s"]), "images/s in the training loop"))
        found.append((f"{train['data_wait']:.1%}", "of the time waiting for data"))
    if loader:
        found.append((f"{loader['together']['images_per_s']['median']:,.0f}", "images/s, loader alone"))
        found.append((f"{loader['together']['images_per_cpu_s']:,.0f}", "images per CPU-second"))
        found.append((f"{loader['together']['interval_p99_ms']:,.0f} ms", "p99 between batches"))
    if step:
        found.append(
            (rounded(step["batch"] / step["seconds"]["median"]), f"images/s, step alone, batch {step['batch']}")
        )
        found.append((f"{step['mfu']:.1%}", f"MFU of {step['ceiling_flops'] / 1e12:,.2f} TFLOP/s"))
        found.append((f"{step['memory_gb']:.1f} GiB", "most memory"))
    tiles = [f'<div class="tile"><b>{value}</b><span>{html.escape(what)}</span></div>' for value, what in found]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _remedies(report: dict[str, Any]) -> str:
    rows = [
        (each["title"], f"x{each['gain']:.2f}", rounded(each["images_per_s"]), each["how"], each["basis"])
        for each in report.get("remedies", [])
    ]
    return _table("What would help", ("remedy", "*gain", "*images/s", "how", "its costs are"), rows)


def _stages(report: dict[str, Any]) -> str:
    rows = []
    for stage in report.get("loader", {}).get("stages", []):
        wall, cpu, together = stage["wall"], stage["cpu"], stage["together"]
        rows.append(
            (
                stage["name"],
                f"{1e6 * wall['median']:,.1f}",
                f"{1e6 * wall['low']:,.1f} to {1e6 * wall['high']:,.1f}",
                f"{1e6 * cpu['median']:,.1f}",
                "" if together is None else f"{1e6 * together:,.1f}",
            )
        )
    columns = ("stage", "*µs an image", "*quartiles", "*of it on a core", "*in the running loader")
    return _table("The loader's stages", columns, rows)


def _plan(report: dict[str, Any]) -> str:
    rows = [(line["what"], line["value"], line["basis"]) for line in report.get("plan", {}).get("lines", [])]
    return _table("What if", ("", "", "measured or assumed"), rows)


def _facts(report: dict[str, Any]) -> str:
    rows = [("command", report["command"]), *report["machine"].items(), ("neighbours", report["noise"] or "quiet")]
    loader, step, train = report.get("loader"), report.get("step"), report.get("train")
    if loader:
        for name, reading in loader["storage"].items():
            cached = "" if reading["from_cache"] is None else f", {reading['from_cache']:.0%} from the page cache"
            rate = f"{reading['mb_per_s']:,.0f} MB/s, {reading['images_per_s']:,.0f} images/s{cached}"
            rows.append((f"storage, {name}", rate))
        if loader["explained"] is not None:
            rows.append(("loader explained", f"{loader['explained']:.1%} of the wall time lies in the stages"))
    if step:
        rows.append(("step explained", f"{step['explained']:.1%} of the profiled update lies in its parts"))
        rows.append(("ceiling", f"{step['ceiling_flops'] / 1e12:,.3f} TFLOP/s: {step['ceiling']}"))
    if train:
        rows.append(("loop explained", f"{train['explained']:.1%} is data wait, update or metrics"))
        rows.append(("slow steps", train["slow_steps"] or "none"))
    table = _table("How it was measured", ("", ""), [(name, str(value)) for name, value in rows])
    return table + "<footer>Medians of repeated runs that took turns. docs/profile.md says how each is made.</footer>"


def _table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table; columns whose names begin with * hold numbers. Nothing where there are no rows."""
    if not rows:
        return ""
    kinds = [' class="n"' if column.startswith("*") else "" for column in columns]
    head = "".join(
        f"<th{kind}>{html.escape(column.lstrip('*'))}</th>" for kind, column in zip(kinds, columns, strict=True)
    )
    lines = [
        "<tr>" + "".join(f"<td{kind}>{_cell(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    ]
    head = f"<tr>{head}</tr>" if any(columns) else ""
    return f'<h2>{html.escape(title)}</h2><div class="card"><table>{head}{"".join(lines)}</table></div>'


def _cell(text: str) -> str:
    escaped = html.escape(text)
    return f"<code>{escaped}</code>" if text.startswith(("--", "patchmill ")) else escaped
