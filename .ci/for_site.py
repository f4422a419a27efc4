"""The step that makes a notebook a page of the site. nbdev runs it last (`procs` in settings.ini); the notebook stays as
it is.

Quarto loads require.js and jQuery from elsewhere into every page with an output of type text/html or
application/javascript (`extractJupyterWidgetDependencies` in its core/jupyter/widgets.ts). So HTML is handed to it as
raw blocks of Markdown, and a figure as its data, which `nbs/figures.js` draws with the site's own copy of plotly."""
import ast, html, json, re
from pathlib import Path

from execnb.nbio import mk_cell
from nbdev.config import get_config

PLOTLY = "application/vnd.plotly.v1+json"
SCRIPTS = '<script src="{0}assets/plotly.min.js"></script>\n<script src="{0}figures.js"></script>'
PROVES = {"test_eq", "test_close", "test_fail", "test_is"}


def raw(text):
    "HTML as a block of Markdown that Pandoc leaves alone."
    fence = "`"*max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{{=html}}\n{text}\n{fence}\n"


def figure(spec):
    "A figure's data, in an element that says in words what it shows."
    about = spec["layout"].get("meta", {})
    data = json.dumps(dict(data=spec["data"], layout=spec["layout"]), separators=(",", ":")).replace("</", "<\\/")
    return (f'<div class="figure-data" id="figure:{html.escape(about.get("name", ""))}" role="img" '
            f'aria-label="{html.escape(about.get("alt", ""))}"><script type="application/json">{data}</script></div>')


def table(text):
    "A table of pandas without its own style, in a box that scrolls."
    text = re.sub(r"<style scoped>.*?</style>\s*", "", text, flags=re.S)
    return text.replace('<table border="1" class="dataframe">', '<table class="dataframe table table-sm">')


def for_page(data):
    "An output's data with nothing in it that makes Quarto load scripts from elsewhere."
    if PLOTLY in data: return {"text/markdown": raw(figure(data[PLOTLY]))}
    if "text/html" in data: return {"text/markdown": raw(table("".join(data["text/html"])))}
    return data


def kind(tree):
    "What a cell that is not exported is for, if a reader can do without its code."
    nodes = list(ast.walk(tree))
    called = {o.func.id for o in nodes if isinstance(o, ast.Call) and isinstance(o.func, ast.Name)}
    if called & PROVES or any(isinstance(o, ast.Assert) for o in nodes): return "Proof"
    if "expect_fail" in called: return "What is refused"
    if all(isinstance(o, ast.Import | ast.ImportFrom) for o in tree.body): return "Imports"
    settings = [o for o in tree.body if isinstance(o, ast.Expr) and ast.unparse(o).startswith("torch.set_")]
    if all(isinstance(o, ast.FunctionDef | ast.ClassDef) or o in settings for o in tree.body):
        return "Settings" if settings else "Helpers"


def fields(source):
    "Each NamedTuple of a cell, with the signature that its fields give."
    lines = source.splitlines()
    for o in ast.parse(source).body:
        if not isinstance(o, ast.ClassDef) or "NamedTuple" not in map(ast.unparse, o.bases): continue
        rows = []
        for f in (f for f in o.body if isinstance(f, ast.AnnAssign)):
            given = f"={ast.unparse(f.value)}" if f.value else ""
            _, mark, words = lines[f.end_lineno - 1].encode()[f.end_col_offset:].decode().partition("#")
            rows.append(f"    {f.target.id}:{ast.unparse(f.annotation)}{given},{mark and f' # {words.strip()}'}")
        yield o.name, "\n".join([f"class {o.name}(", *rows, "):"])


class ForSite:
    "Outputs without scripts from elsewhere, proofs folded, NamedTuples with their fields."
    def __init__(self, nb):
        self.nb, self.figures, self.fields = nb, False, {}
        for cell in nb.cells: # the exported ones are gone when the step runs
            if cell.cell_type == "code" and cell.directives_.keys() & {"export", "exports"}:
                self.fields |= dict(fields(cell.source))

    def __call__(self, cell):
        if cell.cell_type != "code": return
        for o in cell.get("outputs", []):
            if "data" in o:
                self.figures |= PLOTLY in o["data"]
                o["data"] = for_page(o["data"])
        if shown := re.search(r"^show_doc\((\w+)\)", cell.source, re.M): self.sign(cell, shown[1])
        elif not re.search(r"^#\| *(code-fold|echo):", cell.source, re.M) and cell.source.strip():
            if (tree := cell.parsed_()) and (summary := kind(ast.Module(list(tree), []))):
                cell.source = f'#| code-fold: true\n#| code-summary: "{summary}"\n{cell.source}'

    def sign(self, cell, name):
        "Put the fields of a NamedTuple where nbdev shows `*args, **kwargs`."
        if name not in self.fields: return
        for o in cell.outputs:
            if "text/markdown" in o.get("data", {}):
                text = "".join(o["data"]["text/markdown"])
                o["data"]["text/markdown"] = re.sub(r"^(?:def|class) \w+\(\n *\*args, \*\*kwargs\n\):",
                                                    lambda _: self.fields[name], text, flags=re.M)

    def end(self):
        if not self.figures: return
        page, nbs = Path(self.nb.path_).resolve(), get_config().nbs_path.resolve()
        up = "../"*(len(page.relative_to(nbs).parts) - 1 if page.is_relative_to(nbs) else 0)
        self.nb.cells.append(mk_cell(raw(SCRIPTS.format(up)), "markdown"))
