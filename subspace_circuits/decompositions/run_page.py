"The page of a run in a folder: one file that needs no network, with lines, figures and tables."
import json
from collections.abc import Iterable, Iterator
from html import escape

__all__ = ["figure_part", "run_page", "table_part", "value_rows"]

STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:960px;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;margin:.5em 0 1.5em}th,td{border-bottom:1px solid #ddd;padding:.2em 1em .2em 0;
text-align:left;vertical-align:top;min-width:4.5em}td{overflow-wrap:anywhere}.part{overflow-x:auto}"""


def value_rows(o, name: str = "") -> Iterator[tuple[str, str]]:
    "A nested value as rows of a table: its path and what it is. Of lists of things the first twenty, by their name."
    if isinstance(o, dict):
        for k, v in o.items(): yield from value_rows(v, f"{name}, {k}" if name else str(k))
    elif isinstance(o, list) and o and isinstance(o[0], dict):
        for v in o[:20]:
            rest = {k: x for k, x in v.items() if k not in ("cluster", "subspace", "frequency")}
            yield from value_rows(rest, f"{name} {next(iter(v.values()))}")
    else: yield name, json.dumps(o)


def table_part(rows: Iterable[tuple[str, ...]], head: tuple[str, ...] = ()) -> str:
    "Rows of text as a table, with names of columns if there are any."
    def line(row, tag): return f"<tr>{''.join(f'<{tag}>{escape(o)}</{tag}>' for o in row)}</tr>"
    lines = "".join(line(o, "td") for o in rows)
    return f'<div class="part"><table>{line(head, "th") if head else ""}{lines}</table></div>'


def figure_part(fig, name: str) -> str: # A plotly figure; its name on the page
    "A figure, as wide as the page if it has no width of its own."
    html = fig.to_html(full_html=False, include_plotlyjs=False, div_id=name,
                       config=dict(responsive=True, displaylogo=False))
    return f'<div class="part">{html}</div>'


def run_page(title: str, body: str) -> str: # Of the other parts
    "A whole page."
    from plotly.offline import get_plotlyjs
    script = f"<script>{get_plotlyjs()}</script>" if "plotly-graph-div" in body else ""
    return ('<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{escape(title)}</title><style>{STYLE}</style>{script}<h1>{escape(title)}</h1>{body}</html>")
