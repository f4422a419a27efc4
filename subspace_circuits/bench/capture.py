"What a store costs over the forward pass alone: tokens per second, memory, opening and batches."
import os, re, resource, subprocess, sys, threading, time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable

import torch
from torch import nn

from subspace_circuits.bench import figure, side_by_side
from subspace_circuits.files import sha256, write_json
from subspace_circuits.toy_models import Task
from subspace_circuits.activations import ActivationStore, capture, given, moments, save_shard, stream_sites
from subspace_circuits.models import open_model


class RandomTask(Task):
    "Random tokens, as a task."
    name, args, lengths = "random", {}, (64, 64)
    def __init__(self, d_vocab): self.d_vocab = d_vocab
    def sample(self, n, lengths, generator, n_ctx=None):
        return given(torch.randint(0, self.d_vocab, (n, lengths[1]), generator=generator))

def capture_speed(
    model:nn.Module, # A TransformerLens model
    batch:int, length:int, # Sequences of a shard, and their length
    rounds:int=5, # Times each, in turns
    shards:int=4, # Captured each time
)->dict[str, float]: # Tokens per second: of bare forward passes, and of capturing some sites of the same tokens
    "Compare a capture with running the model."
    task, stream = RandomTask(model.cfg.d_vocab), stream_sites(model)
    with TemporaryDirectory() as folder:
        @torch.no_grad()
        def bare():
            for i in range(shards): model(task.sample(batch, (length, length), torch.Generator().manual_seed(i)).tokens)
        def write(sites):
            return lambda: capture(model, task, sites, Path(folder)/str(len(sites)), shards, batch, (length, length),
                                   overwrite=True)
        runs = {"forward pass": bare, "middle site": write([stream[len(stream)//2]]), "last site": write(stream[-1:]),
                "every residual site": write(stream)}
        return {k: shards*batch*length/v for k, v in side_by_side(runs, rounds).items()}


def owned_memory()->float: # MB
    "Memory of this process that is not the system's to take back; its peak of all kinds where there is no /proc."
    if not Path("/proc/self/status").exists(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])/1024

def small_llama(d_model, n_layers, n_heads, d_mlp, d_vocab, n_ctx):
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge
    return TransformerBridge.boot_native(TransformerBridgeConfig(
        d_model=d_model, n_layers=n_layers, n_heads=n_heads, d_head=d_model//n_heads, d_mlp=d_mlp, d_vocab=d_vocab,
        n_ctx=n_ctx, act_fn="silu",
        gated_mlp=True, normalization_type="RMS", seed=0, device="cpu", default_prepend_bos=False)).eval()

def peak_memory(
    rows:int, # Rows captured, then read twice
)->float: # MB
    """The most that this process owned, looked at every 5 ms, while it captured rows, read them in random order, and
    joined their moments."""
    torch.set_num_threads(1)
    model, seen, done = small_llama(16, 1, 2, 32, 64, 64), [], threading.Event()
    def watch():
        while not done.wait(.005): seen[:] = [max([owned_memory(), *seen])]
    watcher = threading.Thread(target=watch)
    watcher.start()
    with TemporaryDirectory() as folder:
        store = capture(model, RandomTask(64), ["blocks.0.hook_resid_post"], folder, shards=-(-rows//2**15),
                        sequences=512)
        for _ in store.batches(store.sites[0], 4096): pass
        moments(store, store.sites[0])
        done.set()
    watcher.join()
    return seen[0]


def linked_store(
    folder:Path, # An empty folder
    shards:int, rows:int, # Number of shards, and rows of each
    width:int, # Of its only site, `a`
    files:int=1, # Shards that are written; the others are links to them
)->Path: # The folder
    "Make a store of many shards, which are links to a few files of random numbers."
    listed, g = [], torch.Generator().manual_seed(0)
    for i in range(shards):
        file = folder/f"shard-{i:05d}.safetensors"
        if i < files:
            tensors = {"a": torch.randn(rows, width, generator=g), "token": torch.zeros(rows, dtype=torch.int32)}
            saved = save_shard(tensors, file)
            listed.append(dict(rows=rows, **saved, moments=saved))
        else:
            os.link(folder/listed[i % files]["file"], file)
            listed.append(listed[i % files] | dict(file=file.name))
    write_json(folder/"store.json", dict(format=1, capture=dict(sites=["a"]), shards=listed), "store")
    return folder

def opening_seconds(rows:int=10**7)->float:
    "Median seconds to open a store of shards of 8,192 rows, and to know its length."
    with TemporaryDirectory() as folder:
        linked_store(Path(folder), -(-rows//8192), 8192, 1)
        return side_by_side({"open": lambda: len(ActivationStore(folder))}, 11)["open"]

def hashing_speed(rows:int=2**17)->float: # GB/s, from page cache
    "What the first read of a shard costs a process, as `verify` costs each time: its bytes are hashed."
    with TemporaryDirectory() as folder:
        files = sorted(linked_store(Path(folder), rows//2**14, 2**14, 768, files=rows//2**14).glob("*.safetensors"))
        start = time.perf_counter()
        for o in files: sha256(o, again=True)
        return sum(o.stat().st_size for o in files)/(time.perf_counter() - start)/1e9

def batch_speed(
    rows:int=2**18, # Rows of the store, of width 768 in shards of 2¹⁴
    size:int=4096, # Rows of a batch
)->float: # GB/s of float32, from page cache
    "Read random batches of a store that has just been read."
    with TemporaryDirectory() as folder:
        store = ActivationStore(linked_store(Path(folder), rows//2**14, 2**14, 768, files=rows//2**14))
        for o in store.shards("a"): o.sum()
        seconds = []
        draws = store.batches("a", size, epochs=2)
        for _ in range(2*(rows//size)):
            start = time.perf_counter()
            next(draws)
            seconds.append(time.perf_counter() - start)
        return size*768*4/sorted(seconds)[len(seconds)//2]/1e9


def _speed_figures(name, model, batch, length, rounds):
    bare, *others = capture_speed(model, batch, length, rounds).items()
    yield figure(f"{name}, {bare[0]}", bare[1], "tokens/s")
    for k, v in others: yield figure(f"{name}, {k}", v/bare[1], "of the forward pass", "at least .85", v >= .85*bare[1])

def _memory_figures(sizes):
    ask = "from subspace_circuits.bench.capture import peak_memory; print(peak_memory({}))"
    peaks = [float(subprocess.run([sys.executable, "-c", ask.format(o)], stdout=subprocess.PIPE, text=True,
                                  check=True).stdout) for o in sizes]
    for n, o in zip(sizes, peaks):
        yield figure(f"peak memory, {n:,} rows", o, "MB", f"at most 1.1 of that for {sizes[0]:,}", o <= 1.1*peaks[0])

def benchmark_store(
    model:str|None=None, # What `open_model` takes; random weights in the shape of stories260K if not given
    rows:int=10**6, # Rows of the largest capture whose memory is measured
    quick:bool=False, # Fewer rounds and smaller stores
)->list[dict]: # What was measured, with its bar
    "Measure what a store promises."
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import GPT2Config, GPT2LMHeadModel
    small = open_model(model)[0] if model else small_llama(64, 5, 8, 172, 512, 512)
    torch.manual_seed(0)
    raw = GPT2LMHeadModel(GPT2Config(n_layer=2 if quick else 12,
                                     attn_implementation="eager")).eval().requires_grad_(False)
    large = build_bridge_from_module(raw, "GPT2LMHeadModel", hf_config=raw.config, tokenizer=None)
    opened, read = 1000*opening_seconds(), batch_speed(2**15 if quick else 2**18)
    return [figure("threads of torch", torch.get_num_threads(), ""),
            *_speed_figures(model or "5 layers of 64", small, 4 if quick else 32, 256, 1 if quick else 5),
            *_speed_figures(f"{raw.config.n_layer} layers of 768", large, 8, 128, 1 if quick else 3),
            *_memory_figures([10**4, 2*10**4] if quick else [o for o in (10**5, 10**6, 10**7) if o < rows] + [rows]),
            figure("opening 10,000,000 rows", opened, "ms", "below 50", opened < 50),
            figure("first read of a shard in a process, hashed", hashing_speed(2**15 if quick else 2**17), "GB/s"),
            figure("random batches of 4,096 rows of 768", read, "GB/s from page cache", "at least 1", read >= 1)]
