"Temporal sparse autoencoders: planted latents; speed, memory and smoothness beside the public code."
import math, os, subprocess, sys, time, types
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from subspace_circuits.bench import figure, side_by_side
from subspace_circuits.decompositions.saes import (
    SAE, PlantedSequences, planted_sequences, start_sae, with_threshold)
from subspace_circuits.decompositions.temporal_evaluation import contexts_of, evaluate_sae, smoothness
from subspace_circuits.decompositions.temporal_losses import token_sequences
from subspace_circuits.decompositions.temporal_runs import planted_scores
from subspace_circuits.decompositions.temporal_training import SAETrainer, check_options, preset_settings, train_sae
from subspace_circuits.files import read_tensors, write_tensors

PUBLIC = "dictionary_learning/dictionary_learning"
SHAPE = dict(d=512, latents=4096, k=20) # At which the public trainer was measured
METHODS = "batchtopk", "matryoshka", "temporal"
PLANTED = "temporal-sae-planted" # The settings that planted figures are taken with


def benchmark_temporal(
    reference:Path|None=None, # A checkout of the public repository
    log:Path|None=None, # Comparisons on language models, kept as JSON
    quick:bool=False, # One seed, small shapes
)->Iterator[dict]: # What was measured, with its bar
    "Measure what the pages on temporal sparse autoencoders promise."
    yield from planted_figures(1 if quick else 5, 300 if quick else None)
    if log: yield from language_figures(log)
    yield from smoothness_figures(reference, 4 if quick else 20, bars=not quick)
    yield from speed_figures(reference, (256,) if quick else (2048, 8192), 1 if quick else 3, bars=not quick)


# ## Planted latents

def planted_methods(seed:int, steps:int|None=None)->tuple[PlantedSequences, dict[str, SAE], PlantedSequences]:
    "The three methods at equal k on the documents of a seed; beside them what does nothing; other documents."
    given = preset_settings(PLANTED)
    planted = planted_sequences(**given.pop("planted"), seed=seed)
    given |= dict(seed=seed) | (dict(steps=steps) if steps else {})
    test = planted_sequences(documents=100, seed=seed + 100_000, directions=seed, **_same(preset_settings(PLANTED)))
    train = token_sequences(planted.h, planted.document, "planted")
    own = dict(batchtopk=dict(temporal="none", groups=[1.], group_weights=None), matryoshka=dict(temporal="none"),
               temporal={})
    found = {k: train_sae(train, **given | own[k]) for k in METHODS}
    groups, d = found["temporal"].groups, planted.h.shape[1]
    nothing = start_sae("planted", d, sum(groups), torch.Generator().manual_seed(seed + 7), given["k"], groups)
    found["untrained"] = with_threshold(nothing._replace(b_dec=planted.h.mean(0)), planted.h)
    found["PCA"] = _pca(planted.h, groups, given["k"])
    return planted, found, test


def _same(settings): return {k: v for k, v in settings["planted"].items() if k != "documents"}


def _pca(h, groups, k):
    "Principal components of both signs as latents, the first in the high split."
    n, mean = sum(groups), h.mean(0)
    V = torch.linalg.svd(h - mean, full_matrices=False)[2]
    W = torch.cat([V, -V], 1).view(-1, h.shape[1])[:n]
    W = torch.cat([W, F.normalize(torch.randn(max(0, n - len(W)), h.shape[1],
                                              generator=torch.Generator().manual_seed(0)), dim=1)])
    return with_threshold(SAE("planted", "batchtopk", k, groups, W.T.contiguous(), torch.zeros(n), W, mean), h)


