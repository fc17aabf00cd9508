"""The look of a report: one self-contained HTML page. Every text that comes in is escaped here."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #667078; --paper: #fcfcfb; --card: #ffffff; --rule: #d9dde0;
  --accent: #2f7ed8; --bad: #b4342d; --good: #1a7f4e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #98a2aa; --paper: #15181b; --card: #1c2024;
  --rule: #3a4147; --accent: #6aa9ef; --bad: #f0837b; --good: #5fc994; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 68rem; margin: 0 auto; padding: 2.2rem 1.2rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .2rem; letter-spacing: -.01em; }
h2 { font-size: 1.05rem; margin: 2.6rem 0 .7rem; }
p { margin: .4rem 0; max-width: 46rem; }
.soft, td.soft { color: var(--soft); }
.figures { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.3rem 0 0; }
.figure { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: .7rem 1rem; min-width: 8.5rem; }
.figure b { display: block; font-size: 1.45rem; line-height: 1.3; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.figure span { color: var(--soft); font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: .8rem .8rem .4rem; }
figcaption { font-size: .88rem; font-weight: 600; padding: 0 .3rem .3rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
.switch label { margin-left: .3rem; cursor: pointer; } .switch label, .switch > .soft { font-size: .9rem; }
.switch input { margin: 0 0 0 1rem; accent-color: var(--accent); vertical-align: -.1rem; }
.view { display: none; margin-top: .8rem; }
#view-0:checked ~ .view-0, #view-1:checked ~ .view-1, #view-2:checked ~ .view-2 { display: block; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; list-style: none; padding: 0;
  margin: 0 0 .8rem; font-size: .9rem; }
.swatch { display: inline-block; width: .8rem; height: .8rem; border-radius: 3px; margin-right: .45rem;
  vertical-align: -.08rem; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 10px; background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .5rem .8rem; border-top: 1px solid var(--rule); vertical-align: top; }
tr:first-child > * { border-top: 0; } thead + tbody tr:first-child > * { border-top: 1px solid var(--rule); }
thead th { color: var(--soft); font-weight: 500; white-space: nowrap; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.group td { font-weight: 600; } tr.part td:first-child { padding-left: 2.2rem; }
tr.group td.soft { font-weight: 400; }
tr.fact td:first-child { width: 11rem; } tr.more td { border-top: 0; padding-top: 0; }
td.fixed { white-space: nowrap; } td:first-child { min-width: 9rem; } .scroll + p { margin-top: .9rem; }
td.bad { color: var(--bad); } td.good { color: var(--good); }
code, pre { font: .85rem/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { margin: 0; padding: .8rem 1rem; overflow-x: auto; border: 1px solid var(--rule);
  border-radius: 10px; background: var(--card); }
details summary { cursor: pointer; color: var(--soft); margin-top: .6rem; }
@media print { body { background: none; } .scroll { overflow: visible; } pre { white-space: pre-wrap; } }
"""


@dataclass(frozen=True)
class Cell:
    """A cell of a table and its look: number, soft, bad, good; several apart by blanks."""

    text: str
    look: str = ""
    swatch: str = ""
    """A colour shown before the text."""


def table(head: Sequence[Cell], rows: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    """A table that scrolls sideways on a narrow screen; each row has a look: group, part, fact, more or nothing.

    A row without a rule above it is more of the one before; heads that are all empty are left out.
    """
    top = "".join(f"<th{_class(cell.look)}>{escape(cell.text)}</th>" for cell in head)
    top = f"<thead><tr>{top}</tr></thead>\n" if any(cell.text for cell in head) else ""
    body = "".join(f"<tr{_class(look)}>{''.join(map(_cell, cells))}</tr>\n" for look, cells in rows)
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def section(title: str, *content: str) -> str:
    """A heading and what stands under it (markup); nothing when all of it is empty."""
    inner = "\n".join(part for part in content if part)
    return f"<section><h2>{escape(title)}</h2>\n{inner}</section>" if inner else ""


def paragraph(text: str, look: str = "") -> str:
    """A paragraph of plain text."""
    return f"<p{_class(look)}>{escape(text)}</p>"


def figures(items: Sequence[tuple[str, str]]) -> str:
    """Large numbers with a line of text under each."""
    cards = (f'<div class="figure"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for value, label in items)
    return f'<div class="figures">{"".join(cards)}</div>'


def legend(items: Sequence[tuple[str, str]]) -> str:
    """Colours and names."""
    entries = "".join(f"<li>{_swatch(colour)}{escape(name)}</li>" for colour, name in items)
    return f'<ul class="legend">{entries}</ul>'


def charts(items: Sequence[tuple[str, str]]) -> str:
    """Titled drawings (markup) side by side where there is room."""
    drawings = (f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in items)
    return f'<div class="charts">{"".join(drawings)}</div>'


def views(prompt: str, items: dict[str, str], shown: str) -> str:
    """Up to three pieces of markup by name, of which one is seen: buttons switch, `shown` comes first; no script."""
    assert len(items) <= 3, "the style knows three"
    if len(items) < 2:
        return "".join(items.values())
    buttons = "".join(
        f'<input type="radio" name="view" id="view-{number}"{" checked" if name == shown else ""}>'
        f'<label for="view-{number}">{escape(name)}</label>'
        for number, name in enumerate(items)
    )
    panes = "".join(f'<div class="view view-{number}">{content}</div>' for number, content in enumerate(items.values()))
    return f'<div class="switch"><span class="soft">{escape(prompt)}</span>{buttons}{panes}</div>'


def code(lines: Sequence[str]) -> str:
    """Lines set in a fixed width."""
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def folded(summary: str, content: str) -> str:
    """Markup behind a line to click on."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def page(title: str, subtitle: str, body: Sequence[str]) -> str:
    """The whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="soft">{escape(subtitle)}</p>\n'
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def _cell(cell: Cell) -> str:
    return f"<td{_class(cell.look)}>{_swatch(cell.swatch) if cell.swatch else ''}{escape(cell.text)}</td>"


def _class(look: str) -> str:
    return f' class="{look}"' if look else ""


def _swatch(colour: str) -> str:
    return f'<i class="swatch" style="background:{colour}"></i>'
