"""Families of transformers, tiny and random: the whole graph kept is the model, what components wrote is the stream,
and what cannot be read is refused by name."""
import pytest
import torch
import transformers

from subspace_circuits.activations import given, read_sites, stream_sites
from subspace_circuits.edges import Moments, PartitionedModel, score_edges
from subspace_circuits.forward import Weights, circuit_sites
from subspace_circuits.keep_only import KeepOnly, empty_masks
from subspace_circuits.models import open_model
from subspace_circuits.partition import Partition
from subspace_circuits.search import written

S = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
         max_position_embeddings=64)
GPT = dict(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4)
KV = S | dict(num_key_value_heads=2)
OPT = dict(vocab_size=96, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
           max_position_embeddings=64, word_embed_proj_dim=32)
LLAMA3 = dict(rope_type="llama3", rope_theta=10000., factor=8., low_freq_factor=1., high_freq_factor=4.,
              original_max_position_embeddings=16)
MIXED = ["sliding_attention", "full_attention"]

READ = {
    "gpt2": ("GPT2", GPT), "gpt2 untied": ("GPT2", GPT | dict(tie_word_embeddings=False)),
    "gpt2 scaled by layer": ("GPT2", GPT | dict(scale_attn_by_inverse_layer_idx=True)),
    "gpt_neo": ("GPTNeo", dict(vocab_size=96, max_position_embeddings=64, hidden_size=32, num_layers=2, num_heads=4,
                               attention_types=[[["global", "local"], 1]], window_size=5)),
    "opt": ("OPT", OPT), "opt without biases": ("OPT", OPT | dict(enable_bias=False,
                                                                  layer_norm_elementwise_affine=False)),
    "pythia": ("GPTNeoX", S | dict(rotary_pct=.25)), "gptj": ("GPTJ", GPT | dict(rotary_dim=4)),
    "neox in sequence": ("GPTNeoX", S | dict(rotary_pct=.5, use_parallel_residual=False)),
    "llama": ("Llama", KV), "llama with biases": ("Llama", S | dict(attention_bias=True, mlp_bias=True)),
    "llama tied": ("Llama", KV | dict(tie_word_embeddings=True)),
    "llama 3": ("Llama", KV | dict(rope_parameters=LLAMA3)),
    "qwen2": ("Qwen2", KV), "qwen3": ("Qwen3", KV | dict(head_dim=16)),
    "mistral": ("Mistral", KV | dict(sliding_window=4)),
    "gemma": ("Gemma", S | dict(num_key_value_heads=1, head_dim=16)),
    "gemma2": ("Gemma2", KV | dict(head_dim=16, sliding_window=4, attn_logit_softcapping=1., final_logit_softcapping=1.,
                                   query_pre_attn_scalar=24)),
    "gemma3": ("Gemma3Text", KV | dict(head_dim=16, sliding_window=4, query_pre_attn_scalar=24, layer_types=MIXED)),
    "phi": ("Phi", S | dict(partial_rotary_factor=.5)), "phi3": ("Phi3", S | dict(pad_token_id=0)),
    "granite": ("Granite", S | dict(embedding_multiplier=3., residual_multiplier=.5, attention_multiplier=.2,
                                    logits_scaling=2.)),
    "cohere": ("Cohere", S | dict(logit_scale=.5)), "olmo2": ("Olmo2", S), "starcoder2": ("Starcoder2", KV),
    "stablelm beside": ("StableLm", KV | dict(partial_rotary_factor=.5, use_parallel_residual=True)),
    "falcon": ("Falcon", dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)),
}
REFUSED = {
    "bloom": ("Bloom", dict(vocab_size=96, hidden_size=32, n_layer=2, n_head=4), "positions by ALiBi"),
    "mpt": ("Mpt", dict(vocab_size=96, d_model=32, n_layers=2, n_heads=4, max_seq_len=64), "positions by ALiBi"),
    "mixtral": ("Mixtral", KV | dict(num_local_experts=4), "mixtures of experts"),
    "qwen2 moe": ("Qwen2Moe", KV | dict(num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=32),
                  "mixtures of experts"),
    "mamba": ("Mamba", dict(vocab_size=96, hidden_size=32, num_hidden_layers=2), "layers without attention"),
    "apertus": ("Apertus", KV, "'xielu' neurons"),
    "olmo clipped": ("Olmo", S | dict(clip_qkv=.1), "does not answer as its weights say"),
    "dynamic turns": ("Llama", S | dict(rope_parameters=dict(rope_type="dynamic", factor=2., rope_theta=10000.)),
                      "'dynamic' rotary positions"),
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def saved(folder, family, options):
    "A tiny random model, its norms and biases random too, as its authors' library saves it; returns that."
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options)
    raw = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for p in raw.parameters(): p.add_(.1*torch.randn_like(p))
    raw.save_pretrained(folder)
    return raw


