"""The pieces of a self-contained HTML page: text, tables, figures, no request to anywhere."""

import html
from collections.abc import Sequence

_STYLE = """
:root{color-scheme:light dark;--ink:#1a202c;--soft:#4a5568;--line:#cbd5e0;--page:#fff;--plot:#fff}
@media(prefers-color-scheme:dark){
:root{--ink:#edf2f7;--soft:#a0aec0;--line:#4a5568;--page:#171923;--plot:#f7fafc}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:60rem;
margin:auto;padding:1rem}
h1{margin:.2em 0}h2{margin-top:2em}.soft,figcaption{color:var(--soft);font-size:.9rem}
.scroll{overflow-x:auto;margin-block:1rem}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}figure{margin:1em 0}
figure svg{max-width:100%;height:auto;background:var(--plot);border-radius:6px}
code,pre{font-family:ui-monospace,monospace;font-size:.85rem;white-space:pre-wrap;overflow-wrap:anywhere}
@media print{body{max-width:none}}
"""


def document(title: str, sections: Sequence[str]) -> str:
    """Return a whole page; sections are HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{text(title)}</h1>{''.join(sections)}</body></html>\n"
    )


def heading(told: str) -> str:
    """Return a section's heading; it begins with a capital letter, the others stay (ROUGE-L)."""
    return f"<h2>{text(told[:1].upper() + told[1:])}</h2>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of plain text; it scrolls sideways where it is wide."""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def figure(svg: str, caption: str) -> str:
    """Return an inline SVG with its caption, which is also what a screen reader says."""
    label = html.escape(caption, quote=True)
    named = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return f"<figure>{named}<figcaption>{text(caption)}</figcaption></figure>"


def note(told: str) -> str:
    """Return a small paragraph: how figures came about, and the file they are from."""
    return f'<p class="soft">{text(told)}</p>'


def text(value: str) -> str:
    """Return text as HTML."""
    return html.escape(value)


def number(value: float | None, digits: int, sign: str = "") -> str:
    """Return a figure, or a dash where there is none."""
    return "–" if value is None else f"{value:{sign}.{digits}f}"


def span(low: float, high: float, digits: int, sign: str = "") -> str:
    """Return an interval."""
    return f"{low:{sign}.{digits}f} to {high:{sign}.{digits}f}"
