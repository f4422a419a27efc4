"""Models made by others, opened from their files: they compute what their authors' code computes and score what was
published."""
import math, os, shutil, struct

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from subspace_circuits.activations import batch_rows, capture, check_model, check_sites, fingerprint, given
from subspace_circuits.files import of_others
from subspace_circuits.models import PieceTokenizer, open_model
from subspace_circuits.text import Samples, generate
from subspace_circuits.toy_models import Batch, Tokenizer, UniqueCopy, accuracy, attention, load_model, save_model

models = of_others("models")
needs_models = pytest.mark.skipif(not models.exists(),
                                  reason=f"models of others are not here: no {models}")
copying, stories, modular = models/"decompiling_transformers", models/"stories260K", models/"modular_addition_113"

# accuracy at list lengths 0-50, 51-100, 101-150 as published, out of 2000;
# attention of the previous-token and of the induction head
published = {
    "unique_copy-@2l1h64d3lr01drop": ((1., 1., .9905), ("L0H0", 1.), ("L1H0", 1.)),
    "unique_copy-^2l1h64d3lr01drop-1100": ((.263, 0., 0.), ("L0H0", .38), ("L1H0", .69)),
    "unique_copy-^2l1h64d3lr01drop-1200": ((.925, .442, .0035), ("L0H0", .83), ("L1H0", .98)),
    "unique_copy-^2l1h64d3lr01drop-1300": ((.994, .937, .508), ("L0H0", .91), ("L1H0", .98)),
    "unique_copy-^2l1h64d3lr01drop-1400": ((.999, .992, .81), ("L0H0", .94), ("L1H0", .99)),
    "unique_bigram_copy-#4l2h64d3lr00drop": ((1., .467, 0.), ("L1H1", .23), ("L2H1", .85)),
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class UniqueBigramCopy:
    """`bos x sep x eos`: symbols of `x` repeat, its bigrams do not. Even: after 16 random symbols, the next is one
    whose own continuations are least used up."""
    name = "unique_bigram_copy"

    def __init__(self, even=True): self.tokenizer, self.even = Tokenizer(16), even

    def list(self, length, generator):
        while True:
            x = torch.randint(0, 16, (min(16 if self.even else 1, length),), generator=generator).tolist()
            if len(set(zip(x, x[1:]))) == max(0, len(x) - 1): break
        free = torch.ones(16, 16, dtype=torch.bool)
        free[x[:-1], x[1:]] = False
        while len(x) < length:
            left = torch.where(free[x[-1]], free.sum(1), -1)
            fits = left == left.max() if self.even else free[x[-1]]
            after = torch.multinomial(fits.float(), 1, generator=generator).item()
            free[x[-1], after] = False
            x.append(after)
        return x

    def sample(self, n, lengths, generator, n_ctx=None):
        t, size = self.tokenizer, torch.randint(max(1, lengths[0]), lengths[1] + 1, (n, 1), generator=generator)
        tokens = torch.full((n, 2*lengths[1] + 3), t.pad)
        for row, length in zip(tokens, size.flatten().tolist()):
            x = self.list(length, generator)
            row[:2*length + 3] = torch.tensor([t.bos, *x, t.sep, *x, t.eos])
        i = torch.arange(tokens.shape[1]).expand(n, -1)
        scored = (i > size) & (i < 2*size + 2)
        return Batch(tokens, i, scored, torch.where(scored, i - size, -1), i < 2*size + 2)


def task_of(name): return UniqueBigramCopy() if "bigram" in name else UniqueCopy(150)


def adds_up(model, tokens):
    _, cache = model.run_with_cache(tokens)
    def gap(i):
        pre, attn, mid, mlp, post = (cache[f"blocks.{i}.hook_{o}"]
                                     for o in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"))
        return max((pre + attn - mid).abs().max().item(), (mid + mlp - post).abs().max().item())
    return max(gap(i) for i in range(model.cfg.n_layers))


@needs_models
@pytest.mark.parametrize("name", published)
def test_copying_models_score_what_was_published(name):
    model, tokenizer = open_model(copying/name)
    task, n = task_of(name), 300
    assert tokenizer.vocab == task.tokenizer.vocab
    for lengths, p in zip(((0, 50), (51, 100), (101, 150)), published[name][0]):
        q = min(max(p, 1/2000), 1 - 1/2000)
        assert abs(accuracy(model, task, lengths, n) - p) < 4*math.sqrt(q*(1 - q)*(1/n + 1/2000)) + 1/n, (name, lengths)


@needs_models
@pytest.mark.parametrize("name", published)
def test_copying_models_have_the_heads_that_were_measured(name):
    model, _ = open_model(copying/name)
    task = UniqueBigramCopy(even=False) if "bigram" in name else task_of(name)
    pattern = attention(model, task.sample(200, (30, 30), torch.Generator().manual_seed(0)))
    previous = pattern.diagonal(-1, 3, 4)[..., :30].mean((2, 3)) # from each of the list to the one before it
    # from each answer's question to where the answer stands
    induction = pattern[..., 31:61, 1:31].diagonal(0, 3, 4).mean((2, 3))
    for scores, (head, share) in zip((previous, induction), published[name][1:]):
        assert abs(scores[int(head[1]), int(head[3])]
                   - share) < .02 and scores[int(head[1]), int(head[3])] == scores.max(), (head, scores)


@needs_models
@pytest.mark.parametrize("name", published)
def test_copying_models_compute_what_transformers_computes(name):
    from transformers import AutoModelForCausalLM
    raw = AutoModelForCausalLM.from_pretrained(copying/name, attn_implementation="eager").requires_grad_(False)
    model, _ = open_model(copying/name)
    batch = task_of(name).sample(20, (0, 50), torch.Generator().manual_seed(0))
    assert (model(batch.tokens) - raw(batch.tokens).logits).abs().max() < 1e-3 and adds_up(model, batch.tokens) < 1e-4
    patterns = torch.stack([o.transpose(0, 1) for o in raw(batch.tokens, output_attentions=True).attentions])
    torch.testing.assert_close(attention(model, batch), patterns, atol=1e-4, rtol=0)
    ours = model.to(torch.float64, print_details=False)(batch.tokens)
    assert (ours - raw.double()(batch.tokens).logits).abs().max() < 1e-10


@needs_models
def test_every_tool_takes_every_family(tmp_path):
    families = {copying/"unique_copy-@2l1h64d3lr01drop": {}, stories: {},
                modular: dict(act_fn="relu", normalization_type=None)}
    prints = set()
    for source, config in families.items():
        model, _ = open_model(source, **config)
        sites = ["blocks.0.hook_resid_mid", "blocks.0.hook_resid_post"]
        tokens = torch.randint(0, 100, (4, 3), generator=torch.Generator().manual_seed(0))
        check_sites(model, sites)
        with pytest.raises(ValueError, match="unknown site"): check_sites(model, ["blocks.0.resid_mid"])
        rows = batch_rows(model, given(tokens), sites)
        assert rows[sites[0]].shape == (12, model.cfg.d_model) and rows["token"].tolist() == tokens.flatten().tolist()
        pattern = attention(model, given(tokens))
        assert pattern.shape == (model.cfg.n_layers, model.cfg.n_heads, 4, 3, 3)
        torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))
        store = capture(model, Samples(model, 1), sites, tmp_path/model.cfg.architecture/str(model.cfg.n_layers),
                        shards=1, sequences=4, lengths=(3, 3))
        check_model(store, open_model(source, **config)[0])
        assert not model.training and not any(o.requires_grad for o in model.parameters())
        prints.add(fingerprint(model))
    assert len(prints) == 3


