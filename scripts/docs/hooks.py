"""What mkdocs asks for while it builds the site: generated tables, equations, files outside of docs/."""

import html
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
from generated import filled

ROOT = Path(__file__).parents[2]
OUTSIDE = re.compile(r"\]\((?:\.\./)+([\w./-]+)\)")
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def on_files(files: Files, config: Any) -> Files:
    """Carry what pages name in other folders of the repository, such as recorded results."""
    named = {
        path
        for page in files.documentation_pages()
        for path in OUTSIDE.findall(Path(page.abs_src_path or "").read_text("utf-8"))
    }
    for path in sorted(named):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in generated tables, and let links to other folders find what the site has of them."""
    depth = page.file.src_uri.count("/")
    return OUTSIDE.sub(lambda m: f"]({'../' * depth}{m[1]})", filled(markdown))


def on_page_content(content: str, **_: Any) -> str:
    """Write equations as MathML, which browsers draw by themselves."""
    return EQUATION.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    display = "block" if found[1] == "div" else "inline"
    return convert(html.unescape(found[2]).strip(), display=display)
