"""Process every page as nbdev does for the website; fail on any error and name page and cell. It writes nothing.

nbdev runs the cells that documentation needs (exports, imports, `show_doc`) and no other, and our own step
(`for_site.py`) last. An error there stops `make docs`; a link to nothing, a script from elsewhere or a figure that
nobody put in words does not. All are found here, page by page."""
import os, re, sys, warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import yaml
from execnb.nbio import read_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.processors import FilterDefaults, exec_show_docs

root = Path(__file__).resolve().parent.parent


class NoteErrors(exec_show_docs):
    "nbdev's own step stops at the first cell that fails; this one notes it in the notebook and goes on."
    def __call__(self, cell):
        try: super().__call__(cell)
        except UserWarning:
            self.nb.found_.append((name(cell), "imports and other code: give imports a cell of their own"))
        except Exception as e:
            cause = e.__cause__ or e
            self.nb.found_.append((name(cell), f"{type(cause).__name__}: {cause}"))
            self.k.exc = None


class Steps(FilterDefaults):
    "nbdev's steps, of which one notes errors."
    def base_procs(self): return [NoteErrors if o is exec_show_docs else o for o in super().base_procs()]


def shown(cell):
    "The function or class that a cell documents, if it does."
    match = re.search(r"^show_doc\(([\w.]+)", cell.source, re.M)
    return match and match[1]


def name(cell): return f"show_doc({shown(cell)})" if shown(cell) else cell.id


def outputs(cell, kind):
    "The outputs of one kind, as one text."
    stored = [o.data.get(kind, "") for o in cell.get("outputs", []) if "data" in o]
    return "\n".join("".join(o) for o in stored)


def elements(cell):
    "The HTML that a cell puts on the page."
    if cell.cell_type == "markdown": return cell.source
    return "\n".join(outputs(cell, o) for o in ("text/html", "text/markdown"))


def prose(cell):
    "The Markdown that a cell puts on the page, blocks of code left out."
    text = cell.source if cell.cell_type == "markdown" else outputs(cell, "text/markdown")
    return re.sub(r"^(```+).*?^\1\s*$", "", text, flags=re.M | re.S)


LARGEST = 5e6 # Bytes of a page: what a reader on a phone waits for


def weight(cells):
    "About how many bytes a page has: what is written, and every output as it is put there."
    return sum(len(o.source.encode()) + (len(elements(o).encode()) if o.cell_type == "code" else 0) for o in cells)


def slug(heading):
    "The id that Pandoc gives a heading."
    if own := re.search(r"\{[^}]*#([^\s}]+)", heading): return own[1]
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) # of a link, its text
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", words).strip().lower()))


def ids(cell):
    "The ids that a cell puts on the page: of headings, of elements, and, where Quarto frames it, its own."
    yield from (slug(o) for o in re.findall(r"^#+ +(.+?) *#*$", prose(cell), re.M))
    yield from re.findall(r'<[^>]*\sid="([^"]+)"', elements(cell))
    if cell.cell_type == "code" and not re.search(r"^#\| *output: *asis", cell.source, re.M): yield cell.id


def faults(cell, where):
    "What is wrong with a processed cell; `where` has the cells of every id."
    yield from (f"{o.ename}: {o.evalue}" for o in cell.get("outputs", []) if o.output_type == "error")
    if shown(cell):
        if f"### {shown(cell)}\n" not in prose(cell): yield "documents nothing"
        elif "[source](" not in prose(cell): yield "no link to the source: is the nbdev entry point installed?"
    nested = re.findall(r"(?<!!)\[[^\[\]\n]*\[`[^`]+`\]\([^)]*\)[^\[\]\n]*\]\([^)]*\)", prose(cell))
    yield from (f"a link in a link: {o}" for o in nested)
    for o in re.findall(r'<div class="figure-data" id="([^"]*)"', elements(cell)):
        if len(where[o]) > 1: yield f"its figure is {o!r}, and so is something else: {', '.join(where[o])}"
    yield from unlike_a_page(cell)


