"Write README.md from nbs/index.ipynb; with --check, fail if it is out of date. Needs no Quarto."
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


if __name__ == "__main__":
    path, text = root/"README.md", readme()
    if "--check" not in sys.argv: path.write_text(text, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != text: sys.exit("README.md differs from nbs/index.ipynb: run `make readme`")