def planted_figures(seeds:int=5, steps:int|None=None)->Iterator[dict]:
    "Which split has the slow latents, how smooth it is, at which reconstruction."
    smoother, close, alive, high, low = [], [], [], [], []
    for seed in range(seeds):
        planted, found, test = planted_methods(seed, steps)
        rows = token_sequences(test.h, test.document, "planted")
        o = {k: evaluate_sae(v, rows) | planted_scores(v, planted) for k, v in found.items()}
        rough = {k: o[k]["smoothness"]["group 0"]["tv_share"] for k in o}
        for k in o:
            lip = o[k]["smoothness"]["group 0"].get("lipschitz_free", math.nan)
            at = ", ".join(f"{n} in {'high' if i == 0 else 'low'} {o[k].get(f'{n} in group {i}', 0):.2f}"
                           for n in ("slow", "fast") for i in (0, 1))
            yield figure(f"seed {seed}, {k}: {at}; alive {o[k]['alive']:.2f}, {o[k]['l0']:.2f} active, explains "
                         f"{o[k]['fve']:.3f}, Lipschitz without scale {lip:.1f}; variation of the high split", rough[k],
                         "of activity")
        smoother.append(rough["temporal"] < min(rough["matryoshka"], rough["batchtopk"]))
        close.append(min(o["temporal"]["fve"] - o[k]["fve"] for k in METHODS[:2]))
        alive.append(o["temporal"]["alive"])
        high.append(o["temporal"]["slow in group 0"])
        low.append(o["temporal"]["slow in group 1"])
    bars = steps is None
    def told(what, value, unit, bar, held): return figure(what, value, unit, bar*bars, held if bars else None)
    yield told(f"seeds of {seeds} on which T-SAE's high split is smoother than both", sum(smoother), "", f"{seeds}",
               all(smoother))
    yield told("variance explained, T-SAE less the better of both, worst seed", min(close), "", "-.02 or more",
               min(close) >= -.02)
    yield told("slow latents in the high split (cosine .95), mean over seeds", sum(high)/seeds, "", "1", min(high) == 1)
    yield told("slow latents in the low split", sum(low)/seeds, "", "0", max(low) == 0)
    yield told("latents alive, worst seed", min(alive), "", ".85 or more", min(alive) >= .85)


# ## Language models

MODULES = ("email", "asyncio", "http", "statistics", "decimal", "unittest", "argparse", "logging", "multiprocessing",
           "collections", "urllib", "xml") # Whose documentation is read, a topic each


def docstring_texts(modules:tuple[str, ...]=MODULES)->dict[str, str]:
    "What Python's standard library says of itself, module by module: texts that every machine has."
    import importlib, inspect, pkgutil
    out = {}
    for name in modules:
        found, parts, seen = [top := importlib.import_module(name)], [], set()
        for o in pkgutil.iter_modules(getattr(top, "__path__", [])):
            if o.name.startswith("_"): continue
            with suppress(ImportError): found.append(importlib.import_module(f"{name}.{o.name}")) # of another system
        for module in found:
            members = [module, *(o for _, o in sorted(inspect.getmembers(module)) if inspect.isclass(o)
                                 or inspect.isfunction(o))]
            for o in members:
                if not (getattr(o, "__module__", None) or getattr(o, "__name__", "")).startswith(name): continue
                inner = [v for _, v in sorted(vars(o).items()) if inspect.isfunction(v)] if inspect.isclass(o) else []
                for x in (o, *inner):
                    text = inspect.getdoc(x) if getattr(x, "__doc__", None) else None
                    if text and len(text) > 80 and text not in seen:
                        seen.add(text)
                        parts.append(text)
        out[name] = "\n\n".join(parts)
    return out


