"""What a researcher brings is opened exactly or refused by name: formats, configurations, tokenizers, texts, windows,
and names that stand for two things."""
import codecs, gzip, json, sys, warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Fast, decoders, models as kinds, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from subspace_circuits.activations import (
    ActivationStore, batch_rows, capture, check_model, fingerprint, from_position, read_sites, window_length)
from subspace_circuits.models import open_model
from subspace_circuits.own_tasks import PromptTask, open_job
from subspace_circuits.search import stored_sequences
from subspace_circuits.text import Samples, TextTask, generate, read_documents

sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=64)
tokens = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def one_thread(): torch.set_num_threads(1)


def random(folder, config, **how):
    "A folder as its authors' library saves it, and the raw model."
    torch.manual_seed(0)
    raw = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for p in raw.parameters(): p.add_(.1*torch.randn_like(p))
    raw.save_pretrained(folder, **how)
    return raw


def bpe(folder, text, special, size=400, **markers):
    "A byte-level tokenizer beside a model."
    t = Fast(kinds.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator([text]*20, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False,
                                                         initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    PreTrainedTokenizerFast(tokenizer_object=t, **markers).save_pretrained(folder)
    return len(PreTrainedTokenizerFast(tokenizer_object=t, **markers))


def words(folder, names):
    t = Fast(kinds.WordLevel({o: i for i, o in enumerate(["<s>", "<unk>", *names])}, "<unk>"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)


def refused(source, **config):
    with pytest.raises(ValueError) as e: open_model(source, **config)
    assert "\n" not in str(e.value)
    return str(e.value)


def edit(folder, **change):
    file = folder/"config.json"
    file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | change).items() if v is not None}))


# formats

def test_every_format_is_the_same_model(tmp_path):
    raw = random(tmp_path/"whole", LlamaConfig(**sizes, num_key_value_heads=2))
    raw.save_pretrained(tmp_path/"shards", max_shard_size="20KB")
    assert len(list((tmp_path/"shards").glob("*.safetensors"))) > 1
    raw.save_pretrained(tmp_path/"bin")
    (tmp_path/"bin"/"model.safetensors").unlink()
    torch.save(raw.state_dict(), tmp_path/"bin"/"pytorch_model.bin")
    for name in ("whole", "shards", "bin"):
        model, _ = open_model(tmp_path/name)
        assert (model(tokens) - raw(tokens).logits).abs().max() < 1e-5 and max(model.probe.values()) < 1e-5
    raw.bfloat16().save_pretrained(tmp_path/"half")
    model = open_model(tmp_path/"half")[0]
    assert model.W_E.dtype == torch.float32 and model.W_E.equal(raw.get_input_embeddings().weight.float())


def test_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    raw = random(tmp_path/"whole", LlamaConfig(**sizes, num_key_value_heads=2, rms_norm_eps=1e-5))
    w = gguf.GGUFWriter(str(tmp_path/"tiny.gguf"), "llama")
    for name, value in dict(context_length=64, embedding_length=32, block_count=2, feed_forward_length=64, head_count=4,
                            head_count_kv=2, layer_norm_rms_eps=1e-5, rope_dimension_count=8, rope_freq_base=10000.,
                            vocab_size=96).items(): getattr(w, f"add_{name}")(value)
    w.add_tokenizer_model("llama")
    w.add_token_list([b"<unk>", b"<s>", b"</s>"] + [f"w{i}".encode() for i in range(93)])
    w.add_token_scores([0.]*96)
    w.add_token_types([2, 3, 3] + [1]*93)
    w.add_bos_token_id(1), w.add_eos_token_id(2), w.add_unk_token_id(0)
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
             "lm_head.weight": "output.weight"}
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"model.layers.{i}.{k}.weight": f"blk.{i}.{v}.weight" for i in range(2) for k, v in parts.items()}
    for k, v in raw.state_dict().items():
        if heads := dict(attn_q=4, attn_k=2).get(names[k].split(".")[-2]): # neighbours turn there, halves here
            v = v.reshape(heads, 2, -1, v.shape[1]).swapaxes(1, 2).reshape(v.shape)
        w.add_tensor(names[k], v.contiguous().numpy())
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
    model, tokenizer = open_model(tmp_path/"tiny.gguf")
    assert (model(tokens) - raw(tokens).logits).abs().max() < 1e-5 and tokenizer is not None
    (tmp_path/"cut.gguf").write_bytes((tmp_path/"tiny.gguf").read_bytes()[:3000])
    assert "cannot be opened as a causal language model" in refused(tmp_path/"cut.gguf")
    assert "has its own configuration: leave out act_fn" in refused(tmp_path/"tiny.gguf", act_fn="relu")


