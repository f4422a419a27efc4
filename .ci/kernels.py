"""Run every page top to bottom in a fresh Jupyter kernel, two at a time, and name page and cell of every failure.

Cells that `nbdev_test` leaves out (`tst_flags` in settings.ini) are left out here too; `--long` runs those marked
`long`.
What a page is run for are its assertions: outputs are not kept.
Importing torch, TransformerLens and scikit-learn takes longer than many a page. One process imports them, and every
kernel is a copy of it (a fork): fresh, with nothing of this package imported and nothing of another page in it."""
import argparse, asyncio, os, re, sys
from concurrent.futures import ProcessPoolExecutor
from configparser import ConfigParser
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import nbformat
from ipykernel.kernelapp import IPKernelApp
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

root = Path(__file__).resolve().parent.parent
config = ConfigParser(delimiters=["="])
config.read(root/"settings.ini")
flags = set(config["DEFAULT"]["tst_flags"].split())
LIBRARIES = ["nbclient", "ipykernel.kernelapp", "torch", "transformer_lens.model_bridge", "sklearn.decomposition",
             "nbdev.processors", "fastcore.test"]


class Kernel(get_context("fork").Process):
    "A kernel as a copy of this process, with what jupyter_client asks of a `Popen`."
    stdin = stdout = stderr = None
    def __init__(self, command, cwd, env, **_):
        super().__init__()
        self.command, self.cwd, self.env = command, cwd, env
        self.start()
        os.setpgid(self.pid, self.pid) # a signal to its group must not reach ours

    def run(self):
        os.chdir(self.cwd)
        os.environ |= self.env
        asyncio.set_event_loop(asyncio.new_event_loop()) # the copied one is busy
        settings = [*self.command[self.command.index("-f"):], f"--IPKernelApp.parent_handle={os.getppid()}"]
        IPKernelApp.launch_instance(settings)

    def poll(self): return self.exitcode
    def send_signal(self, signum): os.kill(self.pid, signum)
    def wait(self):
        self.join()
        return self.exitcode


def marks(cell):
    "The flags of a cell: what stands behind `#|`."
    return {o for line in re.findall(r"^#\|(.*)$", cell.source, re.M) for o in line.split()}


def failure(path, left_out):
    "Run a page; why it failed, if it did."
    nb = nbformat.read(path, 4)
    nb.cells = [o for o in nb.cells if o.cell_type != "code" or not left_out & marks(o)]
    client = NotebookClient(nb, timeout=None, resources={"metadata": {"path": str(path.parent)}})
    os.environ["IN_TEST"] = "1" # as nbdev sets it; the cell that exports does nothing then
    try:
        with patch("jupyter_client.provisioning.local_provisioner.launch_kernel", Kernel): client.execute()
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
    failed, context = [], get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with ProcessPoolExecutor(2, context, max_tasks_per_child=1) as pool:
        running = {o: pool.submit(failure, o, flags - {"long"} if args.long else flags) for o in pages}
        for o, job in running.items():
            if why := job.result(): failed.append(why)
            print(f"{o.name} {'FAILED' if why else 'runs'}", flush=True)
    print("\n".join(failed), file=sys.stderr)
    sys.exit(bool(failed))