@torch.no_grad()
def documented_rows(model, tokenizer, site:str, each:int=16, length:int=96):
    "Rows of a site over documents of equal length; their documents, topics and tokens. The first position is left out."
    from subspace_circuits.activations import given, read_sites
    docs, topics = [], []
    for name, text in docstring_texts().items():
        ids = tokenizer.encode(text)
        for i in range(min(each, len(ids)//(length - 1))):
            docs.append([tokenizer.bos_token_id, *ids[i*(length - 1):(i + 1)*(length - 1)]])
            topics.append(name)
    docs = torch.tensor(docs)
    h = torch.cat([read_sites(model, given(o), [site])[site].float() for o in docs.split(8)])[:, 1:]
    return torch.as_tensor(h).as_subclass(torch.Tensor).flatten(0, 1), docs, topics


def compare_saes(h, document, test:torch.Tensor, settings:dict, seeds:int, site:str,
                 done=lambda o: None)->list[dict]:
    "The three methods on rows of a model at equal k, and an untrained dictionary; rows of `test` are held out."
    train, rows = (token_sequences(h[o], document[o], site) for o in (~test, test))
    own = dict(batchtopk=dict(temporal="none", groups=[1.], group_weights=None), matryoshka=dict(temporal="none"),
               temporal={})
    out = []
    for seed in range(seeds):
        found = {k: train_sae(train, **settings | dict(seed=seed) | own[k]) for k in METHODS}
        nothing = start_sae(site, h.shape[1], settings["latents"], torch.Generator().manual_seed(seed), settings["k"],
                            found["temporal"].groups)
        found["untrained"] = with_threshold(nothing._replace(b_dec=h[~test].mean(0)), h[~test])
        for k, sae in found.items():
            o = evaluate_sae(sae, rows)
            out.append(dict(seed=seed, method=k, fve=round(o["fve"], 4), l0=round(o["l0"], 2),
                            alive=round(o["alive"], 3),
                            **{m: round(o["smoothness"]["group 0"][m], 4) for m in
                               ("tv_share", "lipschitz", "lipschitz_free", "spectral")},
                            shuffled=round(o["shuffled"]["group 0"]["tv_share"], 4)))
            done(out[-1])
    return out


def language_figures(file:Path)->Iterator[dict]:
    "What was measured on language models, from the lines kept in a file."
    import json
    try: kept = json.loads(Path(file).read_text())
    except (OSError, ValueError) as e:
        raise ValueError(f"{file} is no JSON of comparisons ({e}): name another") from None
    for name, o in kept.items():
        by = {k: [x for x in o["runs"] if x["method"] == k] for k in (*METHODS, "untrained")}
        n = len(by["temporal"])
        better = sum(t["tv_share"] < min(m["tv_share"], b["tv_share"])
                     for t, m, b in zip(by["temporal"], by["matryoshka"], by["batchtopk"]))
        close = min(t["fve"] - max(m["fve"], b["fve"])
                    for t, m, b in zip(by["temporal"], by["matryoshka"], by["batchtopk"]))
        for k, v in by.items():
            mean = {m: sum(x[m] for x in v)/n for m in ("fve", "alive", "l0", "tv_share", "shuffled")}
            said = (f"explains {mean['fve']:.3f}, {mean['l0']:.1f} active, alive {mean['alive']:.2f}, shuffled "
                    f"{mean['shuffled']:.3f}")
            yield figure(f"{name}, {k}: {said}; variation of the high split", mean["tv_share"], "of activity")
        yield figure(f"{name}: seeds of {n} on which T-SAE is smoother than both", better, "", str(n), better == n)
        yield figure(f"{name}: variance explained less the better of both, worst seed", close, "", "-.02 or more",
                     close >= -.02)


# ## Speed and memory

def public_sae_trainer(reference:Path):
    "The public trainer's module, imported read-only: of its package nothing but what it needs is run."
    root = Path(reference)/PUBLIC
    if not (root/"trainers/temporal_sequence_top_k.py").is_file():
        raise ValueError(f"{root/'trainers'} holds no temporal_sequence_top_k.py: pass a checkout of the public "
                         f"repository temporal-saes")
    names, kept = ("dictionary_learning", "dictionary_learning.trainers"), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        for name, folder in zip(names, (root, root/"trainers")):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(folder)]
        from dictionary_learning.trainers import temporal_sequence_top_k
        return temporal_sequence_top_k
    finally: sys.dont_write_bytecode = kept


def _pairs(batch, seed=0):
    "Two tokens a document, with half of their variance in common."
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 1, SHAPE["d"], generator=g) + torch.randn(batch, 2, SHAPE["d"], generator=g)


def our_trainer(x:torch.Tensor)->SAETrainer: # From `pair token d`
    "Our trainer with the public settings."
    rows = token_sequences(x.flatten(0, 1), torch.arange(len(x)).repeat_interleave(2), "speed")
    return SAETrainer(check_options(dict(latents=SHAPE["latents"], k=SHAPE["k"], batch=len(x), steps=200_000,
                                         warmup=.005, similarity="dot", temperature=1., scale="none")), rows)


def dense_trainer(x:torch.Tensor, reference:Path|None)->object: # With `update(step, x)`
    "The public trainer, or where it is not at hand its algorithm written densely with automatic gradients."
    if reference is None: return DenseTrainer(x)
    public = public_sae_trainer(reference).TemporalMatryoshkaBatchTopKTrainer
    return public(steps=200_000, activation_dim=SHAPE["d"], dict_size=SHAPE["latents"], k=SHAPE["k"], temporal=True,
                  contrastive=True, layer=0, lm_name="", group_fractions=[.2, .8], group_weights=[.2, .8], lr=3e-4,
                  device="cpu", seed=0)