# llama2.c

def llama_forward(file, tokens):
    "The model of a llama2.c file, from the definition of the format alone."
    data = file.read_bytes()
    d, m, n, h, k, v, t = struct.unpack_from("<7i", data)
    x = torch.frombuffer(bytearray(data[28:]), dtype=torch.float32)
    def take(*shape):
        nonlocal x
        out, x = x[:math.prod(shape)].view(shape), x[math.prod(shape):]
        return out
    shapes = (v, d), (n, d), (n, d, d), (n, d*k//h, d), (n, d*k//h, d), (n, d, d)
    embed, rms_att, wq, wk, wv, wo = (take(*o) for o in shapes)
    shapes = (n, d), (n, m, d), (n, d, m), (n, m, d), (d,), (t, d//h//2), (t, d//h//2)
    rms_ffn, w1, w2, w3, rms_final, cos, sin = (take(*o) for o in shapes)
    assert len(x) == 0
    turn = torch.complex(cos, sin)[:tokens.shape[1]]
    def rotate(y):
        return torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous())*turn).flatten(-2)
    def norm(y, gain): return y/(y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()*gain
    stream, future = embed[tokens], torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()
    for i in range(n):
        y = norm(stream, rms_att[i])
        q, key, val = ((y@w[i].T).split(d//h, -1) for w in (wq, wk, wv))
        heads = [(rotate(q[j])@rotate(key[j*k//h]).mT/(d//h)**.5).masked_fill(future,
                                                                              -torch.inf).softmax(-1)@val[j*k//h]
                                                                              for j in range(h)]
        stream = stream + torch.cat(heads, -1)@wo[i].T
        y = norm(stream, rms_ffn[i])
        stream = stream + (F.silu(y@w1[i].T)*(y@w3[i].T))@w2[i].T
    return norm(stream, rms_final)@embed.T


def texts():
    "The five stories of the sample."
    return [o.strip() for o in (stories/"tinystories_sample.txt").read_text(encoding="utf-8").split("<|endoftext|>")
            if o.strip()]


def previous_token(model, tokens):
    "Mean attention from every token to the one before it."
    diagonals = [attention(model, given(o)).diagonal(-1, 3, 4) for o in tokens]
    share = sum(o.sum((2, 3)) for o in diagonals)/sum(o.shape[2]*o.shape[3] for o in diagonals)
    return {f"L{i}H{j}": share[i, j].item() for i in range(share.shape[0]) for j in range(share.shape[1])}


@needs_models
def test_stories_loss():
    model, pieces = open_model(stories)
    assert len(pieces) == 512
    assert sum(o.numel() for k, o in model.original_model.named_parameters() if not k.endswith("bias")) == 260_032
    ids = [torch.tensor([pieces.encode(o)]) for o in texts()]
    assert [pieces.decode(o[0]) for o in ids] == texts()
    losses = torch.cat([F.cross_entropy(model(o)[0, :-1], o[0, 1:], reduction="none") for o in ids])
    assert len(losses) == 1804 and abs(losses.mean().item() - 1.266) < .001
    for o in ids[:2]:
        assert (model(o) - llama_forward(stories/"stories260K.bin", o)).abs().max() < 1e-3 and adds_up(model, o) < 1e-4


@needs_models
def test_stories_pieces_are_merged_as_defined():
    t = PieceTokenizer(stories/"tok512.bin")
    for text in [*texts(), "", " ", "naïve ✓\n\n  two  spaces", "<s>"]:
        ids = [i for o in (f" {text}" if text else "")
               for i in ([t.ids[o.encode()]] if o.encode() in t.ids else [b + 3 for b in o.encode()])]
        while unions := [(-t.scores[t.ids[o]], i, t.ids[o]) for i in range(len(ids) - 1)
                         if (o := t.pieces[ids[i]] + t.pieces[ids[i + 1]]) in t.ids]:
            _, i, new = min(unions)
            ids[i:i + 2] = [new]
        assert t.encode(text) == [1, *ids] and t.decode(t.encode(text)) == text


@needs_models
def test_stories_heads():
    model, pieces = open_model(stories)
    x = torch.randint(259, 512, (50, 50), generator=torch.Generator().manual_seed(0))
    twice = torch.cat([torch.ones(50, 1, dtype=torch.long), x, x], 1)
    scores = previous_token(model, [twice])
    assert sorted(scores, key=scores.get)[:-4:-1] == ["L3H6", "L1H3", "L1H6"]
    for head, share in {"L3H6": .75, "L1H3": .63, "L1H6": .52}.items(): assert abs(scores[head] - share) < .02, scores
    pattern = attention(model, given(twice))
    assert pattern.diagonal(-49, 3, 4)[..., 2:].mean((2, 3)).max() < .15 # no induction head
    # on stories it attends less
    assert .55 < previous_token(model, [torch.tensor([pieces.encode(o)]) for o in texts()])["L3H6"] < .68


@needs_models
def test_stories_own_text():
    model, pieces = open_model(stories)
    text = generate(model, pieces.bos, 64, 128, torch.Generator().manual_seed(0))
    assert text.equal(generate(model, pieces.bos, 64, 128, torch.Generator().manual_seed(0)))
    logits = model(text)[:, :-1]
    surprise = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
    expected = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert abs(surprise - expected) < .06 and 1.1 < surprise < 1.5
    assert "Once upon a time" in pieces.decode(text.flatten())


# modular addition

@needs_models
def test_modular_addition():
    model, tokenizer = open_model(modular, act_fn="relu", normalization_type=None)
    assert tokenizer is None
    x, y = torch.cartesian_prod(torch.arange(113), torch.arange(113)).T
    tokens, answer = torch.stack([x, y, torch.full_like(x, 113)], 1), (x + y) % 113
    logits = model(tokens)
    assert logits.shape == (12769, 3, 113) and (logits[:, -1].argmax(-1) == answer).all()
    assert adds_up(model, tokens) < 1e-4
    assert abs(F.cross_entropy(logits[:, -1].double(), answer).item()/1.5852e-7 - 1) < .001
    s = {k: v.double() for k, v in load_file(modular/"model.safetensors").items()}
    h = s["embed.W_E"][tokens] + s["pos_embed.W_pos"]
    q, k, v = (torch.einsum("bpd,hde->bhpe", h, s[f"blocks.0.attn.W_{o}"]) + s[f"blocks.0.attn.b_{o}"][:, None]
               for o in "QKV")
    pattern = (q@k.mT/32**.5).masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf).softmax(-1)
    h = h + torch.einsum("bhpe,hed->bpd", pattern@v, s["blocks.0.attn.W_O"]) + s["blocks.0.attn.b_O"]
    h = h + (h@s["blocks.0.mlp.W_in"] + s["blocks.0.mlp.b_in"]).relu()@s["blocks.0.mlp.W_out"] + s["blocks.0.mlp.b_out"]
    wanted = h@s["unembed.W_U"] + s["unembed.b_U"]
    assert (logits - wanted).abs().max() < 1e-3
    assert (model.to(torch.float64, print_details=False)(tokens) - wanted).abs().max() < 1e-10
    power = torch.fft.rfft(s["embed.W_E"][:113], dim=0).abs().pow(2).sum(-1)[1:]
    top = (power/power.sum()).topk(3)
    assert (top.indices + 1).tolist() == [16, 30, 56] and (top.values - torch.tensor([.35, .31, .24])).abs().max() < .01


# models made here, so that these run everywhere

@pytest.fixture
def gpt(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=14, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=10,
                               eos_token_id=12, pad_token_id=13)).save_pretrained(tmp_path/"gpt")
    return tmp_path/"gpt"


@pytest.fixture
def state():
    g = torch.Generator().manual_seed(0)
    shapes = {"embed.W_E": (7, 16), "pos_embed.W_pos": (5, 16), "unembed.W_U": (16, 6), "unembed.b_U": (6,),
              "ln_final.w": (16,), "ln_final.b": (16,)}
    for i in range(2):
        shapes |= ({f"blocks.{i}.attn.W_{o}": (2, 16, 8) for o in "QKV"}
                   | {f"blocks.{i}.attn.b_{o}": (2, 8) for o in "QKV"})
        shapes |= {f"blocks.{i}.{k}": v for k, v in {"attn.W_O": (2, 8, 16), "attn.b_O": (16,), "ln1.w": (16,),
                                                     "ln1.b": (16,), "ln2.w": (16,), "ln2.b": (16,),
                   "mlp.W_in": (16, 24), "mlp.b_in": (24,), "mlp.W_out": (24, 16), "mlp.b_out": (16,)}.items()}
    return {k: torch.randn(v, generator=g) for k, v in shapes.items()}


def refused(source, **config):
    "The one line with which a model is refused."
    with pytest.raises(ValueError) as e: open_model(source, **config)
    assert "\n" not in str(e.value) and str(source).split("/")[-1] in str(e.value), str(e.value)
    return str(e.value)


def test_bundled_and_saved(tmp_path):
    model, _, config = load_model("induction")
    save_model(model, tmp_path/"mine", config)
    assert fingerprint(open_model("induction")[0]) == fingerprint(open_model(tmp_path/"mine")[0]) == fingerprint(model)
    assert "has its own configuration: leave out act_fn" in refused(tmp_path/"mine", act_fn="relu")


def test_a_folder_brings_its_tokenizer(gpt):
    from tokenizers import Tokenizer as Fast, models as kinds, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    assert open_model(gpt)[1].vocab == Tokenizer(10).vocab and open_model(gpt)[0].tokenizer is None
    fast = Fast(kinds.WordLevel({o: i for i, o in enumerate("abcdefghijklmn")}, unk_token="n"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="k", eos_token="m", pad_token="n",
                            unk_token="n").save_pretrained(gpt)
    model, tokenizer = open_model(gpt)
    assert tokenizer.encode("c a b", add_special_tokens=False) == [2, 0, 1]
    assert model(torch.tensor([[2, 0, 1]])).equal(model("c a b", prepend_bos=False))


def test_state_dict_with_layer_norm(tmp_path, state):
    for name, save in (("a.safetensors", save_file), ("a.pth", torch.save)): save(state, tmp_path/name)
    tokens = torch.randint(0, 7, (8, 5), generator=torch.Generator().manual_seed(0))
    x = state["embed.W_E"][tokens] + state["pos_embed.W_pos"]
    def norm(x, name): return F.layer_norm(x, (16,), state[f"{name}.w"], state[f"{name}.b"])
    for i in range(2):
        s = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items()}
        q, k, v = (torch.einsum("bpd,hde->bhpe", norm(x, f"blocks.{i}.ln1"), s[f"attn.W_{o}"])
                   + s[f"attn.b_{o}"][:, None] for o in "QKV")
        pattern = (q@k.mT/8**.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1)
        x = x + torch.einsum("bhpe,hed->bpd", pattern@v, s["attn.W_O"]) + s["attn.b_O"]
        x = x + F.gelu(norm(x, f"blocks.{i}.ln2")@s["mlp.W_in"] + s["mlp.b_in"])@s["mlp.W_out"] + s["mlp.b_out"]
    wanted = norm(x, "ln_final")@state["unembed.W_U"] + state["unembed.b_U"]
    first, second = (open_model(tmp_path/o, act_fn="gelu")[0] for o in ("a.safetensors", "a.pth"))
    assert (first(tokens) - wanted).abs().max() < 1e-3 and fingerprint(first) == fingerprint(second)
    (tmp_path/"folder").mkdir()
    shutil.copy(tmp_path/"a.pth", tmp_path/"folder")
    (tmp_path/"folder"/"config.json").write_text('{"act_fn": "gelu"}')
    assert fingerprint(open_model(tmp_path/"folder")[0]) == fingerprint(first)
    assert "2 weight files (a.pth, a.safetensors)" in refused(tmp_path, act_fn="gelu")


def test_state_dicts_that_do_not_fit(tmp_path, state):
    def broken(name, **change):
        save_file({k: v.contiguous() for k, v in (state | change).items() if v is not None}, tmp_path/name)
        return refused(tmp_path/name, act_fn="relu")
    assert "does not fit together" in broken("hole.safetensors", **{"blocks.1.mlp.W_in": None})
    assert "does not fit together" in broken("shape.safetensors", **{"blocks.1.attn.W_Q": torch.zeros(1, 16, 16)})
    assert "does not fit together" in broken("extra.safetensors", **{"blocks.0.attn.rotary_sin": torch.zeros(5, 8)})
    assert "has no pos_embed.W_pos" in broken("rotary.safetensors", **{"pos_embed.W_pos": None})
    save_file({"weight": torch.zeros(2)}, tmp_path/"other.safetensors")
    assert "has no embed.W_E" in refused(tmp_path/"other.safetensors")


class Trap:
    "What a pickle may hold: it makes a folder when it is executed."
    def __init__(self, folder): self.folder = folder

    def __reduce__(self): return os.mkdir, (str(self.folder),)


def test_no_pickle_is_executed(tmp_path, gpt, state):
    sprung = tmp_path/"sprung"
    torch.save({"embed.W_E": Trap(sprung)}, tmp_path/"trap.pth")
    assert "cannot be read as tensors" in refused(tmp_path/"trap.pth")
    (gpt/"model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Trap(sprung)}, gpt/"pytorch_model.bin")
    assert "cannot be opened as a causal language model" in refused(gpt)
    shutil.copy(tmp_path/"trap.pth", tmp_path/"trap.bin")
    assert "has no llama2.c header" in refused(tmp_path/"trap.bin")
    assert not sprung.exists()
    torch.load(tmp_path/"trap.pth", weights_only=False) # the trap works
    assert sprung.exists()


def test_damaged_files(tmp_path, gpt, state):
    save_file(state, tmp_path/"a.safetensors")
    torch.save(state, tmp_path/"a.pth")
    for name in ("a.safetensors", "a.pth"):
        for size in (0, 5, 1000, (tmp_path/name).stat().st_size - 1):
            (tmp_path/f"cut-{name}").write_bytes((tmp_path/name).read_bytes()[:size])
            assert "cannot be read as tensors" in refused(tmp_path/f"cut-{name}", act_fn="relu")
    torch.save([torch.zeros(2)], tmp_path/"list.pth")
    assert "holds more than named tensors" in refused(tmp_path/"list.pth")
    whole = (gpt/"model.safetensors").read_bytes()
    (gpt/"model.safetensors").write_bytes(whole[:-1])
    assert "cannot be opened as a causal language model" in refused(gpt)
    (gpt/"config.json").write_text('{"model_type": "gpt2"')
    assert "is no JSON" in refused(gpt)
    (gpt/"config.json").write_text('{"model_type": "no-such-model"}')
    assert "cannot be opened as a causal language model" in refused(gpt)


def test_damaged_llama(tmp_path):
    for name, data in dict(empty=b"", short=b"\0"*20, zeros=b"\0"*400,
                           magic=struct.pack("<7i", 0x616b3432, 1, 64, 172, 5, 8, 4) + b"\0"*400).items():
        (tmp_path/f"{name}.bin").write_bytes(data)
        said = refused(tmp_path/f"{name}.bin")
        assert "has no llama2.c header" in said or "its header asks for" in said
    for data in (b"", b"\5\0\0\0" + struct.pack("<fi", 0., 9) + b"abc", b"\5\0\0\0" + struct.pack("<fi", 0., -1),
                 b"\5\0\0\0" + struct.pack("<fi", 0., 1) + b"a"):
        (tmp_path/"tok.bin").write_bytes(data)
        with pytest.raises(ValueError, match="tok.bin is no llama2.c tokenizer"): PieceTokenizer(tmp_path/"tok.bin")


def test_names_that_are_nothing(tmp_path):
    for name in ("inductoin", str(tmp_path/"nothing"), "a b"):
        said = refused(name)
        assert f"unknown model {name!r}: use one of " in said
        assert "a folder or weight file that exists, or a hub id, which needs a network" in said
    assert "holds no weight file" in refused(tmp_path)
