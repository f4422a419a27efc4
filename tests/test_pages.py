"The check of the website's pages finds what it is for."
import json, re, subprocess, sys
from pathlib import Path

from execnb.nbio import read_nb
from nbdev.processors import FilterDefaults

root = Path(__file__).resolve().parent.parent
PLOTLY = "application/vnd.plotly.v1+json"


def figure(name, alt): return {PLOTLY: dict(data=[], layout=dict(meta=dict(name=name, alt=alt))), "text/plain": alt}


def cell(id, source, kind="code", data=None):
    outputs = [dict(output_type="display_data", data=data, metadata={})] if data else []
    more = dict(outputs=outputs, execution_count=None) if kind == "code" else {}
    return dict(cell_type=kind, id=id, metadata={}, source=source, **more)


def test_faults_are_named(tmp_path):
    cells = [
        cell("title", "# Some page\n\n> What it says.", "markdown"),
        cell("early", "#| export\ndef early(x:'Later'): 'Ask for what comes later.'"),
        cell("later", "#| export\nclass Later: 'What comes later.'"),
        cell("mixed", "import math\nhalf = math.pi/2"),
        cell("heading", "## Some figure", "markdown"),
        cell("wrong", "draw()", data=figure("twice", "A line that falls from left to right.")),
        cell("again", "draw()", data=figure("twice", "A line that rises from left to right.")),
        cell("mute", "draw()", data=figure("mute", "figure")),
        cell("right", "draw()", data=figure("right", "Two bars, of which the left one is higher.")),
        cell("far", "draw()", data={"text/html": '<script src="https://cdn.example.org/plotly.js"></script>'}),
        cell("run", "draw()", data={"application/javascript": "alert(1)"}),
        cell("frame", "draw()", data={"text/html": '<iframe srcdoc="words"></iframe>'}),
        cell("heavy", "x" + "y"*6_000_000, "markdown"),
        cell("nested", "See [the `plant`](elsewhere.ipynb) and ![`plant` as it is drawn there](plant.png).",
             "markdown"),
        cell("bare", "See page 03d, [page 03c](#some-figure), [page 02](#nowhere) and ![](plant.png).", "markdown"),
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
        "the page: 6.0 MB, the most is 5",
        "show_doc(Later): no link to the source", # a class of this page, not of the package
        "wrong: its figure is 'figure:twice', and so is something else: wrong, again",
        "again: its figure is 'figure:twice', and so is something else: wrong, again",
        "mute: a figure that nothing says in words: 'figure'",
        "far: loads https://cdn.example.org/plotly.js from elsewhere",
        "run: an output of type application/javascript",
        "frame: a frame that nothing says in words: ''",
        "nested: a link in a link: [the [`plant`](",
        "bare: a picture that nothing says in words: ''",
        "bare: 'page 03d' is no link",
        "nested: a link to circuit_families.html#plant, which is not there", # nor is that page
        "nested: a link to circuit_families.html#plant, which is not there",
        "nested: a link to elsewhere.ipynb#, which is not there",
        "bare: a link to #nowhere, which is not there",
    ]
    assert len(found) == len(wanted) and all(o.startswith(w) for o, w in zip(found, wanted)), found


def test_pages_load_nothing_from_elsewhere_and_fold_proofs(monkeypatch, tmp_path):
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(root/".ci")
    monkeypatch.setenv("IN_TEST", "1")
    cells = [
        cell("title", "# Some page", "markdown"),
        cell("export", "#| export\nfrom typing import NamedTuple\nclass Pair(NamedTuple):\n    'Two.'\n"
                       "    a:int # The first\n    b:float=.5 # The second, # and last"),
        cell("table", "frame", data={"text/html": '<style scoped>th {}</style><table border="1" class="dataframe">'}),
        cell("proof", "assert Pair(1).b == .5", data=figure("proof", "One \"dot\" at </script> the middle.")),
        cell("refused", "with expect_fail(ValueError): Pair()"),
        cell("helpers", "def half(x): return x/2"),
        cell("settings", "torch.set_num_threads(1)\ndef seeded(): return 0"),
        cell("open", "half(Pair(1).a)"),
    ]
    about = dict(metadata=dict(kernelspec=dict(language="python")), nbformat=4, nbformat_minor=5)
    (tmp_path/"page.ipynb").write_text(json.dumps(about | dict(cells=cells)))
    nb = read_nb(tmp_path/"page.ipynb")
    FilterDefaults()(nb)
    by_id = {o.get("id"): o for o in nb.cells}
    folded = {k: re.findall(r'code-summary: "(.*)"', o.source) for k, o in by_id.items()}
    assert {k: v[0] for k, v in folded.items() if v} == dict(
        proof="Proof", refused="What is refused", helpers="Helpers", settings="Settings")
    outputs = [o.data for x in nb.cells for o in x.get("outputs", []) if "data" in o]
    assert all(not {PLOTLY, "text/html", "application/javascript"} & set(o) for o in outputs)
    stored = ["".join(o["text/markdown"]) for o in outputs if "text/markdown" in o]
    signature, table, drawn = stored
    assert "class Pair(\n    a:int, # The first\n    b:float=0.5, # The second, # and last\n):" in signature
    assert table == '```{=html}\n<table class="dataframe table table-sm">\n```\n'
    assert 'aria-label="One &quot;dot&quot; at &lt;/script&gt; the middle."' in drawn and drawn.count("</script>") == 1
    data = json.loads(re.search(r'<script type="application/json">(.*)</script>', drawn)[1])
    assert data["layout"]["meta"]["name"] == "proof"
    scripts = re.findall(r'<script src="([^"]*)"', nb.cells[-1].source)
    assert scripts == ["assets/plotly.min.js", "figures.js"]
    assert "nbs/assets/plotly.min.js" in (root/"Makefile").read_text() and (root/"nbs/figures.js").exists()