class DenseTrainer:
    "The published algorithm as one would write it: dense codes, dense logits, automatic gradients."
    def __init__(self, x):
        n, self.high = SHAPE["latents"], SHAPE["latents"]//5
        W = F.normalize(torch.randn(n, SHAPE["d"], generator=torch.Generator().manual_seed(0)), dim=1)
        self.p = [o.requires_grad_() for o in (W.T.contiguous(), torch.zeros(n), W.clone(), x[:, 0].mean(0))]
        self.optimizer = torch.optim.Adam(self.p, lr=3e-4)

    def codes(self, x):
        a = ((x - self.p[3])@self.p[0] + self.p[1]).relu()
        top = a.flatten().topk(SHAPE["k"]*len(x), sorted=False)
        return torch.zeros_like(a.flatten()).scatter(0, top.indices, top.values).view_as(a)

    def update(self, step, x):
        now, before, h = self.codes(x[:, 0]), self.codes(x[:, 1]), self.high
        part = now[:, :h]@self.p[2][:h] + self.p[3]
        whole = part + now[:, h:]@self.p[2][h:]
        logits = now[:, :h]@before[:, :h].T
        y = torch.arange(len(x))
        loss = .1*(x[:, 0] - part).square().sum(1).mean() + .4*(x[:, 0] - whole).square().sum(1).mean() + .1*(
            F.cross_entropy(logits, y) + F.cross_entropy(logits.T, y))/2
        loss.backward()
        W = self.p[2]
        with torch.no_grad(): W.grad -= (W.grad*W).sum(1, keepdim=True)*W
        torch.nn.utils.clip_grad_norm_(self.p, 1.)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad(): W.copy_(F.normalize(W, dim=1))
        return loss.item()


def speed_figures(reference:Path|None, batches:tuple, rounds:int=3, bars:bool=True)->Iterator[dict]:
    "TokenPairs a second in turns in one process, and the memory of a process of its own for each."
    name = "the public trainer" if reference else "its algorithm, dense"
    for batch in batches:
        x = _pairs(batch)
        ours, theirs, step = our_trainer(x), dense_trainer(x, reference), iter(range(10**9))
        seconds = side_by_side({"ours": ours.advance, "theirs": lambda: theirs.update(next(step), x)}, rounds)
        del ours, theirs
        ratio = seconds["theirs"]/seconds["ours"]
        yield figure(f"batch {batch}: pairs a second, {name}", batch/seconds["theirs"], "/s")
        yield figure(f"batch {batch}: pairs a second, ours", batch/seconds["ours"], "/s")
        yield figure(f"batch {batch}: ratio", ratio, "x", "2x"*bars, ratio >= 2 if bars else None)
    batch = batches[-1]
    mb = {k: step_memory(k, batch, reference) for k in ("ours", "theirs")}
    share = mb["ours"]/mb["theirs"]
    yield figure(f"batch {batch}: peak memory, ours", mb["ours"], "MB")
    yield figure(f"batch {batch}: peak memory, {name}", mb["theirs"], "MB")
    yield figure(f"batch {batch}: share of its memory", share, "", "at most .5"*bars, share <= .5 if bars else None)