class Words:
    "Random tokens, every answer asked."
    name, lengths = "words", (20, 20)

    def sample(self, n, lengths=None, generator=None, n_ctx=None):
        batch = given(torch.randint(3, 96, (n, 20), generator=generator))
        return batch._replace(scored=torch.ones_like(batch.scored))


def random_partitions(model):
    g = torch.Generator().manual_seed(0)
    turns = {s: torch.linalg.qr(torch.randn(32, 32, generator=g))[0].split([8, 24], 1) for s in circuit_sites(model)}
    return {s: Partition({f"s{i}": o.contiguous() for i, o in enumerate(parts)}, s) for s, parts in turns.items()}


@pytest.mark.parametrize("name", READ)
def test_the_whole_graph_is_the_model(tmp_path, name):
    "And so are all edges that are scored; no site of the stream is another tensor than the raw model's."
    raw, (model, _) = saved(tmp_path, *READ[name]), open_model(tmp_path)
    task, batch = Words(), Words().sample(3, generator=torch.Generator().manual_seed(1))
    split = PartitionedModel(Moments(model, task, n=10), random_partitions(model))
    moments, partitions = split.moments, split.partitions
    want = raw(batch.tokens).logits
    assert (model(batch.tokens) - want).abs().max() < 1e-5
    edges = score_edges(split, draws=4)
    full = {k: torch.ones_like(v) for k, v in empty_masks(moments.weights, partitions).items()}
    layer_norm = moments.weights.last.kind == "LN" # then logits are known up to what is the same in all
    for kept, mode in ((full, "zero"), (full, "mean"), (full, "resample"), (edges, "zero")):
        got = KeepOnly(split, kept, mode)(batch.tokens, position_ids=batch.positions)
        a, b = (o - o.mean(-1, keepdim=True) if layer_norm else o for o in (got, want))
        assert (a - b).abs().max() < 1e-5*max(1, want.abs().max()), (mode, (a - b).abs().max())
    seen = read_sites(model, batch, moments.weights.sites)
    for site, x in moments.weights.trace(batch.tokens, batch.positions)[0].items():
        assert (x - seen[site]).abs().max() < 1e-5*max(1, x.abs().max()), site
    half = {k: torch.zeros_like(v) for k, v in full.items()}
    none = KeepOnly(split, half)(batch.tokens, position_ids=batch.positions)
    assert (none - want).abs().max() > .1


@pytest.mark.parametrize("name", READ)
def test_what_components_wrote_is_the_stream(tmp_path, name):
    saved(tmp_path, *READ[name])
    model, batch = open_model(tmp_path)[0], Words().sample(8, generator=torch.Generator().manual_seed(1))
    site = stream_sites(model)[-1]
    wrote, layers = written(model, batch, [site])[site], range(model.cfg.n_layers)
    embeddings = {"embed", "pos_embed"} if model.cfg.positional_embedding_type == "standard" else {"embed"}
    assert set(wrote) == (embeddings | {f"L{i}H{j}" for i in layers for j in range(4)} | {f"MLP{i}" for i in layers})
    stream, mean = read_sites(model, batch, [site])[site].flatten(0, 1).mean(0), sum(o.mean for o in wrote.values())
    constant = sum(o.attn.b_O for o in model.blocks if o.attn.b_O is not None)
    assert (stream - mean - constant).abs().max() < 1e-4


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, name):
    family, options, why = REFUSED[name]
    saved(tmp_path, family, options)
    with pytest.raises(ValueError, match=why) as e: Weights(open_model(tmp_path)[0])
    assert "\n" not in str(e.value)
