"""Read and write files so that nobody's work is lost and no damage goes unseen.

Every file that this program writes says so inside, with what it is: JSON in its last key, JSON lines in the first,
tensors in their metadata, pages, tables and cells in their last line. No file without that mark is ever replaced or
removed. JSON carries the SHA-256 of its own text, and so do tensors that nothing else lists. Shards, moments,
coordinates, cells and partitions are hashed where they are first read: once a process, about a second for each GB
(`subspace-circuits benchmark store` measures it), in pieces, so that the memory of a process does not grow."""
import fcntl, glob, hashlib, json, os, re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

__all__ = ["check", "check_free", "check_output", "check_shape", "claim_folder", "comment", "damaged", "for_browser",
           "foreign", "kind_of", "left_over", "mark", "of_others", "one_writer", "owned", "parse_json",
           "raised_here", "read_json", "read_json_lines", "read_json_of_others", "read_tensors", "read_yaml", "reason",
           "remove", "replacing", "reserve", "rounded", "sha256", "walk", "write_json", "write_tensors", "write_text"]

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
    """Remove a folder that this program wrote, lists before what they list; nothing if anything else is in it. What
    holds the lock of the process that removes it stays, with its lock."""
    if not folder.exists() and not folder.is_symlink(): return
    held = owned(folder, layout)
    locks = [o for o in held if o.name == "writer.pid" and o.parent == folder and o.read_bytes() == b"%d" % os.getpid()]
    for o in sorted(set(held) - set(locks), key=lambda o: o.suffix != ".json"): o.unlink()
    for o in sorted(([] if locks else [folder]) + [o for o in folder.rglob("*") if o.is_dir()], reverse=True): o.rmdir()


@contextmanager
def one_writer(
    folder: Path, # One of ours, or one that becomes it
):
    "Be the only process that writes a folder, or raise naming the one that does; a folder that stays empty goes again."
    path, locked, made = folder/"writer.pid", False, not folder.exists()
    while not locked:
        if path.is_symlink(): raise ValueError(f"{path} is a link, not a lock of ours: name another folder")
        try: file = folder.mkdir(parents=True, exist_ok=True) or path.open("a+")
        except FileNotFoundError: continue # its last owner has just removed the folder
        except OSError as e:
            raise ValueError(f"{folder} cannot be written ({reason(e)}): name another folder") from None
        try: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"{folder} is being written by process {file.read() or 'that just started'}: wait for "
                             f"it, or name another folder") from None
        try: locked = os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except FileNotFoundError: locked = False # its last owner has just removed it
        if not locked: file.close()
    if kind_of(path) != "lock":
        file.close()
        raise ValueError(f"{path} holds something else, not the number of a process: name another folder")
    try:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        if made and folder.is_dir() and not any(folder.iterdir()): folder.rmdir()
        file.close()


@contextmanager
def claim_folder(folder: Path, layout: dict, settings: dict, what: str, overwrite: bool, resume: bool):
    """Hold a folder for a job, yielding whether it holds that of these settings already; one of others is refused, and
    what this program did not write. A finished one is only read, which needs no lock."""
    if not overwrite and (folder/"metrics.json").exists(): yield _same_job(folder, layout, settings, what)
    else:
        if resume and not (folder/"config.json").exists():
            raise ValueError(f"nothing to resume in {folder}: it holds no {what}; leave out --resume to start one")
        if folder.exists() and not folder.is_dir(): raise ValueError(f"{folder} is a file: name a folder")
        with one_writer(folder):
            if overwrite: remove(folder, layout)
            yield _same_job(folder, layout, settings, what)


def _same_job(folder: Path, layout: dict, settings: dict, what: str) -> bool:
    "Whether a folder holds a job of these settings, and nothing of others."
    owned(folder, layout)
    if not (file := folder/"config.json").exists(): return False
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


def check_output(file: Path, kind: str, suffix: str, overwrite: bool = True):
    "Before the work: refuse a file of another format, where no file can be, or where one would be lost."
    if file.suffix != suffix: raise ValueError(f"{file} is no name of a {suffix} file: name one that ends in {suffix}")
    if file.is_dir(): raise ValueError(f"{file} is a folder: name a file in it")
    folder = next(o for o in file.absolute().parents if o.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{file} cannot be written, {folder} is {'not writable' if folder.is_dir() else 'a file'}: "
                         "name a file in another folder")
    check_free(file, kind, overwrite)


