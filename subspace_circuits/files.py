"""Read and write files so that nobody's work is lost and no damage goes unseen.

Every file that this program writes says so inside, with what it is: JSON in its last key, JSON lines in the first,
tensors in their metadata, pages, tables and cells in their last line. No file without that mark is ever replaced or
removed. JSON carries the SHA-256 of its own text, and so do tensors that nothing else lists. Shards, moments,
coordinates, cells and partitions are hashed where they are first read: once a process, about a second for each GB
(`subspace-circuits benchmark store` measures it), in pieces, so that the memory of a process does not grow."""
import hashlib, json, os, re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

__all__ = ["check", "check_free", "claim_folder", "comment", "damaged", "foreign", "kind_of", "left_over", "mark",
           "of_others", "owned", "raised_here", "read_json", "read_tensors", "reason", "remove", "replacing", "sha256",
           "walk", "write_json", "write_tensors", "write_text"]

PROGRAM = "subspace_circuits"
END = re.compile(rb'(?:,?\n "written": "|<!-- )subspace_circuits: ([a-z ]+)(?:, sha256 ([0-9a-f]{64})"\n\}| -->)\n\Z')
START = re.compile(rb'.{8}\{"__metadata__":\{"written":"subspace_circuits: ([a-z ]+)', re.DOTALL)
HEAD = re.compile(rb'\{"written": "subspace_circuits: ([a-z ]+)"\}\n') # The first of JSON lines
hashed = {} # What identifies a file's content, to its SHA-256


def reason(e: Exception) -> str:
    "The first sentence of another library's error, in one line."
    return " ".join(str(e).split()).split(". ")[0][:200] or type(e).__name__


def raised_here(e: Exception) -> bool:
    "Whether this package raised an error itself, with a message for the user."
    last = e.__traceback__
    while last.tb_next: last = last.tb_next
    return isinstance(e, ValueError) and Path(__file__).parent in Path(last.tb_frame.f_code.co_filename).parents


@contextmanager
def foreign(what: str, remedy: str):
    "The door to another library: whatever it raises leaves as one line that says what failed and what would work."
    try: yield
    except Exception as e:
        if raised_here(e): raise
        raise ValueError(f"{what}: {remedy} ({reason(e)})") from e


def of_others(path: str) -> Path:
    "Where to look for a file that cannot ship with this package: in the folder that SUBSPACE_CIRCUITS_DATA names."
    return Path(os.environ.get("SUBSPACE_CIRCUITS_DATA", "data"))/path


# ## Whose a file is

def mark(kind: str) -> str:
    "What a file says of itself."
    return f"{PROGRAM}: {kind}"


def comment(kind: str) -> str:
    "The mark as the last line of a page, a table or a file that ignores what follows its end."
    return f"<!-- {mark(kind)} -->\n"


def kind_of(file: Path) -> str | None:
    "What this program wrote to a file, read from the file; nothing of links, folders and all that others wrote."
    if file.is_symlink() or not file.is_file() or not os.access(file, os.R_OK): return None
    with file.open("rb") as f:
        start = f.read(200)
        f.seek(max(0, f.seek(0, 2) - 200))
        end = f.read()
    if file.name == "writer.pid": return "lock" if re.fullmatch(rb"\d{0,20}", start) else None
    found = START.match(start) or HEAD.match(start) or END.search(end)
    return found[1].decode() if found else None


def left_over(file: Path) -> bool:
    "Whether a killed process left a file half written: under a name of `replacing`, or one that safetensors gives."
    if file.is_symlink() or not file.is_file(): return False
    if file.name.startswith(".") and file.name.endswith(f".{PROGRAM}"): return True
    return bool(re.fullmatch(r"\.tmp\w{6}", file.name)) and (file.stat().st_size == 0 or kind_of(file) is not None)


def walk(folder: Path, layout: dict) -> Iterator[tuple[Path, bool]]:
    """Every file and every foreign thing in a folder, and whether this program wrote it.
    A layout says of each name what kind of file it is, or, of a folder, what that holds."""
    for o in sorted(folder.iterdir()):
        holds = next((v for k, v in layout.items() if fnmatchcase(o.name, k)), None)
        if isinstance(holds, dict) and o.is_dir() and not o.is_symlink(): yield from walk(o, holds)
        else: yield o, left_over(o) or (isinstance(holds, str) and kind_of(o) == holds)


def owned(folder: Path, layout: dict) -> list[Path]:
    "The files of a folder, if this program wrote all of them."
    if folder.is_symlink(): raise ValueError(f"{folder} is a link: name the folder itself")
    if not folder.is_dir(): raise ValueError(f"{folder} is a file: name a folder")
    found = list(walk(folder, layout))
    if foreign := next((o for o, ours in found if not ours), None):
        raise ValueError(f"{folder} holds something else ({foreign.relative_to(folder)} was not written there by "
                         f"{PROGRAM}): name an empty or a new folder, or move it away")
    return [o for o, _ in found]


def remove(folder: Path, layout: dict):
    "Remove a folder that this program wrote, lists before what they list; nothing if anything else is in it."
    if not folder.exists() and not folder.is_symlink(): return
    for o in sorted(owned(folder, layout), key=lambda o: o.suffix != ".json"): o.unlink()
    for o in sorted((folder, *folder.rglob("*")), reverse=True): o.rmdir()


def claim_folder(folder: Path, layout: dict, settings: dict, what: str, overwrite: bool, resume: bool) -> bool:
    "Whether a folder holds a job of these settings; one of others is refused, and what this program did not write."
    if overwrite: remove(folder, layout)
    if folder.exists(): owned(folder, layout)
    file = folder/"config.json"
    if not file.exists():
        if resume:
            raise ValueError(f"nothing to resume in {folder}: it holds no {what}; leave out --resume to start one")
        return False
    held = read_json(file, layout["config.json"])
    for k in dict.fromkeys([*held, *settings]):
        if held.get(k) != settings.get(k):
            raise ValueError(f"{folder} holds a {what} with {k} {held.get(k)!r}, not {settings.get(k)!r}: name another "
                             "folder, or pass --overwrite")
    return True