def test_a_checkpoint_and_its_configuration_disagree(tmp_path):
    random(tmp_path, LlamaConfig(**sizes, attention_bias=True))
    edit(tmp_path, attention_bias=False)
    assert "weights (model.layers.0.self_attn.k_proj.bias" in refused(tmp_path)
    edit(tmp_path, attention_bias=True, num_hidden_layers=1)
    assert "that its config.json has no place for" in refused(tmp_path)
    edit(tmp_path, num_hidden_layers=3)
    assert "which would be random" in refused(tmp_path)
    edit(tmp_path, num_hidden_layers=2, attention_bais=True)
    assert "says 'attention_bais', which LlamaConfig does not know: is it 'attention_bias'?" in refused(tmp_path)
    edit(tmp_path, attention_bais=None, quantization_config=dict(quant_method="gptq", bits=4))
    assert "holds weights quantised by gptq" in refused(tmp_path)


def test_tensors_beside_the_model_are_named(tmp_path):
    raw = random(tmp_path, LlamaConfig(**sizes))
    state = load_file(tmp_path/"model.safetensors") | {"v_head.summary.weight": torch.zeros(1, 32)}
    save_file(state, tmp_path/"model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="unused .v_head.summary.weight"): model, _ = open_model(tmp_path)
    assert (model(tokens) - raw(tokens).logits).abs().max() < 1e-5


def test_saved_model_with_another_weight(tmp_path):
    from subspace_circuits.toy_models import load_model, save_model
    model, _, config = load_model("induction")
    save_model(model, tmp_path, config)
    save_file(load_file(tmp_path/"model.safetensors") | {"layers.7.mlp.weight": torch.zeros(2)},
              tmp_path/"model.safetensors")
    assert "holds layers.7.mlp.weight, which its configuration has no place for" in refused(tmp_path)


def test_a_name_that_stands_for_two_things(tmp_path, monkeypatch):
    random(tmp_path/"induction", GPT2Config(vocab_size=14, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    monkeypatch.chdir(tmp_path)
    assert "'induction' is a bundled model and a path in" in refused("induction")
    assert open_model("./induction")[0].cfg.n_layers == 1


# identity

def test_a_model_is_weights_configuration_and_tokenizer(tmp_path):
    random(tmp_path/"a", LlamaConfig(**sizes))
    words(tmp_path/"a", ["the", "cat", "sat"])
    (tmp_path/"text.txt").write_text("the cat sat the cat")
    def opened():
        model, tokenizer = open_model(tmp_path/"a")
        return model, TextTask(tmp_path/"text.txt", tokenizer, 64)
    def stored(out): return capture(*opened(), ["blocks.1.hook_resid_post"], tmp_path/out, shards=1, sequences=4)
    first = stored("store")
    assert first.info["probe"].keys() == {"logits", "pre", "mid", "post"} and stored("store").info == first.info
    edit(tmp_path/"a", rms_norm_eps=.1)
    with pytest.raises(ValueError, match="holds a capture with configuration"): stored("store")
    with pytest.raises(ValueError, match="holds activations of configuration"): check_model(first, opened()[0])
    edit(tmp_path/"a", rms_norm_eps=1e-6)
    check_model(first, opened()[0])
    words(tmp_path/"a", ["the", "sat", "cat"])
    with pytest.raises(ValueError, match="holds activations of tokenizer"): check_model(first, opened()[0])
    first.info["capture"]["weights"] = first.info["capture"]["weights"][:32] + "0"*32 # as an earlier version wrote it
    with pytest.warns(UserWarning, match="as an earlier version wrote it"): check_model(first, opened()[0])


# tokens and windows

def test_no_marker_that_a_tokenizer_does_not_have(tmp_path):
    n = bpe(tmp_path, "the cat sat on the mat", ["<pad>", "<eos>"], pad_token="<pad>", eos_token="<eos>")
    random(tmp_path, Qwen2Config(**sizes | dict(vocab_size=n, num_key_value_heads=2)))
    (tmp_path/"text.txt").write_text("the cat sat on the mat")
    model, tokenizer = open_model(tmp_path)
    ids = next(TextTask(tmp_path/"text.txt", tokenizer, 64).windows(16))
    assert tokenizer.decode([o for o, _ in ids]) == "the cat sat on the mat"


@pytest.mark.parametrize("lengths, packed", [((1, 48), False), ((1, 12), False), ((1, 12), True)])
def test_sequences_are_what_the_model_saw(tmp_path, lengths, packed):
    names, g = [f"w{i}" for i in range(20)], torch.Generator().manual_seed(0)
    random(tmp_path/"model", GPT2Config(vocab_size=32, n_positions=48, n_embd=32, n_layer=2, n_head=4, bos_token_id=0,
                                        eos_token_id=0))
    words(tmp_path/"model", names)
    (tmp_path/"text.txt").write_text("<|endoftext|>".join(
        " ".join(names[i] for i in torch.randint(20, (40,), generator=g)) for _ in range(30)))
    model, tokenizer = open_model(tmp_path/"model")
    task, site = TextTask(tmp_path/"text.txt", tokenizer, 48, packed), "blocks.1.hook_resid_post"
    store = capture(model, task, [site], tmp_path/"store", shards=2, sequences=20, lengths=lengths)
    batch = stored_sequences(store)
    windows = list(task.windows(lengths[1]))[:40]
    assert [t[r].tolist() for t, r in zip(batch.tokens, batch.real)] == [[o for o, _ in w] for w in windows]
    assert int(batch.real.sum()) == len(store)
    torch.testing.assert_close(read_sites(model, batch, [site])[site][batch.real], store[site], atol=1e-5, rtol=0)
    later = from_position(store, 1)
    assert int((~later).sum()) == len(windows) == int((store.column("position") == 0).sum())
    some = stored_sequences(store, later)
    assert int(some.real.sum()) == int(later.sum()) and some.tokens.equal(batch.tokens)


def test_characters_of_several_tokens(tmp_path):
    text = "the café 😀 sat on 日本語"
    n = bpe(tmp_path, "the cat sat on the mat", ["<s>"], bos_token="<s>")
    random(tmp_path, LlamaConfig(**sizes | dict(vocab_size=n)))
    (tmp_path/"text.txt").write_text(text)
    model, tokenizer = open_model(tmp_path)
    store = capture(model, TextTask(tmp_path/"text.txt", tokenizer, 64), ["blocks.0.hook_resid_pre"], tmp_path/"store",
                    shards=1, sequences=1)
    shown = [store.context(i, 30, 30, tokenizer).text for i in range(1, len(store))]
    assert all("".join(o).removeprefix("<s>") == text and o[1] for o in shown)
    assert [o[1] for o in shown].count("😀") == 4 and {"é", "日", "本", "語"} <= {o[1].strip() for o in shown}


def test_window_that_fits(tmp_path):
    random(tmp_path, LlamaConfig(**sizes | dict(max_position_embeddings=131_072)))
    model = open_model(tmp_path)[0]
    assert 16 <= window_length(model, 128, 6) < 4096 and window_length(model, 1, 1) > window_length(model, 128, 1)


def test_texts_as_systems_write_them(tmp_path):
    (tmp_path/"A.TXT").write_bytes(codecs.BOM_UTF8 + b"the cat")
    (tmp_path/"b.jsonl").write_bytes(codecs.BOM_UTF8 + json.dumps({"text": "the cat"}).encode())
    (tmp_path/"c.json").write_text(json.dumps(["the cat"]))
    with gzip.open(tmp_path/"d.jsonl.gz", "wt") as f: f.write(json.dumps({"body": "the cat"}))
    for name, field in (("A.TXT", "text"), ("b.jsonl", "text"), ("c.json", "text"), ("d.jsonl.gz", "body")):
        assert list(read_documents(tmp_path/name, field)) == ["the cat"], name
    with pytest.raises(ValueError, match="it has body: name one of them with --field"):
        list(read_documents(tmp_path/"d.jsonl.gz"))
    class Mute:
        bos_token_id = 1
        def encode(self, text, **more): return []
    with pytest.raises(ValueError, match="makes no tokens of"): TextTask(tmp_path/"A.TXT", Mute(), 8)


@pytest.mark.parametrize("config", [
    LlamaConfig(**sizes, num_key_value_heads=2),
    GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4),
    ("Mistral", dict(sliding_window=4, num_key_value_heads=2)),
    ("Gemma2", dict(head_dim=8, sliding_window=4, num_key_value_heads=2)),
    ("GPTNeoX", {})], ids=["llama", "gpt2", "mistral", "gemma2", "pythia"])
def test_own_samples_are_drawn_from_whole_passes(tmp_path, config):
    import transformers
    if isinstance(config, tuple): config = getattr(transformers, f"{config[0]}Config")(**sizes, **config[1])
    random(tmp_path, config)
    model, g = open_model(tmp_path)[0], torch.Generator().manual_seed(0)
    drawn, again = generate(model, 3, 4, 16, g), torch.Generator().manual_seed(0)
    ids = torch.full((4, 16), 3)
    for i in range(15):
        ids[:, i + 1] = torch.multinomial(model(ids[:, :i + 1])[:, -1].softmax(-1), 1, generator=again)[:, 0]
    assert (drawn == ids).float().mean() > .95 # a draw may turn on the last digit


# rows

def test_rows_of_another_order():
    from subspace_circuits.closed_form import closed_form
    g, n, d, at, true = torch.Generator().manual_seed(0), 6000, 32, 0, []
    q, h = torch.linalg.qr(torch.randn(d, d, generator=g))[0], .01*torch.randn(n, d, generator=g)
    for values in (9, 7, 5):
        x = torch.eye(values)[torch.randint(values, (n,), generator=g)]
        x, u = x - x.mean(0), q[:, at:at + values - 1]
        true, at = true + [u], at + values - 1
        h += 3*x@torch.linalg.svd(x, full_matrices=False)[2][:values - 1].T@u.T
    loud = h.clone()
    loud[torch.randperm(n, generator=g)[:30]] = 300*torch.nn.functional.normalize(torch.randn(d, generator=g), dim=0)
    def overlap(p):
        def share(u, b): return ((u.T@b).square().sum()/max(u.shape[1], b.shape[1])).item()
        return min(max(share(u, b) for b in p.bases.values()) for u in true)
    clean, aside, kept = (closed_form(x, "site", keep_massive=o) for x, o in ((h, False), (loud, False), (loud, True)))
    assert overlap(clean) > .95 and overlap(aside) > .95 and overlap(kept) < overlap(aside)
    assert "30 rows of another order" in aside.info["verdict"] and "set aside" in aside.info["verdict"]
    assert "not sure" in kept.info["verdict"] and "another order" not in clean.info["verdict"]
    twice = closed_form(h.repeat(2, 1), "site")
    assert all(twice.bases[k].equal(clean.bases[k]) for k in clean.names)
    assert twice.info["verdict"] == clean.info["verdict"]


# tasks

def test_prompts_of_a_language_model(tmp_path):
    text = "the capital of France is Paris . the capital of Italy is Rome ."
    n = bpe(tmp_path, text, ["<s>"], bos_token="<s>")
    random(tmp_path, GPT2Config(vocab_size=n, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    model, tokenizer = open_model(tmp_path)
    line = dict(prompt="the capital of France is", answer="Paris", wrong="Rome",
                counterfactual="the capital of Italy is", variables={"country": dict(value="France", position=4)})
    (tmp_path/"prompts.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(
        line | dict(prompt=line["counterfactual"], answer="Rome", wrong="Paris", counterfactual=line["prompt"],
                    variables={"country": dict(value="Italy", position=4)})))
    task = PromptTask(tmp_path/"prompts.jsonl", tokenizer)
    batch = task.sample(4, generator=torch.Generator().manual_seed(0))
    assert tokenizer.decode(batch.tokens[0]).startswith("<s>the capital of") and batch.scored.sum() == 4
    assert {tokenizer.decode([o]) for o in batch.targets[batch.scored]} == {" Paris", " Rome"}
    assert sorted(batch.known["country"][:, 4].tolist()) == [0, 0, 1, 1] and (batch.known["country"][:, :4] == -1).all()
    with pytest.raises(ValueError, match="does not do prompts .*: .* of 100 answers are right, 50.0% would be chance"):
        open_job(str(tmp_path), task=str(tmp_path/"prompts.jsonl"))


def test_what_a_model_is_asked():
    assert open_job("induction")[2] is None and open_job("induction", task="unique_copy")[2].right == 1.
    for spec, why in {"reverse": "induction does not do reverse: ", "no_such": "unknown task 'no_such'"}.items():
        with pytest.raises(ValueError, match=why): open_job("induction", task=spec)
    with pytest.raises(ValueError, match="pass --task or --data"): open_job("induction", "samples", "reverse")
    with pytest.raises(ValueError, match="planted with its own task"): open_job("planted-ioi", task="reverse")


def test_the_list_of_models_is_what_they_are():
    from subspace_circuits.listing import LISTING, known_models
    assert json.loads(LISTING.read_text()) == known_models()
