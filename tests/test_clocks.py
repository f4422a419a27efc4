"No page and no test asserts or shows what a clock said: how long something takes is measured by `benchmark` alone."
import ast, json
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
pages = [o for o in sorted((root/"nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in o.parts]
CLOCKS = {"perf_counter", "monotonic", "process_time", "thread_time", "default_timer", "timeit"} # of a module
ASSERTIONS = {"test_eq", "test_ne", "test_close", "test_is", "test_shuffled", "assert_close", "assert_allclose"}
SHOWS = {"print", "display", "show"}
STANDS_IN = "ticks" # a fixture that replaces the clock by a counter


def name_of(node):
    "The name that a call, an attribute or a subscript begins with."
    while inner := getattr(node, "func", getattr(node, "value", None)): node = inner
    return getattr(node, "id", None)


def key(node): return getattr(getattr(node, "slice", None), "value", None) if isinstance(node, ast.Subscript) else None


def is_clock(node):
    "A look at a clock, code in a string that looks at one, or the entry `seconds` of something."
    if isinstance(node, ast.Attribute) and node.attr == "time": return name_of(node) == "time"
    if isinstance(node, (ast.Attribute, ast.Name)):
        return getattr(node, "attr", getattr(node, "id", "")).removesuffix("_ns") in CLOCKS
    if isinstance(node, ast.Subscript): return key(node) == "seconds"
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and any(o in node.value for o in CLOCKS)


def names(target): return {o.id for o in ast.walk(target) if isinstance(o, ast.Name)}


def arguments(function): return {o.arg for o in ast.walk(function.args) if isinstance(o, ast.arg)}


def timed(node, known):
    "Whether a value depends on a clock, if what has the names of `known` does."
    if is_clock(node): return True
    if isinstance(node, ast.Name): return node.id in known
    if key(node) in ("what", "bar"): return False # of a figure, whatever was measured
    if generators := getattr(node, "generators", None): # of those, what is made, not what it is made from
        for o in generators: known = known | names(o.target) if timed(o.iter, known) else known - names(o.target)
        made = [o for x in ("key", "value", "elt") if (o := getattr(node, x, None))]
        return any(timed(o, known) for o in made + [o for g in generators for o in g.ifs])
    if isinstance(node, ast.Lambda): known = known - arguments(node)
    inner = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.Dict):
        inner = [v for k, v in zip(node.keys, node.values) if getattr(k, "value", "") != "seconds"]
    return any(timed(o, known) for o in inner if getattr(o, "arg", "") != "seconds") # which is read by that name


def own(body):
    "The statements of a body, without those of functions and classes in it."
    for o in body:
        yield o
        if isinstance(o, (ast.FunctionDef, ast.ClassDef)): continue
        for block in ("body", "orelse", "finalbody"): yield from own(getattr(o, block, []))
        for handler in getattr(o, "handlers", []): yield from own(handler.body)


def functions(body): return [o for o in body if isinstance(o, ast.FunctionDef)]


class Flow:
    "Which names of some code hold what a clock said."
    def __init__(self, body, known=frozenset()):
        self.body, self.known, size = list(own(body)), set(known), -1 # names of functions and of variables
        while size != (size := len(self.known)):
            for o in self.body: self.follow(o)

    def timed(self, *nodes): return any(timed(o, self.known) for o in nodes)

    def follow(self, o):
        if isinstance(o, ast.Assign):
            for target in o.targets: self.bind(target, o.value)
        elif isinstance(o, (ast.AugAssign, ast.AnnAssign)): self.bind(o.target, o.value)
        elif isinstance(o, ast.For): self.bind(o.target, o.iter)
        elif isinstance(o, ast.With):
            for i in o.items: self.bind(i.optional_vars, i.context_expr)
        elif isinstance(o, ast.FunctionDef):
            if self.gives(o): self.known.add(o.name)
        elif isinstance(o, ast.Expr) and isinstance(o.value, ast.Call) and isinstance(o.value.func, ast.Attribute):
            given = [*o.value.args, *(x for x in o.value.keywords if x.arg != "seconds")] # which is read by that name
            if self.timed(*given): self.known.add(name_of(o.value)) # as of a list that grows

    def bind(self, target, value):
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for a, b in zip(target.elts, value.elts): self.bind(a, b)
        elif target and value and self.timed(value):
            self.known |= {name_of(o) for o in getattr(target, "elts", [target])}

    def inside(self, function):
        stored = {o.id for o in ast.walk(function) if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Store)}
        return Flow(function.body, self.known - stored - arguments(function))

    def gives(self, function):
        "Whether a function returns or yields what a clock said."
        inner = self.inside(function)
        ends = [p for o in inner.body if not isinstance(o, (ast.FunctionDef, ast.ClassDef)) for p in ast.walk(o)]
        given = [o.value for o in ends if isinstance(o, (ast.Return, ast.Yield, ast.YieldFrom)) and o.value]
        return inner.timed(*given)

    def asserted(self):
        "Assertions about what a clock said, those in functions too."
        for o in self.body:
            if isinstance(o, ast.FunctionDef):
                if STANDS_IN not in arguments(o): yield from self.inside(o).asserted()
            elif isinstance(o, ast.ClassDef): yield from Flow(o.body, self.known).asserted()
            elif isinstance(o, ast.Assert):
                if self.timed(o.test): yield o
            elif isinstance(o, ast.Expr) and isinstance(o.value, ast.Call):
                called = getattr(o.value.func, "id", getattr(o.value.func, "attr", None))
                if called in ASSERTIONS and self.timed(*o.value.args, *o.value.keywords): yield o


def package_functions():
    "Functions of the package that return what a clock said."
    trees = [ast.parse(o.read_text(encoding="utf-8")) for o in sorted((root/"subspace_circuits").rglob("*.py"))]
    known, size = set(), -1
    while size != (size := len(known)):
        for tree in trees:
            flow = Flow(tree.body, known)
            known |= {o.name for o in functions(flow.body)} & flow.known
    return known


def code_cells(page):
    for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        source = "".join(o for o in cell["source"] if not o.startswith(("%", "!")))
        if cell["cell_type"] == "code": yield cell["id"], ast.parse(source).body


def clocks_of_page(page, known):
    "Cells that assert or show what a clock said; what a cell makes anew holds what it made."
    for id, body in code_cells(page):
        used = [o for x in body for o in ast.walk(x) if isinstance(o, ast.Name)]
        stored, loaded = ({o.id for o in used if isinstance(o.ctx, c)} for c in (ast.Store, ast.Load))
        here = Flow(body, known - (stored - loaded) - {o.name for o in functions(body)})
        known = here.known
        yield from (f"{id} asserts {ast.unparse(o)[:80]}" for o in here.asserted())
        shown = [o.value for o in here.body if isinstance(o, ast.Expr) and (o is body[-1] or name_of(o.value) in SHOWS)]
        yield from (f"{id} shows {ast.unparse(o)[:80]}" for o in shown if here.timed(o))


@pytest.fixture(scope="module")
def known(): return package_functions()


def test_functions_that_time_are_known(known):
    assert {"side_by_side", "capture_speed", "opening_seconds", "batch_speed", "benchmark_toys", "race"} <= known
    untimed = {"find_partition", "closed_form", "capture", "compare", "find_circuit", "nearest_neighbors"}
    assert not untimed & known


@pytest.mark.parametrize("page", pages, ids=lambda o: o.stem)
def test_page(page, known): assert list(clocks_of_page(page, known)) == []


@pytest.mark.parametrize("file", sorted((root/"tests").glob("test_*.py")), ids=lambda o: o.stem)
def test_tests(file, known):
    body = ast.parse(file.read_text(encoding="utf-8")).body
    assert [f"line {o.lineno}: {ast.unparse(o)[:80]}" for o in Flow(body, known).asserted()] == []


@pytest.mark.parametrize("code, held", [
    ("start = time.perf_counter(); f(); assert time.perf_counter() - start < 5", 1),
    ("def took(f):\n    at = time.time()\n    f()\n    return time.time() - at\nr = took(a)/took(b)\nassert r > 2", 1),
    ("spent = []\nspent.append(monotonic())\ntest_close(spent[0], 1)", 1),
    ("runs = {k: side_by_side(v) for k, v in o}\nworst, n = max(runs.values()), 3\nassert n == 3\nassert worst < 1", 1),
    ("assert found.info['seconds'] < 20", 1),
    ("def test_it():\n    if x: assert float(python('from time import perf_counter; print(perf_counter())')) < 1", 1),
    ("info = dict(n=3, seconds=perf_counter())\nassert info['n'] == 3", 0),
    ("start = perf_counter()\ndef f():\n    start = 3\n    return start\nassert f() == 3", 0),
    ("def test_it(ticks): assert race(perf_counter()) == 3", 0),
])
def test_clock_is_seen(code, held, known): assert len(list(Flow(ast.parse(code).body, known).asserted())) == held
