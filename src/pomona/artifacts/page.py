"""The pieces of a self-contained HTML page: text, tables, figures, no request to anywhere."""

import csv
import html
import io
from collections.abc import Iterable, Mapping, Sequence

Cells = Sequence[Sequence[object]]
"""What a figure shows, as rows of a table; the first names the columns."""

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
.save button{font:inherit;font-size:.8rem;color:var(--soft);background:none;cursor:pointer;
border:1px solid var(--line);border-radius:4px;margin-right:.5rem;padding:.1rem .6rem}
@media print{body{max-width:none}.save{display:none}.scroll{overflow:visible}
table{font-size:.7rem}th,td{white-space:normal;padding:.2rem .3rem}figure,tr{break-inside:avoid}}
"""

# Buttons that save what is on the page already: figures as SVG and what they show as CSV, tables as CSV.
_SCRIPT = """
"use strict";
const quoted = cell => /[",\\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell;
const lines = table => [...table.rows].map(
  row => [...row.cells].map(cell => quoted(cell.textContent)).join(",") + "\\n").join("");
const save = (name, type, body) => {
  const link = document.createElement("a");
  link.download = name;
  link.href = URL.createObjectURL(new Blob([body], {type}));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
};
let part = "", count = 0;
for (const one of document.querySelectorAll("h2, figure, .scroll")) {
  if (one.tagName === "H2") {
    part = one.textContent.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/-$/, "");
    count = 0;
    continue;
  }
  const name = `${part}-${++count}`, bar = document.createElement("p");
  const offer = (kind, type, body) => {
    const button = document.createElement("button");
    button.textContent = kind;
    button.setAttribute("aria-label", `save ${name}.${kind.toLowerCase()}`);
    button.onclick = () => save(`${name}.${kind.toLowerCase()}`, type, body());
    bar.append(button);
  };
  const svg = one.querySelector("svg"), table = one.querySelector("table");
  bar.className = "save";
  if (svg) offer("SVG", "image/svg+xml", () => new XMLSerializer().serializeToString(svg));
  if (svg || table) offer("CSV", "text/csv", () => svg ? one.dataset.csv : lines(table));
  one.after(bar);
}
"""


def document(title: str, sections: Sequence[str]) -> str:
    """Return a whole page; sections are HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{_STYLE}</style></head><body>"
        f"<main><h1>{text(title)}</h1>{''.join(sections)}</main><script>{_SCRIPT}</script></body></html>\n"
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
        '<div class="scroll" tabindex="0" role="group" aria-label="table">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def figure(svg: str, caption: str, cells: Cells) -> str:
    """Return an inline SVG with its caption, which is also what a screen reader says.

    `cells` are the figures that it shows, to be saved as CSV.
    """
    label = html.escape(caption, quote=True)
    named = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    kept = io.StringIO()
    csv.writer(kept, lineterminator="\n").writerows(cells)
    data = html.escape(kept.getvalue(), quote=True)
    return f'<figure data-csv="{data}">{named}<figcaption>{text(caption)}</figcaption></figure>'


def matrix(
    corner: str, rows: Mapping[str, Iterable[float]], columns: Sequence[object]
) -> list[list[object]]:
    """Return named rows of figures as cells."""
    return [[corner, *columns], *([name, *values] for name, values in rows.items())]


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
