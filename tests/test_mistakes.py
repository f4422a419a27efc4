"""Mistakes that a user makes, at the command line and from Python: each is refused in one line, naming what was given
and what would have worked, before anything is written."""
import gzip, json
from functools import cache

import pytest
import torch
from commands import call, refused
from test_files import NAME

from subspace_circuits import partition as cuts
from subspace_circuits.activations import ActivationStore, capture, match_sites
from subspace_circuits.circuit_families import plant
from subspace_circuits.circuit_graph import read_circuit, save_circuit, to_graph
from subspace_circuits.decompositions.feature_clusters import read_dictionary
from subspace_circuits.decompositions.parameter_training import read_settings
from subspace_circuits.edges import Moments, PartitionedModel, planted_partitions
from subspace_circuits.explorer import open_run
from subspace_circuits.models import open_model
from subspace_circuits.partition import Partition, read_published
from subspace_circuits.preimages import Index, build_indexes
from subspace_circuits.toy_models import load_model, new_task

torch.set_num_threads(1)
planted, SITE = cache(plant), "blocks.0.hook_resid_mid"


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    "A store, a planted model's partitions and its circuit, a partition of another model, and files that are not ours."
    folder = tmp_path_factory.mktemp("mistakes")
    model, task, _ = load_model("induction")
    capture(model, task, [SITE], folder/"store", shards=1, sequences=16)
    known = planted("skip_trigram")
    for p in planted_partitions(known).values(): p.save_pretrained(folder/"cuts"/p.site)
    split = PartitionedModel(Moments(known.model, known.task, n=20), planted_partitions(known))
    save_circuit(to_graph(split, []), folder/"c.json")
    Partition({"all": torch.eye(64)}, SITE, info=dict(
        weights="-".join("0"*o for o in (32, 15, 15)))).save_pretrained(folder/"other")
    (folder/"text.txt").write_text("1 2 3")
    (folder/"list.json").write_text("[1, 2]")
    (folder/"job.yaml").write_text("job: circl\n")
    (folder/"apd.yaml").write_text("method: apd\nlr: fast\n")
    (folder/"deep.json").write_text("["*10**5)
    (folder/"latin.txt").write_bytes("é".encode("latin-1"))
    (folder/"cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "1 2 3"}\n'*99)[:-30])
    (folder/"wrong.jsonl").write_text('{"prompt": "1 2"}\n')
    (folder/"empty").mkdir()
    return folder


# What is typed, with @ for the folder above, and words of the answer; the folder `new` must not come to be.
TYPED = """
bogus | no such command 'bogus'
run indcution --out @new | unknown model 'indcution': use one of induction
run | missing option '--out'
run --out | option '--out' requires an argument
run --out @new --seed one | --seed 'one' is no whole number
run --out @new --seed 1.5 | --seed '1.5' is no whole number
run --out @new --seed ٣ | --seed '٣' is no whole number
run --out @new --seed 1_000 | --seed '1_000' is no whole number
run --out @new --seed 99999999999 | --seed '99999999999' is no whole number up to 2147483647
run --out @new --resume | nothing to resume in @new
run --out @new --sed 1 | no such option: --sed
run --out @new --task revers | unknown task 'revers': use one of
run --out @new --task reverse:k | 'k' is no argument of a task: write name=value
run --out @new --task reverse:letters=3 | reverse takes no 'letters': use
run --out @new --task no.module:thing | no task in 'no.module:thing': name package.module:object
run --out @new --task @wrong.jsonl | wrong.jsonl, line 1: it must be a JSON object with strings "prompt" and "answer"
run planted-skip_trigram --out @new --task reverse | was planted with its own task: leave out --task
run planted-skip_trigrm --out @new | unknown family 'skip_trigrm': use one of induction
run --out @text.txt | cannot be written
run --out @empty extra more | unexpected extra argument
run '' --out @new | model is empty: give it a value
run --out '' | --out is empty: give it a value
capture induction --out @new --sites blocks.7.hook_resid_mid | unknown site 'blocks.7.hook_resid_mid': use one of
capture induction --out @new --sites '' | --sites is empty: give it a value, or leave it out
capture induction --out @new --sites ' ' | --sites is empty: give it a value, or leave it out
capture induction --out @new --sites , | unknown site '': use one of
capture induction --out @new --lengths 50 | lengths '50': write the shortest and the longest
capture induction --out @new --lengths ٠-٥ | lengths '٠-٥': write the shortest and the longest
capture induction --out @new --lengths 9-3 | lengths 9 to 3: unique_copy takes the shortest first
capture induction --out @new --lengths 900-900 | lists of 900 distinct symbols need an alphabet of 900, this one has 150
capture induction --out @new --dtype int8 | unknown dtype 'int8': use one of float32
capture induction --out @new --shards 0 | --shards 0: use a number of at least 1
capture induction --out @new --sequences -5 | --sequences -5: use a number of at least 1
capture induction --out @new --sequences 1000000000000 | --sequences '1000000000000' is no whole number up to
capture induction --out @new --data text.csv | no data 'text.csv' for induction: use task
capture induction --out @new --data @missing.txt | missing.txt
capture induction --out @new --data @latin.txt | latin.txt is not UTF-8: convert it first
capture induction --out @new --data @cut.jsonl.gz | cut.jsonl.gz is no whole .gz file: fetch it again
capture induction --out @new --data @deep.json | deep.json is nested too deeply for JSON of ours
capture induction --out @new --data @list.json | list.json, entry 1: it must be a JSON object with a string "text"
capture induction --out @new --packed | packed
capture induction --out @new --task unique_copy --data samples | pass --task or --data
capture induction --out @new --resume | nothing to resume in @new
partition @nothing --site '*' --out @new | holds no store.json: pass a folder written by capture
partition @store --site x0.mid --out @new | no site 'x0.mid' in @store: use one of blocks.0.hook_resid_mid
partition @store --site '*' --out @new --method pca | unknown method 'pca': use one of ndm, closed-form, growth
partition @store --site '*' --out @new --method growth --model induction | --model is for method ndm
partition @store --site '*' --out @text.txt --method growth | text.txt is a file: name a folder
partition @store --site '*' --out @new --model planted-induction | holds activations of weights
partition @store --site '*' --out @new --method closed-form --skip-first 500 | --skip-first 500 leaves none of
circuit planted-skip_trigram --partitions @empty --out @new.json | empty holds no partition: pass what
circuit planted-skip_trigram --partitions @other --out @new.json | no partition of
circuit planted-skip_trigram --partitions @cuts --out @new.txt | new.txt is no name of a .json file
circuit planted-skip_trigram --partitions @cuts --out @new.json --answers 9 | --answers 9: use a number of at least 10
circuit planted-skip_trigram --partitions @cuts --out @new.json --explorer example.org | example.org
compare @c.json @missing.json | missing.json does not exist: name a file or a folder
compare @c.json @list.json | list.json is of no format that is read here: partition, published NDM
compare @c.json @c.json --least nan | --least 'nan' is no number
compare @c.json @c.json --least -1 | --least -1: use a number of at least 0
compare @c.json @cuts/blocks.0.hook_resid_pre | compare two sets of subspaces, or two circuits
compare @other @cuts/blocks.0.hook_resid_pre | compare two of one site
compare @c.json @c.json --out @new.json | new.json is no name of a .html file
evaluate mutual-info planted-skip_trigram --partitions @cuts --out @new.json | unknown suite 'mutual-info': use one of
evaluate mutual-information planted-skip_trigram --partitions @cuts --out @new.html | is no name of a .json file
evaluate mutual-information planted-skip_trigram --partitions @cuts --out @new.json --prompts 2 | 2 rows say nothing
evaluate mutual-information planted-skip_trigram --partitions @cuts --out @new.json --layers z=9 | --layers is for ioi
evaluate mutual-information planted-skip_trigram --partitions @cuts --out @new.json --supervised | --supervised is for
evaluate mutual-information planted-skip_trigram --partitions @other --out @new.json | was learned on a model of
evaluate ioi ioi --partitions @cuts --out @new.json --layers zzz=9 | unknown test 'zzz' of ioi: use one of test1
evaluate ioi ioi --partitions @cuts --out @new.json --layers test1 | layers 'test1': write a test and a layer
evaluate ioi ioi --partitions @cuts --out @new.json --facts @list.json | knowledge-conflict needs --facts
evaluate carriers planted-skip_trigram --partitions @cuts --out @new.json | no tests are known for planted-skip_trigram
explore @nothing | nothing holds no store/store.json: pass a folder that subspace-circuits run has finished
explore @store --queries 1000000000 | --queries 1000000000: use a number of 1 to 1000
explore @store --text hello | --text is for the offline page: pass --static FILE.html
explore @store --text '' | --text is empty
explore @store --port 99999 | --port 99999: use a number of 0 to 65535
explore @store --static @new.html --shading loud | unknown shading 'loud': use frozen, free
decompose adp apd-tms-5-2 --out @new | unknown method 'adp': use one of apd, spd, vpd, temporal-sae, multidim
decompose apd apd-tms-5 --out @new | no settings 'apd-tms-5': use a YAML file, or one of apd-gated
decompose spd apd-tms-5-2 --out @new | these settings are of apd, not of spd
decompose apd @apd.yaml --out @new | apd.yaml: apd
decompose apd @latin.txt --out @new | latin.txt is no UTF-8
decompose apd @deep.json --out @new | deep.json is nested too deeply
decompose multidim @job.yaml --out @new | job.yaml has job 'circl': use one of circle, clusters, subspaces
decompose multidim @missing.yaml --out @new | missing.yaml cannot be read
benchmark circuts | no such command 'circuts'
benchmark circuits --seeds 0 | --seeds 0: use a number of at least 1
benchmark models --json @new.csv | new.csv is no name of a .json file
"""


def typed():
    import shlex
    for line in TYPED.strip().splitlines():
        command, _, said = line.partition(" | ")
        yield shlex.split(command), said


@pytest.mark.parametrize("args, said", list(typed()), ids=[" ".join(o)[:80] for o, _ in typed()])
def test_at_the_command_line(at, monkeypatch, args, said):
    monkeypatch.setattr("subspace_circuits.text.plant", planted)
    here = sorted(o.name for o in at.iterdir())
    assert said.replace("@", f"{at}/") in refused(*(o.replace("@", f"{at}/") for o in args))
    assert sorted(o.name for o in at.iterdir()) == here


def test_there_are_enough():
    assert len(list(typed())) + len(CALLS) >= 100 and len({" ".join(o) for o, _ in typed()}) == len(list(typed()))


def model(): return load_model("induction")[0]


CALLS = {
    "a site that a model lacks": (lambda at: match_sites(model(), ["blocks.9.*"]), "unknown site 'blocks.9.*'"),
    "rows beyond a store": (lambda at: ActivationStore(at/"store").rows(SITE, [10**6]), "this store has 0 to"),
    "a column that a store lacks": (lambda at: ActivationStore(at/"store").column("tokens"), "no 'tokens' in"),
    "a partition that is not orthogonal": (lambda at: Partition({"a": torch.ones(4, 2)}, SITE), "a"),
    "bases of two widths": (lambda at: Partition({"a": torch.eye(4)[:, :2], "b": torch.eye(5)[:, :3]}, SITE),
                            "4 and 5 wide"),
    "a partition that lacks a dimension": (lambda at: Partition({"a": torch.eye(4)[:, :3]}, SITE), "a"),
    "a subspace that is not there": (lambda at: Partition.from_pretrained(at/"other")["s9"], "s9"),
    "rows of another site": (lambda at: Partition({"all": torch.eye(64)}, "blocks.1.hook_resid_mid").split(
        ActivationStore(at/"store")[SITE]), "blocks.1.hook_resid_mid"),
    "a folder without a partition": (lambda at: Partition.from_pretrained(at/"empty"), "holds no partition.json"),
    "partitions of two sites compared": (lambda at: cuts.compare(Partition({"all": torch.eye(64)}, SITE), Partition(
        {"all": torch.eye(64)}, "blocks.1.hook_resid_mid")), "compare two of one site"),
    "a partition of a model unlike it": (lambda at: PartitionedModel(Moments(planted("skip_trigram").model, planted(
        "skip_trigram").task, n=20), {SITE: Partition.from_pretrained(at/"other")}), "blocks"),
    "an index before it is built": (lambda at: Index(at/"empty", "all", ActivationStore(at/"store"),
                                                     Partition.from_pretrained(at/"other")), "holds no index"),
    "an index of another model": (lambda at: build_indexes(ActivationStore(at/"store"), Partition.from_pretrained(
        at/"other"), at/"new"), "use those of one model"),
    "a task that is not there": (lambda at: new_task("revers"), "unknown task 'revers': use one of"),
    "a circuit that is a list": (lambda at: read_circuit(at/"list.json"), "an object is needed"),
    "a circuit of another version": (lambda at: read_circuit(dict(nodes=[], edges=[], version=9)), "version 9"),
    "a dictionary that is none": (lambda at: read_dictionary(at/"empty"), "has no cfg.json"),
    "published matrices that are none": (lambda at: read_published(at/"empty"), "no R-*.pt"),
    "settings of nothing": (lambda at: read_settings(at/"list.json"), "list.json holds no settings"),
    "a model that is a text": (lambda at: open_model(at/"text.txt"), "text.txt"),
    "an option that a model has no use for": (lambda at: open_model("induction", act_fn="relu"), "leave out act_fn"),
    "a run that is a store": (lambda at: open_run(at/"store"), "holds no store/store.json"),
}


@pytest.mark.parametrize("name", CALLS)
def test_from_python(at, name):
    "A ValueError or KeyError of one line, which names what was given."
    call, said = CALLS[name]
    with pytest.raises((ValueError, KeyError)) as e: call(at)
    assert said in str(e.value) and "\n" not in str(e.value), e.value
