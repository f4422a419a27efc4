"""The tree as a whole: what importing the package costs, that modules import in one direction and keep to themselves
what is private, that pages stay short, and that the files agree with one another."""
import ast, fnmatch, json, os, re, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

import subspace_circuits

root = Path(__file__).resolve().parent.parent
text_names = "*.py *.ipynb *.md *.ini *.txt *.yml *.yaml *.cff *.json *.toml *.in *.css .git* Makefile run".split()


def python(code):
    "What a fresh interpreter prints for `code`."
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                          cwd=root).stdout.split()


def kept_files():
    "Every file that .gitignore does not exclude."
    lines = (root/".gitignore").read_text().splitlines()
    ignored = [".git"] + [o.strip("/") for o in lines if o and not o.startswith("#")]
    def kept(path): return not any(fnmatch.fnmatch(n, o) for n in (path.name, path.as_posix()) for o in ignored)
    for folder, subfolders, names in os.walk(root):
        here = Path(folder).relative_to(root)
        subfolders[:] = [o for o in subfolders if kept(here/o)]
        yield from (here/o for o in names if kept(here/o))


def test_import_is_light():
    code = "import sys; before = set(sys.modules); import subspace_circuits; print(*set(sys.modules) - before)"
    assert python(code) == ["subspace_circuits"]


def test_modules_need_no_development_tool():
    code = """import importlib, pkgutil, sys, subspace_circuits as package
for o in pkgutil.walk_packages(package.__path__, 'subspace_circuits.'): importlib.import_module(o.name)
print(*{o.split('.')[0] for o in sys.modules})"""
    assert not {"nbdev", "fastcore", "execnb", "pytest"} & set(python(code))


def modules():
    "Every module of the package but nbdev's index, by name, as a syntax tree."
    package = root/"subspace_circuits"
    files = [o for o in sorted(package.rglob("*.py")) if o.name != "_modidx.py"]
    return {".".join(o.relative_to(package).with_suffix("").parts).removesuffix(".__init__"): ast.parse(o.read_text())
            for o in files}


def own_imports(tree, module):
    "What a module imports from the package: module and name."
    for o in ast.walk(tree):
        if not isinstance(o, ast.ImportFrom): continue
        source = o.module or ""
        if o.level: source = ".".join([*module.split(".")[:-o.level], *source.split(".")]).strip(".")
        elif source.startswith("subspace_circuits"): source = source.removeprefix("subspace_circuits").strip(".")
        else: continue
        yield from ((source, a.name) for a in o.names)


def test_no_module_uses_what_is_private_to_another():
    assert [f"{m} from {source}: {name}" for m, tree in modules().items() for source, name in own_imports(tree, m)
            if name.startswith("_") and name != "__version__"] == []


def test_imports_make_no_circle():
    trees = modules()
    needs = {m: {source for source, _ in own_imports(tree, m) if source in trees and source != m}
             for m, tree in trees.items() if m}
    done = set()
    while ready := [m for m in needs if m not in done and needs[m] - {""} <= done]: done |= set(ready)
    assert sorted(needs.keys() - done) == []


def test_public_names_are_unambiguous():
    "No two modules define a public function or class of one name; commands are named after what they run."
    names = {}
    for m, tree in modules().items():
        if m == "cli": continue
        for o in tree.body:
            if isinstance(o, ast.FunctionDef | ast.ClassDef) and not o.name.startswith("_"):
                names.setdefault(o.name, []).append(m)
    assert {k: v for k, v in names.items() if len(v) > 1} == {}
    assert [k for k in names if k.startswith("test_")] == []


def test_pages_can_be_read():
    "Words of prose and length of code lines; the log grows by its entries."
    words, wide = {}, []
    for page in sorted((root/"nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in page.parts: continue
        cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
        words[page.name] = sum(len("".join(o["source"]).split()) for o in cells if o["cell_type"] == "markdown")
        wide += [f"{page.name} {o['id']}: {line}" for o in cells if o["cell_type"] == "code"
                 for line in "".join(o["source"]).splitlines() if len(line) > 120]
    for file in [*(root/"subspace_circuits").rglob("*.py"), *(root/"tests").glob("*.py"), *(root/".ci").glob("*.py")]:
        if file.name == "_modidx.py": continue
        wide += [f"{file.name}: {line}" for line in file.read_text(encoding="utf-8").splitlines()
                 if len(line) > 120 and not line.startswith(("__all__", '"""', "           '"))] # nbdev's own
    assert {k: v for k, v in words.items() if v > 3500 and k != "04_research_log.ipynb"} == {}
    assert wide == []


def test_readme_names_existing_paths():
    text = (root/"README.md").read_text()
    links = re.findall(r'(?:\]\(|(?:src|href)=")(?![a-z]+:|#)([^)"\s]+)', text)
    map_paths = re.findall(r"`([\w./]+\.(?:py|ipynb|md|cff|jsonl))`", text)
    assert links and map_paths
    assert [o for o in links + map_paths if not (root/o.split("#")[0]).exists()] == []


def test_one_version():
    config = ConfigParser(delimiters=["="])
    config.read(root/"settings.ini")
    version = config["DEFAULT"]["version"]
    assert subspace_circuits.__version__ == version
    assert f"\nversion: {version}\n" in (root/"CITATION.cff").read_text()
    assert f"\n## {version}" in (root/"CHANGELOG.md").read_text()


def test_no_path_of_a_machine():
    folders = "home Users root tmp work mnt opt private".split()
    machine = re.compile(r"(?<![\w.:/~$}*-])/(" + "|".join(folders) + r")/\w|\b[A-Z]:\\+Users")
    found = []
    for rel in kept_files():
        if not any(fnmatch.fnmatch(rel.name, o) for o in text_names): continue
        text = (root/rel).read_text(encoding="utf-8")
        found += [f"{rel}: {text[m.start():m.end() + 40]!r}" for m in machine.finditer(text)]
        found += [f"{rel}: a folder beside the checkout"]*("../" "shared" in text)
    assert found == []
