"The report is one offline file made only of the run folder."
import re
from html.parser import HTMLParser

import pytest

from subspace_circuits.files import write_json
from subspace_circuits.pipeline import JSONS
from subspace_circuits.report import headline, read_graph, write_report

pre, mid = "blocks.0.hook_resid_pre", "blocks.0.hook_resid_mid"
match = "L0H0: position ⋈ position"


def edge(source, target, type, **kw):
    return (dict(source=source, target=target, key=0, type=type, component="L0H0", unit="logits", p=.005)
            | dict(score=1.) | kw)


def files():
    "A hand-made run of one head that moves each token to the next position."
    sizes = {pre: {"token": 3, "position": 2}, mid: {"token": 2, "previous token": 3}}
    shares = {o: {n: {v: .9 if v == n else .1 for v in sizes[o]} for n in sizes[o]} for o in sizes}
    subspaces = [dict(id=f"{o}/{n}", kind="subspace", site=o, name=n, d=d) for o in sizes for n, d in sizes[o].items()]
    matched = dict(id=match, kind="match", component="L0H0", query="position", key="position", score=7.2,
                   unit="logits", p=.005)
    edges = [edge(f"{pre}/position", match, "Q"), edge(f"{pre}/position", match, "K", key=1),
             edge(f"{mid}/token", "MLP0", "MLP", score=None, p=None),
             edge(f"{pre}/token", f"{mid}/previous token", "OV", score=-.25, unit="share of stream variance")]
    return {
        "config": dict(model="<tiny>", seed=0, version="0.1.0", n_layers=1, n_heads=1, d_model=5, rows=100,
                       sites=[pre, mid]),
        "metrics": dict(
            accuracy={"full": {"0-5": 1., "6-10": .8}, "keep_only": {"0-5": .99, "6-10": .76},
                      "null": {"0-5": 0., "6-10": 0.}},
            sites={o: dict(n_subspaces=2, objective=.4, sizes=sizes[o], variables=shares[o]) for o in sizes},
            circuit=dict(n_edges=2, n_candidates=8, control=dict(n_edges=0), chosen=0,
                         curve=[dict(epsilon=.1, n_edges=2, accuracy=.9, kl=0.)]),
            seconds=dict(capture=1., partition=2.)),
        "partitions": {mid: dict(names=["token", "previous token"], determination=[[1, .1], [.1, 1]],
                                 mutual_information=[[2, .1], [.1, 2]])},
        "attention": dict(tokens=["bos", "1"], patterns=[dict(component="L0H0", pattern=[[1, 0], [.9, .1]])]),
        "circuit": dict(version=1, directed=True, multigraph=True, graph=dict(n_layers=1, n_heads=1), edges=edges,
                        nodes=[*subspaces, matched, dict(id="MLP0", kind="mlp", layer=0),
                               dict(id="logits", kind="output")])}


def page(folder, content):
    "The text of the report on `content`, written twice."
    folder.mkdir(exist_ok=True)
    for name, o in content.items(): write_json(folder/f"{name}.json", o, JSONS[name])
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert {o.name for o in folder.iterdir()} == {"report.html", *(f"{o}.json" for o in content)}
    return first.decode("utf-8")


class Fetches(HTMLParser):
    "Collects what a browser would fetch: src, href and url() outside of scripts."
    def __init__(self, text):
        super().__init__()
        self.found, self.texts, self.tag = [], [], ""
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        self.tag = tag
        self.found += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "xlink:href")]
        self.found += [u for k, v in attrs if k == "style" for u in re.findall(r"url\(([^)]*)", v)]
    def handle_endtag(self, tag): self.tag = ""
    def handle_data(self, data):
        if self.tag == "style": self.found += re.findall(r"url\(([^)]*)|@import", data)
        if self.tag != "script": self.texts.append(data)


def words(text): return " ".join(" ".join(Fetches(text).texts).split())


def test_one_offline_file(tmp_path):
    text = page(tmp_path/"run", files())
    assert set(Fetches(text).found) <= {"data:,"} and len(text.encode()) < 6_000_000
    seen = words(text)
    assert "Keeping 2 of 8 edges keeps 99.0% of the accuracy at trained and 95.0% at longer lengths." in seen
    for o in ("position ⋈ position", "−25% of stream variance", "holds 90% of previous token", "MLP 0", "x0.mid",
              "<tiny>"):
        assert o in seen
    assert text.count('<g class="wire') == 5 and text.count('class="wire OV negative"') == 2


def test_an_attack_is_drawn(tmp_path):
    curves = {"circuit": [[20, 1e-4], [40, .0003]], "random edges": [[20, 8.5], [40, 9.25]],
              "all but one edge": [[20, 7.]]}
    seen = words(page(tmp_path/"run", files() | {"attack": curves}))
    assert "At most 0.0003 nats of the circuit, 9.25 nats of random edges, 7 nats of all but one edge." in seen
    assert "Can anything outside" not in words(page(tmp_path/"other", files()))


def test_empty_graph(tmp_path):
    content = files()
    content["circuit"] |= dict(nodes=[], edges=[])
    content["metrics"]["circuit"] |= dict(n_edges=0, curve=[])
    text = page(tmp_path/"run", content)
    assert "No edge survives of 8 candidates." in words(text) and '<g class="wire' not in text
    assert text.count('<g class="box subspace"') == 4 and "no edge survives" in words(text)


def test_without_known_variables(tmp_path):
    content = files()
    for o in content["metrics"]["sites"].values(): del o["variables"]
    del content["metrics"]["accuracy"], content["attention"], content["partitions"]
    seen = words(page(tmp_path/"run", content))
    assert "The circuit keeps 2 of 8 edges." in seen and "holds" not in seen and "Attention patterns" not in seen


def test_config_alone(tmp_path):
    content = {"config": dict(model="tiny", seed=0)}
    assert "no circuit was computed" in words(page(tmp_path/"run", content))


def test_claim_without_baseline():
    metrics = dict(circuit=dict(n_edges=1), accuracy=dict(full={"0-5": 0.}, keep_only={"0-5": 0.}))
    assert headline(metrics, read_graph({}, {})) == "The circuit keeps 1 edge."


def test_not_a_run_folder(tmp_path):
    with pytest.raises(ValueError, match="no config.json"): write_report(tmp_path)
