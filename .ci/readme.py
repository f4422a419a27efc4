"Write README.md and nbs/llms.txt from nbs/index.ipynb; with --check, fail if either is out of date. Needs no Quarto."
import re, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

root = Path(__file__).resolve().parent.parent
note = "<!-- Written by `make readme` from nbs/index.ipynb: edit that notebook. -->\n\n"


def readme():
    nb = nbformat.read(root/"nbs/index.ipynb", as_version=4)
    nb.metadata.language_info = {"name": "python"}  # nbdev_clean drops it, and the code fences want it
    nb.cells = [c for c in nb.cells if c.cell_type != "raw" and not re.search(r"^#\|\s*hide\b", c.source, re.M)]
    for cell in nb.cells: cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    config = Config({"NbConvertBase": {"display_data_priority": ["text/markdown", "text/plain"]}})
    text, _ = MarkdownExporter(config=config).from_notebook_node(nb)
    relative = r'(\]\(|(?:src|href)=")(?![a-z]+:|#|/)'
    text = re.sub(relative, r"\1nbs/", text)
    return note + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def llms():
    "The front page's map as a list of links, in the form of llmstxt.org."
    cells = {o.id: o.source for o in nbformat.read(root/"nbs/index.ipynb", as_version=4).cells}
    title, claim, *_ = [o for o in cells["6d1f0a01"].splitlines() if o.strip()]
    site = "https://subspace-circuits.github.io/subspace_circuits"
    rows = re.findall(r"^\| \[([^]]+)\]\((.+?)\.ipynb\) \|.*\| (.+) \|$", cells["6d1f0a06"], re.M)
    file = lambda page: re.sub(r"(^|/)\d+[a-z]*_", r"\1", page) # as nbdev names it on the site
    pages = [f"- [{name}]({site}/{file(page)}.html): {what}" for name, page, what in rows]
    return "\n".join([title, "", claim, "", "## Pages", "", *pages, "", "## More", "",
                      "- [Notebooks and sources](https://github.com/subspace-circuits/subspace_circuits)", ""])


if __name__ == "__main__":
    for path, text in ((root/"README.md", readme()), (root/"nbs"/"llms.txt", llms())):
        if "--check" not in sys.argv: path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.name} differs from nbs/index.ipynb: run `make readme`")
