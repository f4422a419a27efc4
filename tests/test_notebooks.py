"Every notebook is a page that can be read without running it."
import json
from pathlib import Path

import pytest

nbs = Path(__file__).resolve().parent.parent/"nbs"
paths = [o for o in sorted(nbs.rglob("*.ipynb")) if ".ipynb_checkpoints" not in o.parts]


@pytest.mark.parametrize("path", paths, ids=lambda o: o.relative_to(nbs).as_posix())
def test_notebook(path):
    nb = json.loads(path.read_text(encoding="utf-8"))
    cells = nb["cells"]
    assert (nb["nbformat"], nb["nbformat_minor"]) == (4, 5)
    ids = [o.get("id") for o in cells]
    assert all(ids) and len(set(ids)) == len(ids), "cell ids are missing or repeated"
    first = next(o for o in cells if o["cell_type"] == "markdown")
    assert "".join(first["source"]).startswith("# "), "the first markdown cell is not an H1"

    code = [o for o in cells if o["cell_type"] == "code"]
    outputs = [(o["id"], out) for o in code for out in o["outputs"]]
    assert [i for i, out in outputs if out["output_type"] == "error"] == [], "stored errors"
    assert [i for i, out in outputs if len(json.dumps(out)) > 100_000] == [], "outputs over 100 kB"
    assert [i for i, out in outputs if "application/vnd.jupyter.widget-view+json" in out.get("data", {})
            or out.get("name") == "stderr"] == [], "stored progress bars or warnings"
    if path.name != "index.ipynb" and code: assert outputs, "no stored outputs"
