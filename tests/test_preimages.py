"Indexes and attribution: what they promise on stores and models of any kind."
import json, math, shutil, unicodedata
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from subspace_circuits import preimages
from subspace_circuits.activations import ActivationStore, capture, given, read_sites
from subspace_circuits.models import open_model
from subspace_circuits.text import TextTask
from subspace_circuits.bench.capture import RandomTask, small_llama
from subspace_circuits.circuit_families import plant
from subspace_circuits.partition import Partition
from subspace_circuits.preimages import (
    Index, attribute, build_indexes, document_rows, mean_embedding, search_index, sequences,
    similarities, similarity_histogram, within)
from subspace_circuits.explorer import Explorer, readable
from subspace_circuits.files import of_others
from subspace_circuits.toy_models import load_model

mid = "blocks.0.hook_resid_mid"
stories = of_others("models/stories260K")


def cut(d, site, sizes, mean=None, seed=0):
    "A partition at random."
    basis = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)))[0]
    return Partition({f"s{i}": o for i, o in enumerate(basis.split(sizes, 1))}, site, mean)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    torch.set_num_threads(1)
    model, task, _ = load_model("induction")
    return capture(model, task, [mid], tmp_path_factory.mktemp("preimages")/"store", shards=3, sequences=40)


@pytest.fixture(scope="module")
def partition(store): return cut(64, mid, [24, 40], store[mid].mean(0))


def by_table(keys, z, metric, out, k):
    "Values of the nearest rows, by hand."
    values = (F.cosine_similarity(keys.double(), z.double()[None]) if metric == "cosine"
              else (keys.double() - z.double()).norm(dim=1))
    values[out] = -torch.inf if metric == "cosine" else torch.inf
    return values.sort(descending=metric == "cosine").values[:k].float()


@pytest.mark.parametrize("exact", [10**6, 1000])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_search(store, partition, tmp_path, exact, metric):
    indexes, document = build_indexes(store, partition, tmp_path/"index", exact=exact), store.column("document")
    assert (metric in indexes["s0"].about) == (exact < len(store))
    for name, index in indexes.items():
        keys, right = (store[mid] - partition.mean)@partition.bases[name], 0
        torch.testing.assert_close(index.rows, keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(index.norms, keys.norm(dim=1), atol=1e-5, rtol=0)
        for row in range(50, len(store), 331):
            own = document_rows(document, row)
            found, true = search_index(index, keys[row], 20, metric, own), by_table(keys, keys[row], metric, own, 20)
            assert not set(found.row.tolist()) & set(own.tolist()) and len(set(found.row.tolist())) == len(found.row)
            limit = true[-1] - 1e-5 if metric == "cosine" else true[-1] + 1e-3
            right += int((found.value >= limit).sum() if metric == "cosine" else (found.value <= limit).sum())/20
            if exact > len(store):
                torch.testing.assert_close(found.value, true, atol=1e-3 if metric == "euclidean" else 1e-5, rtol=0)
        assert right/len(range(50, len(store), 331)) >= .97
        if metric in index.about: assert index.about[metric]["recall"] >= .99


def test_threshold_and_histogram(store, partition, tmp_path):
    index, own = build_indexes(store, partition, tmp_path/"index")["s0"], torch.arange(10)
    for metric, steps in (("cosine", (.2, .6, .9, 1.)), ("euclidean", (5., 1., .3, 0.))):
        values = similarities(index, index.rows[5], metric)
        counts = [within(values, o, metric, 10, own).count for o in steps]
        assert counts == sorted(counts, reverse=True) and counts[-1] == 0
        assert len(within(values, steps[-1], metric, 10, own).row) == 0
        found = within(values, steps[0], metric, 10, own)
        torch.testing.assert_close(found.value, by_table(index.rows, index.rows[5], metric, own, 10), atol=1e-3, rtol=0)
        assert sum(similarity_histogram(values, metric)["counts"]) == len(store)


def test_rows_without_direction(store, tmp_path):
    p = cut(64, mid, [24, 40], store[mid][7])
    for exact in (10**6, 1000):
        index = build_indexes(store, p, tmp_path/str(exact), exact=exact)["s0"]
        assert index.norms[7] == 0 and similarities(index, index.rows[8]).isnan().sum() == (index.norms == 0).sum()
        assert 7 not in search_index(index, index.rows[8], 4000 if exact > 1000 else 200).row.tolist()
        assert sum(similarity_histogram(similarities(index, index.rows[8]))["counts"]) == len(store) - int((index.norms
                                                                                                            == 0).sum())
        with pytest.raises(ValueError, match="has no direction"): search_index(index, index.rows[7])
        assert search_index(index, index.rows[7], 1, "euclidean").value[0] == 0


def test_more_neighbours_than_rows(store, partition, tmp_path):
    index = build_indexes(store, partition, tmp_path/"index")["s0"]
    assert search_index(index, index.rows[0], 10**6).count == len(store)
    assert search_index(index, index.rows[0], 5, exclude=torch.arange(len(store))).count == 0


def files(folder): return {o.name: o.read_bytes() for o in folder.iterdir()}


def test_interrupted_build_continues(store, partition, tmp_path):
    whole = build_indexes(store, partition, tmp_path/"whole", exact=1000)["s0"].folder
    kept, seen = preimages.write_json, []
    def stop(file, value, kind):
        kept(file, value, kind)
        seen.append(value["shards"])
        if len(seen) in (2, 4): raise KeyboardInterrupt
    with patch.object(preimages, "write_json", stop):
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt): build_indexes(store, partition, tmp_path/"part", exact=1000)
            with pytest.raises(ValueError, match="is not finished"): Index(tmp_path/"part", "s1", store, partition)
        build_indexes(store, partition, tmp_path/"part", exact=1000)
    assert seen[:3] == [1, 2, 3], "a shard was projected twice"
    assert files(tmp_path/"part") == files(whole)
    with patch.object(preimages, "_project", lambda *_: 1/0): build_indexes(store, partition, tmp_path/"part",
                                                                            exact=1000)


