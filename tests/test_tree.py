"The tree as a whole: what importing the package costs, and that the files agree with one another."
import fnmatch, os, re, subprocess, sys
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


def test_readme_names_existing_paths():
    text = (root/"README.md").read_text()
    links = re.findall(r'(?:\]\(|(?:src|href)=")(?![a-z]+:|#)([^)"\s]+)', text)
    map_paths = re.findall(r"`([\w./]+\.(?:py|ipynb|md|cff))`", text)
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
    assert found == []
