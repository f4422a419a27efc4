"The check of the website's pages finds what it is for."
import json, subprocess, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
FIGURE = '<div id="{0}" class="plotly-graph-div"></div><script>Plotly.newPlot("{0}", [])</script>'


def cell(id, source, kind="code", html=None):
    outputs = [dict(output_type="display_data", data={"text/html": html}, metadata={})] if html else []
    more = dict(outputs=outputs, execution_count=None) if kind == "code" else {}
    return dict(cell_type=kind, id=id, metadata={}, source=source, **more)


def test_faults_are_named(tmp_path):
    cells = [
        cell("title", "# Some page\n\n> What it says.", "markdown"),
        cell("early", "#| export\ndef early(x:'Later'): 'Ask for what comes later.'"),
        cell("later", "#| export\nclass Later: 'What comes later.'"),
        cell("mixed", "import math\nhalf = math.pi/2"),
        cell("heading", "## Some figure", "markdown"),
        cell("wrong", "draw()", html=FIGURE.format("some-figure")),
        cell("right", "draw()", html=FIGURE.format("figure:some-figure")),
        cell("nested", "See [the `plant`](elsewhere.ipynb) and ![`plant` drawn](plant.png).", "markdown"),
    ]
    page = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)
    (tmp_path/"page.ipynb").write_text(json.dumps(page))
    done = subprocess.run([sys.executable, ".ci/pages.py", str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 1
    found = [o.removeprefix("page.ipynb: ") for o in done.stderr.splitlines() if o.startswith("page.ipynb: ")]
    wanted = [
        "the page: not both a notebook and in the sidebar",
        "show_doc(early): NameError: name 'Later' is not defined",
        "mixed: imports and other code",
        "show_doc(Later): no link to the source", # a class of this page, not of the package
        "wrong: its figure is 'some-figure', and so is something else: heading, wrong",
        "nested: a link in a link: [the [`plant`](",
        "nested: a link to circuit_families.html#plant, which is not there", # nor is that page
        "nested: a link to circuit_families.html#plant, which is not there",
    ]
    assert len(found) == len(wanted) and all(o.startswith(w) for o, w in zip(found, wanted)), found