# ## Writing

def _runs(pid: int) -> bool:
    "Whether a process of this machine runs."
    try: os.kill(pid, 0)
    except (ProcessLookupError, OverflowError): return False
    except PermissionError: return True
    return True


@contextmanager
def replacing(file: Path, kind: str | None):
    """A name to write under: what has been written whole takes the file's own name, and nothing is left of what was
    not, nor of what a process that is gone had begun. The name is that of one process: two never write into one."""
    if kind: check_free(file, kind)
    file.parent.mkdir(parents=True, exist_ok=True)
    for o in file.parent.glob(f".{glob.escape(file.name)}.*.{PROGRAM}"):
        pid = o.name.split(".")[-2]
        if pid.isdecimal() and not _runs(int(pid)): o.unlink(missing_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.{PROGRAM}")
    try:
        yield part
        part.replace(file)
    finally: part.unlink(missing_ok=True)


def reserve(f, size: int):
    "Give an open file its size, with room on the disk behind it: without, a full disk ends a process that maps it."
    f.flush()
    if hasattr(os, "posix_fallocate"): os.posix_fallocate(f.fileno(), 0, size)
    else:
        f.seek(0, 2)
        for _ in range(f.tell(), size, 2**20): f.write(bytes(min(2**20, size - f.tell())))
    f.truncate(size)


def write_text(file: str | Path, text: str, kind: str):
    "Write a page or a table whose format allows comments."
    with replacing(Path(file), kind) as part: part.write_text(f"{text.rstrip()}\n{comment(kind)}", encoding="utf-8")


def rounded(o, digits: int = 6):
    "The same JSON value with rounded numbers, keys as JSON has them."
    if isinstance(o, dict): return {str(k): rounded(v, digits) for k, v in o.items()}
    if isinstance(o, list | tuple): return [rounded(v, digits) for v in o]
    return round(o, digits) if isinstance(o, float) else o


def write_json(file: str | Path, value: dict, kind: str):
    "Write a JSON object; its last key says what wrote it, and the SHA-256 of the text before that key."
    body = json.dumps(value, indent=1).removesuffix("}").rstrip("\n")
    seal = f'{","*bool(value)}\n "written": "{mark(kind)}, sha256 {hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'
    with replacing(Path(file), kind) as part: part.write_text(body + seal, encoding="utf-8")


def write_tensors(file: str | Path, tensors: dict[str, Tensor], kind: str | None = None, about: dict | None = None):
    """Write a safetensors file: with JSON about it also with the SHA-256 of both, else something has to list its hash.
    Of no kind it has no mark, as anybody's weights."""
    file, said = Path(file), json.dumps(about)
    seal = f", sha256 {tensors_hash(tensors, said)}, {said}" if about is not None else ""
    said = dict(written=mark(kind) + seal) if kind else None
    with replacing(file, kind) as part:
        try: save_file(tensors, part, metadata=said)
        except SafetensorError as e: raise OSError(f"{file} could not be written ({reason(e)})") from e


def tensors_hash(tensors: dict[str, Tensor], said: str) -> str:
    "SHA-256 of named tensors and of what is said of them."
    h = hashlib.sha256(said.encode())
    for k, v in sorted(tensors.items()):
        h.update(f"{k} {v.dtype} {tuple(v.shape)}".encode())
        h.update(v.cpu().reshape(-1).view(uint8).numpy())
    return h.hexdigest()


# ## Reading

def parse_json(data: bytes | str, where: str | Path, remedy: str, finite: bool = True):
    """The one door that JSON comes in by: a value, or one line that names where it stands. NaN and infinities are no
    JSON; they pass where this program wrote them itself, or another library reads the file again."""
    def refuse(o): raise ValueError(f"{o} is no number of JSON")
    try: return json.loads(data.decode("utf-8-sig") if isinstance(data, bytes) else data,
                           parse_constant=refuse if finite else None)
    except RecursionError: raise ValueError(f"{where} is nested too deeply for JSON of ours: {remedy}") from None
    except UnicodeDecodeError: raise ValueError(f"{where} is no UTF-8, so no JSON: {remedy}") from None
    except ValueError as e: raise ValueError(f"{where} is no JSON ({reason(e)}): {remedy}") from None


def for_browser(value):
    "The same JSON value with null for NaN and infinities, which no browser reads."
    return json.loads(json.dumps(value), parse_constant=lambda o: None)


WORDS = {dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number",
         bool: "true or false", type(None): "null"}


def check_shape(value, shape, where: str, remedy: str):
    """Refuse a JSON value of another shape than asked for: a type or several in a tuple, `[shape of each entry]`,
    `{key: shape}` where a key that ends in ? may be missing, or `{str: shape}` for any keys."""
    def refuse(need):
        said = json.dumps(value)
        raise ValueError(f"{where} is {said if len(said) <= 60 else said[:60] + ' …'}, {need} is needed: {remedy}")
    if isinstance(shape, list):
        if not isinstance(value, list): refuse("a list")
        for i, o in enumerate(value): check_shape(o, shape[0], f"{where}[{i}]", remedy)
    elif isinstance(shape, dict):
        if not isinstance(value, dict): refuse("an object")
        for k, o in shape.items():
            if k is str: [check_shape(v, o, f"{where}.{name}", remedy) for name, v in value.items()]
            elif k.rstrip("?") in value: check_shape(value[k.rstrip("?")], o, f"{where}.{k.rstrip('?')}", remedy)
            elif not k.endswith("?"): raise ValueError(f"{where} has no {k}: {remedy}")
    else:
        types = shape if isinstance(shape, tuple) else (shape,)
        if float in types and int not in types: types += int,
        if not isinstance(value, types) or isinstance(value, bool) and bool not in types:
            refuse(" or ".join(WORDS[o] for o in (shape if isinstance(shape, tuple) else (shape,))))


def _bytes(file: Path, remedy: str) -> bytes:
    try: return Path(file).read_bytes()
    except OSError as e: raise ValueError(f"{file} cannot be read ({e.strerror}): {remedy}") from None


def read_json_of_others(file: str | Path, remedy: str, shape=dict, finite: bool = True):
    "The JSON of a file that another program or a hand wrote, refused with its name unless it has a shape."
    value = parse_json(_bytes(file, remedy), file, remedy, finite)
    check_shape(value, shape, str(file), remedy)
    return value


def read_yaml(file: str | Path, remedy: str) -> dict:
    "The mapping of a YAML or JSON file, which a hand wrote."
    import yaml
    data = _bytes(file, remedy)
    try: value = yaml.safe_load(data.decode("utf-8-sig"))
    except UnicodeDecodeError: raise ValueError(f"{file} is no UTF-8: {remedy}") from None
    except RecursionError: raise ValueError(f"{file} is nested too deeply for settings: {remedy}") from None
    except (yaml.YAMLError, ValueError) as e: raise ValueError(f"{file} is no YAML ({reason(e)}): {remedy}") from None
    if not isinstance(value, dict): raise ValueError(f"{file} holds no settings: {remedy}")
    return value


def read_json_lines(file: str | Path, shape: dict, remedy: str) -> list[dict]:
    "The objects of a file with one in a line, each of a shape; empty lines are none."
    try: lines = _bytes(file, remedy).decode().splitlines()
    except UnicodeDecodeError: raise ValueError(f"{file} is no UTF-8: {remedy}") from None
    out = [(f"{file}, line {i}", o) for i, o in enumerate(lines, 1) if o.strip()]
    out = [(where, parse_json(o, where, remedy)) for where, o in out]
    for where, o in out: check_shape(o, shape, where, remedy)
    return [o for _, o in out]


def read_json(file: str | Path, kind: str, public: bool = False, shape=dict) -> dict:
    "The JSON object that this program wrote as something; of a public format also what others wrote, without a mark."
    data = _bytes(file, f"name one that {PROGRAM} wrote")
    if not (found := END.search(data, max(0, len(data) - 200))) or not found[2]:
        again = "make it again in another place"
        if not public:
            raise ValueError(f"{file} is not {kind} as this version of {PROGRAM} writes it, or its end is damaged: "
                             f"{again}")
        value = parse_json(data, file, "copy it again", finite=False)
        check_shape(value, shape, str(file), "copy it again")
        return value
    if (theirs := found[1].decode()) != kind:
        raise ValueError(f"{file} is {theirs} of {PROGRAM}, not {kind}: name another file")
    if hashlib.sha256(data[:found.start()]).hexdigest() != found[2].decode(): raise damaged(file)
    value = parse_json(data[:found.start()] + b"}", file, "make it again", finite=False)
    check_shape(value, shape, str(file), "make it again")
    return value


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
    return tensors, parse_json(found[3], file, "write it anew", finite=False) if found else {}


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
