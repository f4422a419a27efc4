"Nothing that others wrote is lost, and no changed byte changes a result in silence."
import json, os, random, shutil, sys
from functools import partial
from itertools import product

import networkx as nx
import pytest
import torch

from subspace_circuits import cli, files, pipeline, report
from subspace_circuits.activations import ActivationStore, moments
from subspace_circuits.circuit_graph import read_circuit, save_circuit
from subspace_circuits.circuits import keep_edges
from subspace_circuits.evaluation import Patch, interchange
from subspace_circuits.suites import gini, known_tests
from subspace_circuits.files import kind_of, owned, read_json, read_tensors, remove, write_json, write_tensors
from subspace_circuits.circuit_families import plant
from subspace_circuits.partition import Partition
from subspace_circuits.closed_form import closed_form
from subspace_circuits.preimages import Index, build_indexes, search_index
from subspace_circuits.toy_models import UniqueCopy, new_model, train

torch.set_num_threads(1)
NAME, FLIPS = "planted-skip_trigram", int(os.environ.get("FILE_FLIPS", 200))


def tree(folder):
    "Everything in a folder: bytes of files, targets of links."
    held = lambda o: os.readlink(o) if o.is_symlink() else o.read_bytes() if o.is_file() else None
    return {o.relative_to(folder).as_posix(): held(o) for o in folder.rglob("*")}


def flipped(data, at, by): return data[:at] + bytes([data[at] ^ by]) + data[at + 1:]


def plain(o):
    "A result as what == compares exactly."
    if isinstance(o, torch.Tensor):
        return str(o.dtype), tuple(o.shape), o.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(o, dict): return {k: plain(v) for k, v in o.items()}
    return [plain(x) for x in o] if isinstance(o, list | tuple) else o


@pytest.fixture(scope="module")
def job(tmp_path_factory): return finished_run(tmp_path_factory.mktemp("files")/"run")


def finished_run(run):
    """A finished run with an index, and what it is the run of; quick, with a third of the rows, subspaces in closed
    form, and a circuit chosen on a tenth of the answers."""
    claimed = []
    def here(name, out, job):
        for o in job["sites"]: pipeline.partition_site(name, out, o, job["seed"])
        write_json(out/"control.json", dict(n_edges=0), "control")
        return {o: pipeline.own_partition(out, o, job["seed"], job["model_sha256"]) for o in job["sites"]}
    def note(out, job, *how):
        claimed.append(job)
        return claim(out, job, *how)
    def quick(h, site, seed, weights, written):
        p = closed_form(h, site, seed, weights=weights)
        p.info |= dict(objective=0., verdict="", cuts=[])
        return p
    claim = pipeline.claim
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "partition_sites", here)
        patch.setattr(pipeline, "learn_partition", quick)
        patch.setattr(pipeline, "sequences_of", partial(pipeline.sequences_of, rows=10_000))
        patch.setattr(pipeline, "find_circuit", partial(pipeline.find_circuit, answers=100))
        patch.setattr(pipeline, "claim", note)
        pipeline.run(NAME, run)
    store = ActivationStore(run/"store")
    for o in (run/"partitions").iterdir():
        build_indexes(store, Partition.from_pretrained(o), run/"index"/o.name, exact=1000)
    return run, claimed[0]


def readings(run, job):
    "Every way to read what a run has written."
    folders, sites = sorted((run/"partitions").iterdir()), job["sites"]
    def store(): return ActivationStore(run/"store")
    def cuts(): return [Partition.from_pretrained(o) for o in folders]
    def resumed(): return pipeline.claim(run, job, False, True) and read_json(run/"metrics.json", "metrics")
    def found():
        out = []
        for o, p in zip(folders, cuts()):
            for index in (Index(run/"index"/o.name, k, store(), p) for k in p.names):
                near = [search_index(index, index.rows[7], 9, metric) for metric in ("cosine", "euclidean")]
                out += [index.info, index.rows, index.norms, near]
        return out
    return dict(resumed=resumed, index=found, rows=lambda: [store()[o] for o in sites],
                columns=lambda: [store().column(o) for o in ("token", "scored", "document")],
                batch=lambda: store().rows(sites[0], range(0, len(store()), 997)),
                moments=lambda: [moments(store(), o) for o in sites],
                partitions=lambda: [[p.site, p.bases, p.mean, p.info] for p in cuts()],
                circuit=lambda: nx.node_link_data(read_circuit(run/"circuit.json"), edges="edges"),
                report=lambda: [report.read(run/f"{k}.json", v) for k, v in pipeline.JSONS.items()])