def unlike_a_page(cell):
    "What of a processed cell loads from elsewhere, cannot be read aloud, or names a page without leading to it."
    for o in ("text/html", "application/javascript"): # for these Quarto loads jQuery and require.js from elsewhere
        if outputs(cell, o).strip(): yield f"an output of type {o}"
    html = elements(cell)
    loaded = re.findall(r'<(?:script|link|img|iframe|source)\b[^>]*\s(?:src|href)="((?:https?:)?//[^"]*)"', html)
    yield from (f"loads {o} from elsewhere" for o in loaded)
    pictures = [("picture", o) for o in re.findall(r"!\[((?:[^\[\]]|\[[^\]]*\])*)\]\(", prose(cell))]
    for kind, tag, words in (("picture", "<img", "alt"), ("figure", '<div class="figure-data"', "aria-label"),
                             ("frame", "<iframe", "title")):
        for o in re.findall(rf"{tag}(?=[\s>])[^>]*>", html):
            said = re.search(rf'\b{words}="([^"]*)"', o)
            pictures.append((kind, said[1] if said else ""))
    yield from (f"a {kind} that nothing says in words: {said!r}" for kind, said in pictures if len(said.split()) < 5)
    bare = re.sub(r"\[[^\[\]]*\]\([^)]*\)", "", prose(cell))
    yield from (f"{o!r} is no link" for o in re.findall(r"\b[Pp]ages? 0\w+", bare))


def process(path):
    "Process a page: its title, its file and ids on the website, its links to other pages, and what is wrong, by cell."
    os.environ["IN_TEST"] = "1" # as nbdev sets it; the cell that exports does nothing then
    warnings.filterwarnings("error", "Found cells containing imports", UserWarning)
    nb = read_nb(path)
    nb.found_ = []
    try: Steps()(nb)
    except Exception as e:
        e.add_note(f"in {path}")
        raise
    where = {}
    for cell in nb.cells:
        for o in ids(cell): where.setdefault(o, []).append(name(cell))
    failed = {cell for cell, _ in nb.found_}
    if (size := weight(nb.cells)) > LARGEST:
        nb.found_.append(("the page", f"{size/1e6:.1f} MB, the most is {LARGEST/1e6:.0f}"))
    found = nb.found_ + [(name(o), fault) for o in nb.cells if name(o) not in failed for fault in faults(o, where)]
    pattern = re.escape(f"{get_config().doc_host}{get_config().doc_baseurl}/") + r"([\w./]+\.html)(?:#([\w.-]+))?"
    links = [(name(o), *link) for o in nb.cells for link in re.findall(pattern, prose(o))]
    links += [(name(o), *link) for o in nb.cells # on the site, a notebook's name becomes its page's
              for link in re.findall(r"\]\(([\w./-]+\.ipynb|)(?:#([\w.-]+))?\)", prose(o)) if any(link)]
    head = yaml.safe_load(nb.cells[0].source.strip().strip("-")) if nb.cells[0].cell_type == "raw" else {}
    return head.get("title"), head.get("output-file", f"{path.stem}.html"), set(where), links, found


def made():
    "The pages that `make docs` writes beside those of the notebooks."
    return re.findall(r"nbs/(assets/\w+\.html)", (root/"Makefile").read_text(encoding="utf-8"))


def check(nbs):
    "Everything that is wrong, as page, cell and fault."
    pages = sorted(nbglob(nbs, as_path=True))
    names = [o.relative_to(nbs).as_posix() for o in pages]
    sidebar = yaml.safe_load((root/"_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    listed = {x["href"] for o in sidebar for x in o.get("contents", [o])}
    for o in listed ^ set(names): yield o, "the page", "not both a notebook and in the sidebar"
    context = get_context("forkserver") # each page in a process of its own, a copy of one that has imported these
    context.set_forkserver_preload(["nbdev.processors", "torch", "pandas", "plotly.subplots", "networkx"])
    with ProcessPoolExecutor(2, context, max_tasks_per_child=1) as pool:
        done = list(pool.map(process, pages))
    on_site = {(Path(page).parent/file).as_posix(): ids for page, (_, file, ids, _, _) in zip(names, done)}
    on_site |= dict.fromkeys(made(), ()) | {page: ids for page, (_, _, ids, _, _) in zip(names, done)}
    for page, (title, _, own, links, found) in zip(names, done):
        if not title: yield page, "the page", "no title"
        yield from ((page, *o) for o in found)
        for cell, file, anchor in links:
            if file.endswith(".ipynb"): file = os.path.normpath(Path(page).parent/file)
            if anchor not in (on_site.get(file, ()) if file else own) and (anchor or file not in on_site):
                yield page, cell, f"a link to {file}#{anchor}, which is not there"


if __name__ == "__main__":
    os.chdir(root)
    found = list(check(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else root/"nbs"))
    for o in found: print(*o, sep=": ", file=sys.stderr)
    sys.exit(bool(found))