def test_index_of_something_else(store, partition, tmp_path):
    build_indexes(store, partition, tmp_path/"index")
    with pytest.raises(ValueError, match="is an index of another subspaces"):
        build_indexes(store, cut(64, mid, [32, 32]), tmp_path/"index")
    with pytest.raises(ValueError, match="is an index of another partition: it was made from .{12}, this is .{12}"):
        build_indexes(store, cut(64, mid, [24, 40], seed=1), tmp_path/"index")
    fresh = cut(64, mid, [24, 40], seed=1)
    assert build_indexes(store, fresh, tmp_path/"index", overwrite=True)["s0"].info["partition"] == fresh.fingerprint
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine"/"thesis.tex").write_text("…")
    with pytest.raises(ValueError, match="holds something else"): build_indexes(store, partition, tmp_path/"mine")
    with pytest.raises(ValueError, match="holds no index"): Index(tmp_path, "s0", store, partition)


def hugging_face():
    "Small models of several families, with random weights."
    from transformers import (Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig,
                              GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM,
                              MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM)
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=50, max_position_embeddings=64,
                 intermediate_size=64, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    shared = small | dict(num_key_value_heads=2)
    return {"gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=50, n_positions=64,
                                                       bos_token_id=0, eos_token_id=1)),
                                                       "llama": lambda: LlamaForCausalLM(LlamaConfig(**shared)),
            "mistral": lambda: MistralForCausalLM(MistralConfig(**shared)),
            "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**shared)),
            "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**shared, head_dim=8)),
            "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**small))}


def family(name, folder):
    "A model of a family."
    torch.manual_seed(0)
    if name in ("induction", "ioi", "modular_addition"): return open_model(name)[0]
    if name == "planted": return plant("induction", certified=False).model
    if name == "llama2c shape": return small_llama(32, 2, 4, 64, 50, 64).requires_grad_(False)
    hugging_face()[name]().save_pretrained(folder)
    return open_model(folder)[0]


@pytest.mark.parametrize("name", ["induction", "ioi", "planted", "llama2c shape", "gpt2", "llama", "mistral", "qwen2",
                                  "gemma2", "gpt_neox"])