def step_memory(who:str, batch:int, reference:Path|None)->float: # MB
    "Peak memory of a fresh process that takes two steps."
    code = ("import sys; from pathlib import Path; from subspace_circuits.bench import temporal as t; "
            "x = t._pairs(int(sys.argv[2])); ref = Path(sys.argv[3]) if sys.argv[3] else None\n"
            "o = t.our_trainer(x) if sys.argv[1] == 'ours' else t.dense_trainer(x, ref)\n"
            "for i in range(2): o.advance() if sys.argv[1] == 'ours' else o.update(i, x)\n"
            "print(int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])/1e3)")
    done = subprocess.run([sys.executable, "-c", code, who, str(batch), str(reference or "")], check=True,
                          capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    return float(done.stdout.split()[-1])


# ## Smoothness

def smoothness_loop(f:torch.Tensor, x:torch.Tensor, groups:tuple[int, ...])->dict[str, dict[str, float]]:
    "The published formulas for one context, written as loops over time."
    ends, out = np.cumsum((0, *groups)), {}
    parts = {"all": f} | {f"group {i}": f[:, a:b] for i, (a, b) in enumerate(zip(ends, ends[1:]))}
    for name, z in parts.items():
        tv = sum((z[t] - z[t - 1]).abs().sum() for t in range(1, len(z)))
        z = z[:, z.sum(0) != 0]
        slope = torch.stack([(z[t] - z[t - 1]).abs()/(x[t] - x[t - 1]).norm() for t in range(1, len(z))])
        power = torch.fft.rfft(z, dim=0).abs()**2
        cut, detail, rest = int(.5*len(power)), 0., z
        for _ in range(3):
            if len(rest) < 2: break
            rest = rest[:len(rest)//2*2]
            even, odd = rest[::2], rest[1::2]
            detail, rest = detail + (((even - odd)/2)**2).sum(), (even + odd)/2
        scale = max(o for o in (1, 2, 4, 8) if o < len(z))
        fine, coarse = ((z[o:] - z[:-o]).var(0).mean() for o in (1, scale))
        out[name] = dict(tv=float(tv), lipschitz=float(slope.max(0).values.mean()),
                         spectral=float((power[cut:].sum(0)/(power[:cut].sum(0) + 1e-10)).mean()),
                         haar=float(detail/((rest**2).sum() + 1e-10)), multiscale=float(fine/(coarse + 1e-10)))
    return out


def planted_codes(contexts:int, length:int=128, latents:int=4096, seed:int=0):
    """Sparse codes of random documents, about twenty of a row's latents active, and what they decode to. How often a
    latent is active falls as one over its rank, as word frequencies do."""
    from scipy import sparse
    g, n = np.random.default_rng(seed), contexts*length*25
    share = 1/(1 + np.arange(latents))
    col = g.permutation(latents)[g.choice(latents, n, p=share/share.sum())]
    f = sparse.csr_matrix((g.random(n, np.float32) + .1, (np.arange(n)//25, col)), (contexts*length, latents))
    f.data = np.minimum(f.data, 1.1) # a latent that was drawn twice
    W = torch.from_numpy(g.standard_normal((latents, 64)).astype(np.float32))
    return f, torch.from_numpy(f@W.numpy()), torch.arange(contexts).repeat_interleave(length)


def smoothness_figures(reference:Path|None, contexts:int=20, bars:bool=True)->Iterator[dict]:
    "All measures at once against loops over time, by value and by time."
    groups, length = (3276, 13108), 128 # as the published dictionary is cut
    f, x, document = planted_codes(contexts, length, sum(groups))
    dense = torch.from_numpy(f.toarray())
    at = contexts_of(document, length)
    def loops(): return [smoothness_loop(dense[a:b], x[a:b], groups) for a, b in at]
    theirs, ours = loops(), smoothness(f, x, document, groups, length)
    worst = max(abs(sum(o[k][m] for o in theirs)/contexts/ours[k][m] - 1) for k in ours for m in theirs[0][k])
    yield figure("smoothness: largest relative difference from the loops' numbers", worst, "", "1e-5", worst <= 1e-5)
    runs = dict(ours=lambda: smoothness(f, x, document, groups, length))
    name = "loops of the same formulas"
    if reference: runs["theirs"], name = _public_loops(reference, dense, x, at, groups), "the public loops"
    else: runs["theirs"] = loops
    seconds = side_by_side(runs, 3)
    ratio = seconds["theirs"]/seconds["ours"]
    yield figure(f"smoothness: {name} take as long as ours", ratio, "times", "20"*bars, ratio >= 20 if bars else None)


def _public_loops(reference, dense, x, at, groups):
    "The public functions of one context, read from their file without the libraries that file imports."
    import ast
    file = Path(reference)/PUBLIC/"evaluation.py"
    tree, wanted = ast.parse(file.read_text()), ("smoothness_tv", "lipschitz_cont", "fft_smoothness",
                                                 "multiscale_smoothness", "wavelet_smoothness")
    tree.body = [o for o in tree.body if isinstance(o, ast.FunctionDef) and o.name in wanted]
    kind = type("Grouped", (), {})
    space = dict(t=torch, TemporalMatryoshkaBatchTopKSAE=kind, MatryoshkaBatchTopKSAE=kind)
    exec(compile(tree, str(file), "exec"), space)
    sae = kind()
    sae.group_sizes = torch.tensor(groups)
    def run():
        for a, b in at:
            space["lipschitz_cont"](x[a:b], dense[a:b], sae)
            for name in wanted:
                if name != "lipschitz_cont": space[name](dense[a:b], sae)
    return run