def check_free(file: Path, kind: str, overwrite: bool = True):
    "Refuse to write a file where there is one, or, to replace one, where this program did not write it."
    if not file.exists() and not file.is_symlink(): return
    if not overwrite: raise ValueError(f"{file} exists: name another file, or pass --overwrite")
    if kind_of(file) != kind:
        raise ValueError(f"{file} is not what {PROGRAM} writes as {kind}, and would be lost: "
                         "name another file, or move it away")


# ## Writing

@contextmanager
def replacing(file: Path, kind: str | None):
    "A name to write under: what has been written whole takes the file's own name, and nothing is left of what was not."
    if kind: check_free(file, kind)
    part = file.with_name(f".{file.name}.{PROGRAM}")
    try:
        yield part
        part.replace(file)
    finally: part.unlink(missing_ok=True)


def write_text(file: str | Path, text: str, kind: str):
    "Write a page or a table whose format allows comments."
    with replacing(Path(file), kind) as part: part.write_text(f"{text.rstrip()}\n{comment(kind)}", encoding="utf-8")


def write_json(file: str | Path, value: dict, kind: str):
    "Write a JSON object; its last key says what wrote it, and the SHA-256 of the text before that key."
    body = json.dumps(value, indent=1).removesuffix("}").rstrip("\n")
    seal = f'{","*bool(value)}\n "written": "{mark(kind)}, sha256 {hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'
    with replacing(Path(file), kind) as part: part.write_text(body + seal, encoding="utf-8")


def write_tensors(file: str | Path, tensors: dict[str, Tensor], kind: str | None = None, about: dict | None = None):
    """Write a safetensors file: with JSON about it also with the SHA-256 of both, else something has to list its hash.
    Of no kind it has no mark, as anybody's weights."""
    file, said = Path(file), json.dumps(about)
    file.parent.mkdir(parents=True, exist_ok=True)
    seal = f", sha256 {tensors_hash(tensors, said)}, {said}" if about is not None else ""
    said = dict(written=mark(kind) + seal) if kind else None
    with replacing(file, kind) as part: save_file(tensors, part, metadata=said)


def tensors_hash(tensors: dict[str, Tensor], said: str) -> str:
    "SHA-256 of named tensors and of what is said of them."
    h = hashlib.sha256(said.encode())
    for k, v in sorted(tensors.items()):
        h.update(f"{k} {v.dtype} {tuple(v.shape)}".encode())
        h.update(v.cpu().reshape(-1).view(uint8).numpy())
    return h.hexdigest()


# ## Reading

def read_json(file: str | Path, kind: str, public: bool = False) -> dict:
    "The JSON object that this program wrote as something; of a public format also what others wrote, without a mark."
    try: data = Path(file).read_bytes()
    except OSError as e:
        raise ValueError(f"{file} cannot be read ({e.strerror}): name one that {PROGRAM} wrote") from None
    if not (found := END.search(data, max(0, len(data) - 200))) or not found[2]:
        if not public:
            raise ValueError(f"{file} is not {kind} as this version of {PROGRAM} writes it, or its end is damaged: "
                             "make it again in another place")
        try: return json.loads(data)
        except ValueError: raise ValueError(f"{file} is no JSON: copy it again") from None
    if (theirs := found[1].decode()) != kind:
        raise ValueError(f"{file} is {theirs} of {PROGRAM}, not {kind}: name another file")
    if hashlib.sha256(data[:found.start()]).hexdigest() != found[2].decode(): raise damaged(file)
    return json.loads(data[:found.start()] + b"}")


def read_tensors(file: str | Path, kind: str | None = None) -> tuple[dict[str, Tensor], dict]:
    "The tensors of a safetensors file and what is said of them; with a kind, only where this program wrote that."
    try:
        with safe_open(file, "pt") as f:
            tensors, said = {k: f.get_tensor(k) for k in f.keys()}, (f.metadata() or {}).get("written", "")
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{file} is no whole safetensors file ({str(e).splitlines()[0]}): copy it again, "
                         "or write it anew; pickles are not opened") from None
    found = re.fullmatch(rf"{PROGRAM}: ([a-z ]+), sha256 (\w+), (.*)", said, re.DOTALL)
    if kind and (not found or found[1] != kind):
        raise ValueError(f"{file} holds no {kind} of {PROGRAM}: name a new file, or one that it wrote")
    if found and tensors_hash(tensors, found[3]) != found[2]: raise damaged(file)
    return tensors, json.loads(found[3]) if found else {}


def sha256(file: Path, again: bool = False) -> str:
    "SHA-256 of a file, which is read once a process unless it changes, or is to be read again."
    o = file.stat()
    state = o.st_dev, o.st_ino, o.st_size, o.st_mtime_ns, o.st_ctime_ns
    if again or state not in hashed:
        with file.open("rb") as f: hashed[state] = hashlib.file_digest(f, "sha256").hexdigest()
    return hashed[state]


def check(file: Path, digest: str, again: bool = False):
    "Refuse a file that is missing, or whose bytes are not those that were listed."
    if not file.is_file() or sha256(file, again) != digest: raise damaged(file)


def damaged(file: str | Path) -> ValueError:
    "What to say of a file whose bytes have changed."
    return ValueError(f"{file} is missing or damaged, its bytes are not those that were written: "
                      "remove it and what was made with it, and make it again")