def read_all(run, job):
    "What each reading says, or why it refuses."
    files.hashed.clear()
    said = {}
    for k, read in readings(run, job).items():
        try: said[k] = plain(read())
        except ValueError as e: said[k] = e
    return said


def changed(whole, run, job, names):
    "The readings that refuse, each naming a file; all others must say what they said of the whole run."
    now = read_all(run, job)
    refused = {k: str(v) for k, v in now.items() if isinstance(v, ValueError)}
    assert [k for k, v in now.items() if k not in refused and v != whole[k]] == [], names
    for v in refused.values(): assert any(o in v for o in names) and "\n" not in v, (v, names)
    return set(refused)


def test_single_bytes_that_are_flipped(job, tmp_path):
    "Of a byte changed in any file, every reading refuses and names the file, or says the same; a resumed run refuses."
    shutil.copytree(job[0], run := tmp_path/"run")
    whole, draw, counts = read_all(run, job[1]), random.Random(0), {}
    assert not any(isinstance(v, ValueError) for v in whole.values()) and all(v for v in whole.values())
    every = sorted(o for o in run.rglob("*") if o.is_file())
    assert len(every) > 30 and {o.suffix for o in every} == {".json", ".safetensors", ".html", ".md", ".faiss"}
    for i in range(FLIPS):
        file = every[i % len(every)]
        data = file.read_bytes()
        n = len(data)
        starts_and_ends = {0: (0, min(200, n)), 1: (max(0, n - 100), n)}
        places = starts_and_ends.get(i//len(every), (0, n)) # in the third round and later anywhere
        file.write_bytes(flipped(data, draw.randrange(*places), draw.randrange(1, 256)))
        refused = changed(whole, run, job[1], [file.name])
        inside = file.relative_to(run).parts[0]
        assert ("index" if inside == "index" else "resumed") in refused, file
        counts[inside] = counts.get(inside, 0) + 1
        file.write_bytes(data)
    assert min(counts.values()) >= FLIPS//len(every)
    print(counts)


def test_files_that_are_cut_short_or_swapped(job, tmp_path):
    shutil.copytree(job[0], run := tmp_path/"run")
    whole = read_all(run, job[1])
    for file in sorted(o for o in run.rglob("*") if o.is_file()):
        data = file.read_bytes()
        for part in (data[:len(data)//2], b"", data[:-1], data + b"\n"):
            file.write_bytes(part)
            assert {"resumed", "index"} & changed(whole, run, job[1], [file.name]), file
        file.write_bytes(data)
    a, b = sorted((run/"partitions").iterdir())
    pairs = [("metrics.json", "partitions.json"), ("circuit.json", "attention.json"), ("control.json", "seconds.json"),
             ("config.json", "files.json"), (f"index/{a.name}/00-cosine.faiss", f"index/{a.name}/00-euclidean.faiss")]
    pairs += [(f"store/shard-0000{i}{end}", f"store/shard-0000{i + 1}{end}")
              for i in (0, 3) for end in (".safetensors", ".moments.safetensors")]
    pairs += [(f"partitions/{a.name}/{o}", f"partitions/{b.name}/{o}") for o in pipeline.PARTITION]
    pairs += [(f"index/{a.name}/{o}", f"index/{b.name}/{o}")
              for o in ("index.json", "coordinates.safetensors", "00-cosine.faiss")]
    for pair in pairs:
        one, two = (run/o for o in pair)
        def swap(): one.rename(tmp_path/"held"), two.rename(one), (tmp_path/"held").rename(two)
        swap()
        assert {"resumed", "index"} & changed(whole, run, job[1], [one.name, two.name, str(one.parent)]), pair
        swap()
    assert read_all(run, job[1]) == whole


def test_a_run_takes_no_partition_of_another(job, tmp_path):
    "Before a run is finished nothing lists its partitions; that of another site or seed is refused."
    run, about = job
    names = [pipeline.folder_of(run, o).name for o in about["sites"]]
    for o in names: shutil.copytree(run/"partitions"/o, tmp_path/"partitions"/names[1 - names.index(o)])
    site, weights = about["sites"][0], about["model_sha256"]
    for folder, seed in ((tmp_path, 0), (run, 1)):
        with pytest.raises(ValueError, match="holds the partition of"):
            pipeline.own_partition(folder, site, seed, weights)
    assert pipeline.own_partition(run, site, 0, weights).site == site


# what is in the way

def web(at, run):
    "A project with a file of a common name."
    at.mkdir()
    for o in ("config", "store", "index", "partition", "metrics"): (at/f"{o}.json").write_text('{"name": "web"}')
    (at/"thesis.tex").write_text("…")
    (at/"README.md").write_text("# Mine")


def beside(at, run):
    shutil.copytree(run, at)
    (at/"thesis.tex").write_text("…")


def below(at, run):
    shutil.copytree(run, at)
    inside = min((o for o in at.rglob("*") if o.is_dir()), default=at)
    (inside/"notes").mkdir()
    (inside/"notes"/"thesis.tex").write_text("…")


def link(at, run):
    shutil.copytree(run, at)
    target = at.parent/"elsewhere"
    target.mkdir()
    (target/"thesis.tex").write_text("…")
    if (at/"store").exists(): shutil.rmtree(at/"store")
    (at/"store").symlink_to(target)


def linked_file(at, run):
    shutil.copytree(run, at)
    file = next(o for o in sorted(at.rglob("*.json")))
    file.rename(at.parent/"kept.json")
    file.symlink_to(at.parent/"kept.json")


def replaced(at, run):
    "A file of ours under whose name somebody has put another."
    shutil.copytree(run, at)
    for o in sorted(at.rglob("*.json")): o.write_text('{"mine": 1}')


def copied(at, run):
    "A file of ours under a name that we do not write."
    shutil.copytree(run, at)
    file = next(o for o in sorted(at.rglob("*.json")))
    shutil.copy(file, file.with_name("backup.json"))


def refused(capsys, *args):
    "The one line that a refused command prints, in this process."
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as e:
        patch.setattr(sys, "argv", ["subspace-circuits", *map(str, args)])
        cli.main()
    lines = [o for o in capsys.readouterr().err.splitlines() if o.startswith("subspace-circuits: ")]
    assert e.value.code == 2 and len(lines) == 1, lines
    return lines[0]


WAYS = [web, beside, below, link, linked_file, replaced, copied]
CUT = ("--method", "closed-form", "--out")
VERBS = {"run": ("", lambda run, at: ("run", NAME, "--out", at)),
         "capture": ("store", lambda run, at: ("capture", NAME, "--out", at, "--shards", 1, "--sequences", 8)),
         "partition": ("partitions/x0.pre", lambda run, at: ("partition", run/"store", "--site", "*pre", *CUT, at)),
         "partitions": ("partitions", lambda run, at: ("partition", run/"store", "--site", "*", *CUT, at))}


@pytest.mark.parametrize("verb, way", list(product(VERBS, WAYS)), ids=lambda o: getattr(o, "__name__", o))
def test_folders_that_hold_something_else(job, tmp_path, capsys, verb, way):
    inside, args = VERBS[verb]
    way(tmp_path/"out", job[0]/inside)
    before = tree(tmp_path)
    said = refused(capsys, *args(job[0], tmp_path/"out"), "--overwrite")
    assert "holds something else" in said or "is a link" in said, said
    assert tree(tmp_path) == before


@pytest.mark.parametrize("verb", VERBS)
def test_a_link_and_another_kind_of_folder(job, tmp_path, capsys, verb):
    "A link is not followed, and what one verb wrote another does not replace."
    inside, args = VERBS[verb]
    shutil.copytree(job[0], tmp_path/"run")
    (tmp_path/"link").symlink_to(tmp_path/"run"/inside)
    before = tree(tmp_path)
    assert "is a link" in refused(capsys, *args(job[0], tmp_path/"link"), "--overwrite")
    for other in {"", "store", "partitions", "partitions/x0.pre"} - {inside}:
        assert "holds something else" in refused(capsys, *args(job[0], tmp_path/"run"/other), "--overwrite")
    assert tree(tmp_path) == before


BENCHMARKS = ("store", "partition", "circuits", "evaluation", "preimages", "speed")
OUTPUTS = {
    "circuit": (("c.json", "c.html", "c.graphml"),
                lambda run, at: (NAME, "--partitions", run/"partitions", "--out", at/"c.json")),
    "compare": (("d.html",), lambda run, at: (run/"circuit.json", run/"circuit.json", "--out", at/"d.html")),
    "evaluate": (("e.json", "e.html", "e.parts/thesis.tex"),
                 lambda run, at: ("mutual-information", NAME, "--partitions", run/"partitions", "--out", at/"e.json")),
    "explore": (("s.html",), lambda run, at: (run, "--static", at/"s.html"))}


def keeps(capsys, job, file, *args):
    "What others wrote to a file, or this program as something else, or that is a link, stays."
    file.parent.mkdir(exist_ok=True)
    ours = (job[0]/"metrics.json").read_text(), (job[0]/"report.html").read_text()[-500:]
    for content in ("mine", '{"job": {}, "nodes": [], "edges": []}', *ours):
        file.write_text(content)
        before = tree(file.parent)
        said = refused(capsys, *args)
        assert ("would be lost" in said or "holds something else" in said) and file.name in said
        assert tree(file.parent) == before
    file.rename(file.parent/"elsewhere")
    file.symlink_to(file.parent/"elsewhere")
    before = tree(file.parent)
    assert "something else" in (said := refused(capsys, *args)) or file.name in said
    assert tree(file.parent) == before


@pytest.mark.parametrize("verb, name", [(k, o) for k, (names, _) in OUTPUTS.items() for o in names])
def test_files_that_others_wrote(job, tmp_path, capsys, verb, name):
    keeps(capsys, job, tmp_path/name, verb, *OUTPUTS[verb][1](job[0], tmp_path), "--overwrite")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_figures_of_others(job, tmp_path, capsys, name):
    "A benchmark refuses before it measures anything."
    reference = [job[0]] if name == "speed" else []
    keeps(capsys, job, tmp_path/"f.json", "benchmark", name, *reference, "--quick", "--json", tmp_path/"f.json")


def test_an_index_among_other_files(job, tmp_path):
    shutil.copytree(job[0], run := tmp_path/"run")
    store, (first, second) = ActivationStore(run/"store"), sorted((run/"partitions").iterdir())
    (run/"index"/first.name/"thesis.faiss").write_text("…")
    before = tree(tmp_path)
    def again(o): build_indexes(store, Partition.from_pretrained(o), run/"index"/o.name, overwrite=True)
    with pytest.raises(ValueError, match="holds something else .thesis.faiss"): again(first)
    assert tree(tmp_path) == before
    (run/"index"/second.name/"writer.pid").write_text("my own notes")
    with pytest.raises(ValueError, match="holds something else"): again(second)
    assert (run/"index"/second.name/"writer.pid").read_text() == "my own notes"


def test_a_half_built_index_that_was_damaged(job, tmp_path):
    "Coordinates of shards that were filled in are checked before others are added."
    run = job[0]
    store, cut = ActivationStore(run/"store"), Partition.from_pretrained(min((run/"partitions").iterdir()))
    def stop(file, value, kind):
        write_json(file, value, kind)
        if value["shards"] == 3: raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("subspace_circuits.preimages.write_json", stop)
        build_indexes(store, cut, tmp_path/"index")
    file = tmp_path/"index"/"coordinates.safetensors"
    data = file.read_bytes()
    for at in (20, 2000):
        file.write_bytes(flipped(data, at, 1))
        with pytest.raises(ValueError, match="coordinates.safetensors is missing or damaged"):
            build_indexes(store, cut, tmp_path/"index")
    file.write_bytes(data)
    coordinates = cut.split(store[cut.site] - cut.mean)
    for k, index in build_indexes(store, cut, tmp_path/"index").items():
        assert torch.allclose(index.rows, coordinates[k], atol=1e-5)


def test_what_is_ours_is_removed_and_nothing_else(job, tmp_path):
    "A whole run goes, with what killed processes left in it."
    shutil.copytree(job[0], run := tmp_path/"run")
    shutil.copytree(run/"store", run/"control")
    (run/"control"/"store.json").unlink()
    (run/"control"/"writer.pid").write_text("4194305")
    (run/"store"/".tmpAb12Cd").write_bytes(b"")
    (run/"store"/".tmpZZ12Cd").write_bytes((run/"store"/"shard-00000.safetensors").read_bytes()[:5000])
    (run/".report.html.subspace_circuits").write_text("<html>")
    (tmp_path/"beside").mkdir()
    assert len(owned(run, pipeline.RUN)) > 40
    (run/"store"/".tmpYY12Cd").write_text("a foreign temporary file")
    with pytest.raises(ValueError, match=r"holds something else \(store/.tmpYY12Cd"): remove(run, pipeline.RUN)
    assert len(tree(run)) > 40
    (run/"store"/".tmpYY12Cd").unlink()
    assert not pipeline.claim(run, job[1], True, False) and tree(run).keys() == {"config.json"}
    remove(run, pipeline.RUN)
    assert [o.name for o in tmp_path.iterdir()] == ["beside"]


def test_a_missing_file_is_made_again(job, tmp_path):
    "A run that lost a file is not finished, and says so until all are there; what was left half written is gone."
    shutil.copytree(job[0], run := tmp_path/"run")
    assert pipeline.claim(run, job[1], False, True)
    (run/"metrics.json").unlink()
    (run/"partitions"/"x0.pre"/".tmpAb12Cd").write_bytes(b"")
    assert not pipeline.claim(run, job[1], False, True)
    assert tree(run).keys() == tree(job[0]).keys() - {"metrics.json", "files.json"}


# single files

def test_json_is_read_whole_or_not_at_all(tmp_path):
    "Every byte of a file flipped: refused, or, of a public format, read as it was where only the mark was hit."
    for value in ({}, {"a": [1.5, float("inf")], "b": {"1": "ü"}}):
        write_json(file := tmp_path/"o.json", value, "metrics")
        assert read_json(file, "metrics") == value and kind_of(file) == "metrics"
        assert json.loads(file.read_text()).keys() == {*value, "written"}
        data, same = file.read_bytes(), 0
        for at, by in product(range(len(data)), (1, 4, 32)):
            file.write_bytes(flipped(data, at, by))
            with pytest.raises(ValueError, match="o.json"): read_json(file, "metrics")
            try: found = read_json(file, "metrics", public=True)
            except ValueError: continue
            assert {k: found[k] for k in value} == value and len(found) == len(value) + 1, (at, by)
            same += 1
        assert same
        file.unlink()
    write_json(file, {"a": 1}, "control")
    with pytest.raises(ValueError, match="is control of subspace_circuits, not metrics"): read_json(file, "metrics")
    with pytest.raises(ValueError, match="would be lost"): write_json(file, {}, "metrics")


def test_tensors_that_carry_their_hash(tmp_path):
    tensors = dict(step=torch.tensor(3.), state=torch.arange(40, dtype=torch.uint8), empty=torch.zeros(0, 2),
                   half=torch.randn(3, 5).bfloat16())
    curve = dict(curve=[dict(step=1, loss=.5)])
    write_tensors(file := tmp_path/"o.safetensors", tensors, "interrupted training", curve)
    read, about = read_tensors(file, "interrupted training")
    assert about == curve and plain(read) == plain(tensors)
    data = file.read_bytes()
    for at, by in product(range(len(data)), (1, 16)):
        file.write_bytes(flipped(data, at, by))
        try: again, said = read_tensors(file, "interrupted training")
        except ValueError as e: assert "o.safetensors" in str(e)
        else: assert plain(again) == plain(read) and said == about, (at, by)
    file.write_bytes(data)
    with pytest.raises(ValueError, match="holds no patches"): read_tensors(file, "patches")
    write_tensors(bare := tmp_path/"bare.safetensors", tensors)
    assert plain(read_tensors(bare)[0]) == plain(tensors) and kind_of(bare) is None


def test_training_goes_on_from_no_damaged_checkpoint(tmp_path):
    task, file = UniqueCopy(8), tmp_path/"training.safetensors"
    def trained(stop=None):
        model = new_model(len(task.tokenizer), n_ctx=24, d_model=8)
        return model, train(model, task, steps=4, batch=2, lengths=(0, 4), every=2, file=file, stop=stop)
    trained(2)
    data = file.read_bytes()
    file.write_bytes(flipped(data, len(data) - 1, 1))
    with pytest.raises(ValueError, match="training.safetensors is missing or damaged"): trained()
    file.write_bytes(data)
    again, curve = trained()
    file.unlink()
    whole, same = trained()
    assert curve == same and [o["step"] for o in curve] == [2, 4]
    assert plain(dict(again.named_parameters())) == plain(dict(whole.named_parameters()))
    write_tensors(file, {"generator": torch.zeros(1)})
    with pytest.raises(ValueError, match="holds no interrupted training"): trained()


def test_results_kept_while_patching_are_checked(tmp_path):
    known = plant("induction")
    pairs = next(iter(known_tests("planted-induction", known.task, 40, torch.Generator().manual_seed(0)).values()))
    d, site, file = known.model.cfg.d_model, "blocks.0.hook_resid_post", tmp_path/"kept.safetensors"
    def patched(): return interchange(known.model, pairs, {"all": Patch(site, torch.eye(d))}, 20, file)
    whole = patched()
    assert patched().logits.equal(whole.logits)
    data = file.read_bytes()
    file.write_bytes(flipped(data, len(data) - 10, 64))
    with pytest.raises(ValueError, match="kept.safetensors is missing or damaged"): patched()
    with pytest.raises(ValueError, match="entries that are not finite"):
        interchange(known.model, pairs, {"nan": Patch(site, torch.full((d, 1), torch.nan))})


def test_public_formats_still_open(job, tmp_path):
    "A circuit without our mark is read, and not replaced; one with it is read only as it was written."
    held = json.loads((job[0]/"circuit.json").read_text())
    (tmp_path/"theirs.json").write_text(json.dumps(held))
    ours = read_circuit(job[0]/"circuit.json")
    assert nx.utils.graphs_equal(read_circuit(tmp_path/"theirs.json"), ours)
    with pytest.raises(ValueError, match="would be lost"): save_circuit(ours, tmp_path/"theirs.json")
    save_circuit(ours, tmp_path/"ours.json")
    text = (tmp_path/"ours.json").read_text()
    (tmp_path/"ours.json").write_text(text.replace('"score": ', '"score": 1', 1))
    with pytest.raises(ValueError, match="is no circuit.*damaged"): read_circuit(tmp_path/"ours.json")


def test_a_partition_is_saved_over_nothing_of_others(tmp_path):
    p = Partition({"a": torch.eye(4)[:, :2], "b": torch.eye(4)[:, 2:]}, "site")
    for name in ("README.md", "partition.json", "partition.safetensors"):
        (tmp_path/name).write_text("mine")
        with pytest.raises(ValueError, match=f"{name} is not what"): p.save_pretrained(tmp_path)
        assert tree(tmp_path) == {name: b"mine"}
        (tmp_path/name).unlink()
    for _ in range(2): p.save_pretrained(tmp_path)
    text = (tmp_path/"README.md").read_text()
    (tmp_path/"README.md").write_text(text + "My own words.\n")
    with pytest.raises(ValueError, match="README.md is not what"): p.save_pretrained(tmp_path)


# NaN

@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_none_pass_no_comparison(bad, tmp_path):
    basis = torch.eye(4)
    basis[1, 2] = bad
    with pytest.raises(ValueError, match="1 entries of b of site are not finite"):
        Partition({"a": basis[:, :2], "b": basis[:, 2:]}, "site")
    with pytest.raises(ValueError, match="4 entries of mean of site are not finite"):
        Partition({"a": torch.eye(4)}, "site", torch.full((4,), bad))
    write_tensors(tmp_path/"partition.safetensors", {"mean": torch.zeros(4), "basis.a": basis})
    (tmp_path/"partition.json").write_text('{"site": "site", "names": ["a"]}')
    with pytest.raises(ValueError, match="not finite"): Partition.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Gini of"): gini([1., bad if bad != bad else -bad])
    edge = dict(layer=0, type="OV", component="L0H0", score=bad)
    assert keep_edges([edge], 1.) == [edge]
