"What a patch must and must not do, on models of every kind it is made for, and what is refused."
import json

import pytest
import torch

from commands import call, refused
from subspace_circuits.activations import given
from subspace_circuits.models import open_model
from subspace_circuits.evaluation import (
    Patch, _checks, carries, copy_tests, interchange, make_pairs, patches_of, prompt_by_prompt,
    random_like, readers, supervised_subspace, whole)
from subspace_circuits.suites import (
    IOI_TESTS, SUITES, WORDS, conflict_pairs, evaluate, gini_coefficients, ioi_pairs,
    knowledge_conflict, known_facts, known_tests, partition_information, read_facts, read_partitions,
    save_small_gpt2, single_token, suite, year_pairs)
from subspace_circuits.files import of_others, read_json
from subspace_circuits.circuit_families import plant
from subspace_circuits.partition import Partition
from subspace_circuits.toy_models import load_model

torch.set_num_threads(1)
SITE = "blocks.0.hook_resid_post"
def seeded(seed=0): return torch.Generator().manual_seed(seed)
def rotation(d, seed=0): return torch.linalg.qr(torch.randn(d, d, generator=seeded(seed)))[0]
def cut(d, k, site): return Partition({f"s{i}": o for i, o in enumerate(rotation(d).split(d//k, 1))}, site)


@pytest.fixture(scope="module")
def known(): return plant("induction", certified=False)

@pytest.fixture(scope="module")
def tests(known): return copy_tests(known.task.sample(250, generator=seeded()), seeded())

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return open_model(save_small_gpt2(tmp_path_factory.mktemp("gpt2"), n_layers=12, d_model=24))


def everywhere(model, base, source):
    "Pairs patched at every position, read at the last one."
    n, length = base.tokens.shape
    said = [model(o.tokens, position_ids=o.positions)[:, -1].detach() for o in (base, source)]
    answer, other = said[0].argmax(-1), said[1].argsort(-1)[:, -2]
    other = torch.where(other == answer, said[1].argmax(-1), other)
    at = torch.arange(length).expand(n, -1)
    return make_pairs(base, source, at, at[:, -1], answer, other), said


@pytest.mark.parametrize("name", ["induction", "bigram_copy", "small"])
def test_a_patch_of_everything_is_the_source(name, small):
    "At every site of the stream, the middle of a layer included, where TransformerLens hooks only what the MLP reads."
    model = small[0] if name == "small" else load_model(name)[0]
    base, source = (given(torch.randint(0, model.cfg.d_vocab, (6, 9), generator=seeded(i))) for i in (0, 1))
    pairs, said = everywhere(model, base, source)
    for layer in (0, model.cfg.n_layers - 1):
        for where in ("pre", "mid", "post"):
            site = f"blocks.{layer}.hook_resid_{where}"
            out = interchange(model, pairs,
                              {"whole": whole(site, model.cfg.d_model),
                               "nothing": Patch(site, torch.zeros(model.cfg.d_model, 1))}, rows=7)
            for row, logits in ((0, said[0]), (1, said[1]), (2, said[0])):
                assert torch.allclose(out.logits[row], logits.gather(1, out.answers), atol=2e-4), (site, row)


def test_two_sites_at_once(small):
    "What is patched whole later hides what was patched before; halves of two sites are neither alone."
    model = small[0]
    base, source = (given(torch.randint(0, model.cfg.d_vocab, (6, 9), generator=seeded(i))) for i in (0, 1))
    pairs, _ = everywhere(model, base, source)
    early, late = (whole(f"blocks.{i}.hook_resid_post", 24) for i in (2, 7))
    half = cut(24, 2, early.site)
    out = interchange(model, pairs, {"late": late, "both": [early, late], "early": Patch(early.site, half.bases["s0"]),
                                     "halves": [Patch(early.site, half.bases["s0"]),
                                                Patch(late.site, half.bases["s1"])],
                                     "again": [Patch(early.site, o) for o in half.bases.values()], "all": early})
    assert torch.allclose(out.logits[1], out.logits[2], atol=1e-4)
    assert torch.allclose(out.logits[5], out.logits[6], atol=1e-4)
    assert (out.logits[4] - out.logits[3]).abs().max() > .01


@pytest.mark.parametrize("name", ["ioi", "small"])
def test_same_numbers_as_a_loop(name, small):
    if name == "ioi":
        (model, task, _), site = load_model("ioi"), SITE
        pairs = known_tests("ioi", task, 12, seeded())["subject"]
    else: model, pairs, site = small[0], ioi_pairs(small[1], "test1", 8, seeded()), "blocks.4.hook_resid_post"
    patches = patches_of(cut(model.cfg.d_model, 4, site))
    slow, fast = prompt_by_prompt(model, pairs, patches), interchange(model, pairs, patches, rows=11)
    wanted = slow.gather(2, fast.answers.expand(len(slow), -1, -1))
    assert (wanted - fast.logits[1:]).abs().max() < 1e-5*slow.abs().max()
    assert torch.allclose(slow.softmax(-1).gather(2, fast.answers.expand(len(slow), -1, -1)), fast.probability[1:],
                          atol=1e-5)


def test_a_model_is_left_as_it_was(known, tests):
    batch = known.task.sample(5, generator=seeded())
    before = known.model(batch.tokens)
    interchange(known.model, tests["token"], patches_of(Partition(known.bases[SITE], SITE)))
    with pytest.raises(ValueError):
        interchange(known.model, tests["token"], {"a": Patch("blocks.9.hook_resid_post", torch.eye(60))})
    assert torch.equal(before, known.model(batch.tokens)) and not any("forward" in vars(o) for o in known.model.blocks)


@pytest.mark.parametrize("seed", range(3))
def test_planted_carriers(seed):
    known = plant("induction", seed=seed, certified=False)
    tests = copy_tests(known.task.sample(250, generator=seeded(seed)), seeded(seed))
    for v in tests:
        report = carries(known.model, Partition(known.bases[SITE], SITE), v, tests, v, draws=2, seed=seed)
        assert report.verdict == "carries" and report.figures["cause"] >= .99 and report.figures["isolate"] >= .99
        assert max(report.figures["random"][o] for o in ("dimension", "variance")) < .1


def test_other_subspaces_do_not_pass(known, tests):
    truth = Partition(known.bases[SITE], SITE)
    for s, v in (("token", "previous"), ("position", "token"), ("rest", "token")):
        assert not carries(known.model, truth, s, tests, v, draws=1).checks["the answer follows"]


def test_too_much_is_not_isolated(known, tests):
    bases = known.bases[SITE]
    both = ({"both": torch.cat([bases["token"], bases["previous"]], 1)}
            | {k: v for k, v in bases.items() if k not in ("token", "previous")})
    report = carries(known.model, Partition(both, SITE), "both", tests, "token", draws=1)
    assert report.checks["the answer follows"] and not report.checks["others stay"]


def test_supervised_bound_comes_close(known, tests):
    basis = supervised_subspace(known.model, tests, "previous", SITE, 12)
    held = tests["previous"].take(tests["previous"].held_out)
    assert torch.allclose(basis.T@basis, torch.eye(12), atol=1e-5)
    assert interchange(known.model, held, {"bound": Patch(SITE, basis)}).rate("bound") > .7


def test_random_subspaces_hold_the_variance_asked_for():
    cov = torch.diag(torch.logspace(-3, 1, 30))
    for share in (.05, .3, .8):
        b = random_like(30, 5, seeded(), cov, share*cov.trace().item())
        assert torch.allclose(b.T@b, torch.eye(5), atol=1e-5) and abs((b.T@cov@b).trace()/cov.trace() - share) < .02


def test_readers_of_every_site(small):
    model = small[0]
    counts = {o: len(readers(model, f"blocks.10.hook_{o}"))
              for o in ("resid_pre", "resid_mid", "attn_out", "resid_post", "mlp_out")}
    # 12 maps of heads and an MLP a layer, and the unembedding
    assert counts == dict(resid_pre=27, resid_mid=15, attn_out=15, resid_post=14, mlp_out=14)
    with pytest.raises(ValueError, match="readers of 'blocks.10.attn.hook_z' are not known"):
        readers(model, "blocks.10.attn.hook_z")


@pytest.mark.parametrize("test", IOI_TESTS)
def test_prompts_line_up(small, test):
    pairs, tokenizer = ioi_pairs(small[1], test, 30, seeded()), small[1]
    word = lambda tokens, at: [tokenizer.decode(int(o)).strip() for o in tokens.gather(1, at[:, None])[:, 0]]
    io, s = ([tokenizer.decode(int(o)).strip() for o in x] for x in (pairs.answer, pairs.other))
    assert all(a != b for a, b in zip(io, s)) and set(word(pairs.base.tokens, pairs.read)) == {"to"}
    assert (pairs.base.tokens[:, 0] == tokenizer.bos_token_id).all()
    if test == "test2": assert word(pairs.base.tokens, pairs.at[:, 0]) == s
    if test == "test1":
        assert word(pairs.base.tokens, pairs.at[:, 0] - 1) == io and word(pairs.base.tokens, pairs.at[:, 1] - 1) == s
    differ = (pairs.base.tokens != pairs.source.tokens).sum(1)
    assert (differ == 2).all()


def test_years_line_up(small):
    pairs, tokenizer = year_pairs(small[1], 30, seeded()), small[1]
    for i in range(30):
        where = (pairs.base.tokens[i] != pairs.source.tokens[i]).nonzero()[:, 0]
        year = int(tokenizer.decode(int(pairs.base.tokens[i, where[0]])))
        valid = {int(tokenizer.decode(int(o))) for o in pairs.valid[i].nonzero()[:, 0]}
        assert len(where) == 1 and valid == set(range(year + 1, 100))
        assert tokenizer.decode(int(pairs.source.tokens[i, where[0]])) == "01"


def test_published_layers_and_resume(small, tmp_path):
    cuts = {o: cut(24, 4, o) for o in (f"blocks.{i}.hook_resid_post" for i in (4, 6, 8, 9))}
    for name in SUITES:
        found = suite(*small, name, cuts, n=6, methods=("random",), folder=tmp_path)
        again = suite(*small, name, cuts, n=6, methods=("random",), folder=tmp_path)
        assert tuple(found) == SUITES[name] and json.dumps(found) == json.dumps(again)
    with pytest.raises(ValueError, match="holds other patches, pairs or weights"):
        suite(*small, "ioi", cuts, n=7, folder=tmp_path)


def test_published_gini_coefficients():
    file = of_others("published/ndm_gpt2_effects.json")
    if not file.exists(): pytest.skip(f"the published effects are not here: no {file}")
    logged = [o for t in json.loads(file.read_text())["tests"].values() for o in t.values()]
    gaps = [abs(v - o["gini"][k]) for o in logged
            for k, v in gini_coefficients(o["effect"], o["partition"], o["variance"]).items()]
    assert len(gaps) == 75 and max(gaps) < 1e-8


def test_made_up_names_have_as_many_tokens(tmp_path):
    model, task, _ = load_model("ioi")
    file = tmp_path/"facts.json"
    ask = dict(question="{entity} gave", context="{entity} went to {attribute} ;", facts={"Ada": "book", "Ben": "ring"})
    for wrong, message in ((ask | dict(facts={"Ada": "blue book", "Ben": "ring"}),
                            "attribute 'blue book' is several tokens"),
                            (ask | dict(context="{entity} went"), "must hold"),
                           ({"question": "{entity}"}, "has no context: write question, context and facts"),
                           (ask | dict(facts={"Ada": "book"}), "a conflict needs two")):
        file.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=message): read_facts(file, task.tokenizer)
    file.write_text(json.dumps(ask))
    with pytest.raises(ValueError, match="completes none of 2 facts"):
        conflict_pairs(model, task.tokenizer, read_facts(file, task.tokenizer), 4, seeded())


def test_conflicts_of_a_model_with_a_tokenizer(small, tmp_path):
    "Facts are whatever the random model happens to say."
    model, tokenizer = small
    said = {}
    for name in WORDS["names"]:
        ids = torch.tensor([[tokenizer.bos_token_id,
                             *tokenizer.encode(f"Yesterday {name} gave", add_special_tokens=False)]])
        word = tokenizer.decode(int(model(ids)[0, -1].argmax())).strip()
        if single_token(tokenizer, word) == int(model(ids)[0, -1].argmax()): said[name] = word
    extra = [o for o in ("book", "ring") if o not in said.values()][:1]
    file = tmp_path/"facts.json"
    file.write_text(json.dumps(dict(question="Yesterday {entity} gave", context="When {entity} offered a {attribute},",
                                    facts=said | {"John": extra[0]}, made_up=WORDS["names"])))
    facts = read_facts(file, tokenizer)
    assert set(known_facts(model, tokenizer, facts)) == set(said) - {"John"}
    found = knowledge_conflict(model, tokenizer, facts, cut(24, 2, "blocks.5.hook_resid_post"), n=20, folder=tmp_path)
    assert set(found) == {"context", "question"} and set(found["context"]) == {"original", "s0", "s1", "whole"}
    assert all(0 <= x <= 1 for o in found.values() for r in o.values() for x in r.values())


def test_each_safeguard_can_fail(known, tests):
    passing = carries(known.model, Partition(known.bases[SITE], SITE), "token", tests, "token", draws=1).figures
    assert all(_checks(passing, .9).values())
    for change, check in ((dict(whole=.2), "the whole site does as much"), (dict(complement=.8), "the rest does not"),
                          ({"complement, others": .1}, "the rest moves the others"), (dict(isolate=.5), "others stay"),
                          ({"cause, held out": .3}, "held-out values follow"),
                          (dict(random=dict(dimension=.1, variance=.9, overlap=.2)), "random ones do not"),
                          (dict(supervised=1.2), "as good as supervised"),
                          ({"natural, seen part": dict(stretch=9.)}, "its seen part varies as much"),
                          (dict(readers={"all readers": dict(seen=.1, unseen=0., share=.5)}),
                           "what readers see suffices"),
                          (dict(readers={"all readers": dict(seen=1., unseen=.9, share=.5)}),
                           "what they do not see does nothing")):
        assert [k for k, v in _checks(passing | change, .9).items() if not v] == [check]


def test_refused_pairs(small):
    with pytest.raises(ValueError, match="unknown test 'test9'"): ioi_pairs(small[1], "test9", 4, seeded())
    with pytest.raises(ValueError, match="0 of 1 verbs are one token"):
        ioi_pairs(small[1], "test2", 4, seeded(), WORDS | dict(verbs=["bestowed"]))
    with pytest.raises(ValueError, match="does not end a token"):
        ioi_pairs(small[1], "test2", 4, seeded(),
                  WORDS | dict(templates=["When {A}s and {B} met, {S} gave a {thing} to the {place} of"]))
    base, source = (given(torch.tensor([o])) for o in ([1, 2, 3], [1, 2, 4]))
    at, read = torch.tensor([[2]]), torch.tensor([2])
    with pytest.raises(ValueError, match="1 counterfactuals have the answer of their base"):
        make_pairs(base, source, at, read, read, read)
    with pytest.raises(ValueError, match="is its own counterfactual"): make_pairs(base, base, at, read, read, read + 1)
    with pytest.raises(ValueError, match="3 and 4 tokens: positions do not line up"):
        make_pairs(base, given(torch.tensor([[1, 2, 4, 5]])), at, read, read, read + 1)


def test_refused_partitions(known, tests, small, tmp_path):
    narrow = cut(24, 4, SITE)
    with pytest.raises(ValueError, match="is 24 wide, this model"): carries(known.model, narrow, "s0", tests, "token")
    with pytest.raises(ValueError, match="is 24 wide, this model 64"):
        suite(load_model("ioi")[0], load_model("ioi")[1].tokenizer, "ioi", {SITE: narrow},
              layers={o: 0 for o in IOI_TESTS})
    with pytest.raises(ValueError, match="activations of width 60"): partition_information(narrow, torch.randn(50, 60))
    with pytest.raises(ValueError, match="holds no partition"): read_partitions(tmp_path)


def test_evaluate_reuses_and_refuses(tmp_path):
    known = plant("induction", certified=False)
    Partition(known.bases[SITE], SITE).save_pretrained(tmp_path/"cut")
    job = ("carriers", "planted-induction", tmp_path/"cut", tmp_path/"out.json")
    done = evaluate(*job, n=120)
    assert (tmp_path/"out.html").exists() and not (tmp_path/"out.parts").exists()
    assert [o["verdict"] for o in done["results"][SITE]["reports"].values()] == ["carries"]*2
    assert evaluate(*job, n=120) == done == read_json(tmp_path/"out.json", "evaluation")
    with pytest.raises(ValueError, match="holds something else"): evaluate(*job, n=121)
    with pytest.raises(ValueError, match="needs --facts"): evaluate("knowledge-conflict", *job[1:])
    with pytest.raises(ValueError, match="has no tokenizer"):
        evaluate("ioi", "planted-induction", tmp_path/"cut", tmp_path/"other.json")
    with pytest.raises(ValueError, match="no tests are known for weekdays"):
        known_tests("weekdays", load_model("weekdays")[1], 9, seeded())
    assert not (tmp_path/"other.json").exists()


def test_command_line(tmp_path):
    cut(64, 4, SITE).save_pretrained(tmp_path/"cut")
    job = ("--partitions", tmp_path/"cut", "--out", tmp_path/"ioi.json", "--prompts", 20)
    code, out, error = call("evaluate", "ioi", "ioi", *job, "--layers", "test1=0,test2=0,test3-pos=0,test3-S_name=0")
    assert code == 0 and "test3-S_name, trained: Gini" in out, error
    assert (tmp_path/"ioi.html").exists()
    for args, message in (((), "test1 patches layer 4"), (("--layers", "4"), "write a test and a layer")):
        assert message in refused("evaluate", "ioi", "ioi", *job, *args, "--overwrite")
    suites = "ioi, greater-than, knowledge-conflict, carriers, mutual-information"
    assert f"unknown suite 'carrier': use one of {suites}" in refused("evaluate", "carrier", "ioi", *job)