def test_attribution_of_every_family(name, tmp_path):
    model = family(name, tmp_path/"model")
    site, length = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", min(10, model.cfg.n_ctx)
    store = capture(model, RandomTask(min(50, model.cfg.d_vocab)), [site], tmp_path/"store", shards=1, sequences=8,
                    lengths=(length, length))
    d = model.cfg.d_model
    index = build_indexes(store, cut(d, site, [d//2, d - d//2], store[site].mean(0)), tmp_path/"index")["s0"]
    rows, baseline = [7, 3, 7 + length, 9 + 2*length], mean_embedding(model, store)
    batch, at = sequences(store, rows)
    h = read_sites(model, batch, [site])[site][torch.arange(4), at].detach()
    torch.testing.assert_close(h, store.rows(site, rows), atol=1e-3*float(h.abs().max()), rtol=0)
    for metric in ("cosine", "euclidean"):
        scale, free = (1 if metric == "cosine" else float(index.rows[rows[0]].norm())), {}
        for frozen in (True, False):
            a = free[frozen] = attribute(model, batch, at, index, index.rows[rows[0]], baseline, metric, frozen)
            assert a.error.max() <= .011*scale or a.steps.max() == 160, a.error
            torch.testing.assert_close(a.shares.sum(1) + a.baseline, a.value, atol=float(a.error.max()) + 1e-4*scale,
                                       rtol=0)
            for i, n in enumerate(at.tolist()):
                assert not a.shares[i, n + 1:].any(), "a token behind the row has a share"
        single, alone = sequences(store, rows[1:2])
        b = attribute(model, single, alone, index, index.rows[rows[0]], baseline, metric,
                      steps=int(free[True].steps[1]), most=int(free[True].steps[1]))
        torch.testing.assert_close(b.shares[0], free[True].shares[1, :len(b.shares[0])], atol=2e-3*scale, rtol=0)
        assert (free[True].shares - free[False].shares).abs().max() > 1e-4*scale, "frozen attention made no difference"


def test_attribution_knows_what_is_linear(store, tmp_path):
    """At the embeddings only the row's own token can have a share, and one step is exact for a cosine that is not
    asked about more."""
    model, task, _ = load_model("induction")
    site = "blocks.0.hook_resid_pre"
    early = capture(model, task, [site], tmp_path/"store", shards=1, sequences=8)
    index = build_indexes(early, cut(64, site, [24, 40]), tmp_path/"index")["s0"]
    batch, at = sequences(early, [20, 31])
    a = attribute(model, batch, at, index, index.rows[20], mean_embedding(model, early))
    for i, n in enumerate(at.tolist()): assert not a.shares[i, :n].any() and a.shares[i, n].abs() > 1e-3
    b = attribute(model, batch, at, index, index.rows[20], mean_embedding(model, early), frozen=False)
    torch.testing.assert_close(a.shares, b.shares)


def test_models_without_patterns(store, partition, tmp_path):
    model, index = load_model("induction")[0], build_indexes(store, partition, tmp_path/"index")["s0"]
    batch, at = sequences(store, [20])
    hooks = {k: v for k, v in model.hook_dict.items() if "hook_pattern" not in k}
    with patch.object(type(model), "hook_dict", property(lambda _: hooks)), pytest.raises(ValueError,
                                                                                          match="shows no attention "
                                                                                                "patterns .*: pass "
                                                                                                "frozen=False"):
        attribute(model, batch, at, index, index.rows[20], mean_embedding(model, store))


@pytest.mark.parametrize("packed", [False, True])
def test_texts_come_back(packed, tmp_path):
    "Windows of a text, several to a document or several documents to a window."
    model = small_llama(16, 1, 2, 32, 400, 24).requires_grad_(False)
    class Bytes:
        bos = 300
        def encode(self, text): return list(text.encode())
        def decode(self, ids): return bytes(ids).decode()
    (tmp_path/"text.txt").write_text("<|endoftext|>".join("abcdefghij"*n for n in (1, 4, 2, 7, 1)))
    task = TextTask(tmp_path/"text.txt", Bytes(), 24, packed)
    site = "blocks.0.hook_resid_post"
    store = capture(model, task, [site], tmp_path/"store", shards=2, sequences=4, lengths=(1, 24))
    rows = list(range(0, len(store), 7))
    batch, at = sequences(store, rows)
    h = read_sites(model, batch, [site])[site][torch.arange(len(rows)), at].detach()
    torch.testing.assert_close(h, store.rows(site, rows), atol=1e-4, rtol=0)


def test_every_token_is_readable():
    if not stories.exists(): pytest.skip(f"{stories} is not here")
    tokenizer = open_model(stories)[1]
    shown = [readable(tokenizer, o) for o in range(len(tokenizer))]
    assert all(shown) and not [o for o in "".join(shown) if unicodedata.category(o)[0] == "C"]
    assert readable(tokenizer, 13) == "⏎" and " the" in shown


def test_a_language_model(tmp_path):
    if not stories.exists(): pytest.skip(f"{stories} is not here")
    model, tokenizer = open_model(stories)
    site = "blocks.2.hook_resid_post"
    (tmp_path/"text.txt").write_text((stories/"tinystories_sample.txt").read_text())
    store = capture(model, TextTask(tmp_path/"text.txt", tokenizer, 512), [site], tmp_path/"store", shards=1,
                    sequences=4, lengths=(1, 512))
    explorer = Explorer([build_indexes(store, cut(64, site, [32, 32], store[site].mean(0)), tmp_path/"index")], model,
                        tokenizer)
    view = explorer.view(dict(text="Once upon a time, there was a little girl", n="5"))
    assert view["tokens"][str(view["query"]["ids"][-1])].strip() in "a little girl" and len(view["neighbours"]) == 5
    shares = explorer.attribution(dict(text="Once upon a time, there was a little girl", n="5", shading="free"),
                                  [o["row"] for o in view["neighbours"]])
    assert len(shares) == 6 and all(math.isfinite(x) for o in shares.values() for x in o["shares"])
    assert shares["query"]["value"] == 1
    with pytest.raises(ValueError, match="this model takes 512: shorten it"): explorer.view(dict(text="a b "*600))
