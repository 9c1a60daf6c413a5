"""A report as a list of blocks, and its two renderings: Markdown, and HTML that needs no other file.

The HTML is well-formed XML, embeds its pictures, and loads nothing: no script, no font, no style sheet. All text is
escaped; blocks carry plain text only.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Bullets:
    """Items; those whose index is in ``strong`` stand out."""

    items: tuple[str, ...]
    strong: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Table:
    """Cells as text, the first column names the row; ``strong`` is the row that stands out; notes go below."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    strong: int | None = None


@dataclass(frozen=True)
class Picture:
    path: Path
    caption: str


@dataclass(frozen=True)
class Code:
    text: str


Block = Heading | Text | Bullets | Table | Picture | Code

STYLE = """
body { margin: 0; background: #f6f7f8; color: #2b3138; font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 2rem 4rem; background: #fff; }
h1 { font-size: 1.7rem; font-weight: 600; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; font-weight: 600; margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 1px solid #e4e7ea; }
h3 { font-size: 1rem; font-weight: 600; margin: 1.6rem 0 .4rem; }
p, li { max-width: 52rem; }
li { margin: .3rem 0; }
li.strong { font-weight: 600; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
th { text-align: left; font-weight: 600; color: #56606a; border-bottom: 1px solid #9aa4ae; }
th, td { padding: .32rem .8rem .32rem 0; vertical-align: top; }
td { border-bottom: 1px solid #eceff1; }
td small { color: #6b7680; }
td.wide { white-space: normal; min-width: 18rem; }
tr.strong td { background: #eef4fa; font-weight: 600; }
.note { color: #6a737c; font-size: .86rem; margin: .2rem 0; }
figure { margin: 1.2rem 0; }
img { max-width: 100%; height: auto; }
figcaption { color: #6a737c; font-size: .86rem; }
pre { background: #f3f5f6; padding: .8rem 1rem; overflow-x: auto; font-size: .82rem; line-height: 1.45; }
"""
WIDE = 60  # characters from which a table cell may wrap


def markdown(blocks: Sequence[Block]) -> str:
    """The document as Markdown; pictures are linked by file name, so it belongs beside them."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {block.text}"
        case Text():
            return block.text
        case Bullets():
            return "\n".join(
                f"- **{t}**" if i in block.strong else f"- {t}" for i, t in enumerate(block.items)
            )
        case Table():
            rows = [block.header, ("---",) * len(block.header), *block.rows]
            lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
            return "\n".join(lines) + "".join(f"\n\n*{note}*" for note in block.notes)
        case Picture():
            return f"![{block.caption}]({block.path.name})\n\n*{block.caption}*"
        case Code():
            return f"```\n{block.text}\n```"


def page(title: str, blocks: Sequence[Block]) -> str:
    """The document as one HTML page. Raises OSError for a picture that cannot be read."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8" />\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1" />\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
        case Text():
            return f"<p>{html.escape(block.text)}</p>"
        case Bullets():
            items = [
                f"<li{_mark(i in block.strong)}>{html.escape(t)}</li>" for i, t in enumerate(block.items)
            ]
            return "<ul>\n" + "\n".join(items) + "\n</ul>"
        case Table():
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in block.header)
            rows = "\n".join(
                f"<tr{_mark(i == block.strong)}>{''.join(map(_cell, row))}</tr>"
                for i, row in enumerate(block.rows)
            )
            notes = "".join(f'\n<p class="note">{html.escape(note)}</p>' for note in block.notes)
            table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
            return f'<div class="scroll">{table}</div>{notes}'
        case Picture():
            data = base64.b64encode(block.path.read_bytes()).decode()
            caption = html.escape(block.caption)
            return (
                f'<figure><img alt="{caption}" src="data:image/png;base64,{data}" />'
                f"<figcaption>{caption}</figcaption></figure>"
            )
        case Code():
            return f"<pre>{html.escape(block.text)}</pre>"


def _mark(strong: bool) -> str:
    return ' class="strong"' if strong else ""


def _cell(text: str) -> str:
    wide = ' class="wide"' if len(text) > WIDE else ""
    shown = re.sub(
        r"^(\S+) (\[[^\]]*\])$", r"\1<br /><small>\2</small>", html.escape(text)
    )  # its interval below
    return f"<td{wide}>{shown}</td>"
