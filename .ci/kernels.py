"""Run every page top to bottom in a fresh Jupyter kernel, two at a time, and name page and cell of every failure.

Cells that `nbdev_test` leaves out (`tst_flags` in settings.ini) are left out here too; `--long` runs those marked
`long`.
What a page is run for are its assertions: outputs are not kept."""
import argparse, re, sys
from concurrent.futures import ProcessPoolExecutor
from configparser import ConfigParser
from multiprocessing import get_context
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

root = Path(__file__).resolve().parent.parent
config = ConfigParser(delimiters=["="])
config.read(root/"settings.ini")
flags = set(config["DEFAULT"]["tst_flags"].split())


def marks(cell):
    "The flags of a cell: what stands behind `#|`."
    return {o for line in re.findall(r"^#\|(.*)$", cell.source, re.M) for o in line.split()}


def failure(path, left_out):
    "Run a page; why it failed, if it did."
    nb = nbformat.read(path, 4)
    nb.cells = [o for o in nb.cells if o.cell_type != "code" or not left_out & marks(o)]
    client = NotebookClient(nb, timeout=None, resources={"metadata": {"path": str(path.parent)}})
    try: client.execute()
    except CellExecutionError as e:
        cell = next(o for o in nb.cells if any(x.output_type == "error" for x in o.get("outputs", [])))
        return f"{path.name}, cell {cell.id}: {e.ename}: {e.evalue}\n{cell.source}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", type=Path, help="notebooks, all if none is named")
    parser.add_argument("--long", action="store_true", help="also cells marked `long`")
    args = parser.parse_args()
    pages = [o for o in args.pages or sorted((root/"nbs").rglob("*.ipynb"), reverse=True) # the longest come last
             if ".ipynb_checkpoints" not in o.parts]
    failed = []
    with ProcessPoolExecutor(2, get_context("spawn"), max_tasks_per_child=1) as pool:
        running = {o: pool.submit(failure, o, flags - {"long"} if args.long else flags) for o in pages}
        for o, job in running.items():
            if why := job.result(): failed.append(why)
            print(f"{o.name} {'FAILED' if why else 'runs'}", flush=True)
    print("\n".join(failed), file=sys.stderr)
    sys.exit(bool(failed))
