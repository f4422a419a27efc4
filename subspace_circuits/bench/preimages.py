"Index, search and shading timed over a model's own tokens, and the explorer's page in a browser."
import json, time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from subspace_circuits.activations import ActivationStore, capture
from subspace_circuits.bench import figure
from subspace_circuits.bench.browser import Browser, find_browser
from subspace_circuits.bench.capture import small_llama
from subspace_circuits.explorer import Explorer, chosen_rows, start_server, static_page
from subspace_circuits.models import open_model
from subspace_circuits.preimages import METRICS, build_indexes, document_rows, search_index, similarities, within
from subspace_circuits.stability import baseline_partition
from subspace_circuits.text import Samples, start_id


def benchmark_preimages(
    model:str|None=None, # What `open_model` takes, with a tokenizer; if not given, random weights like stories260K
    rows:int=10**6, # Of the store
    quick:bool=False, # Few rows
    store:str|Path|None=None, # A store of the model that is there already
): # Yields what was measured, with its bar
    "Measure the index and the explorer on tokens the model draws itself."
    net, tokenizer = open_model(model) if model else (small_llama(64, 5, 8, 172, 512, 512).requires_grad_(False), None)
    rows, length = 20_000 if quick else rows, min(64 if quick else 512, net.cfg.n_ctx)
    sequences, site = min(256, -(-rows//length)), f"blocks.{net.cfg.n_layers//2}.hook_resid_post"
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        store = (ActivationStore(store) if store
                 else capture(net, Samples(net, start_id(tokenizer) or 0), [site], folder/"store",
                              -(-rows//(length*sequences)), sequences, (0, length)))
        d, h = net.cfg.d_model, store.rows(store.sites[0], torch.arange(0, len(store), len(store)//10_000))
        partition = baseline_partition(h, store.sites[0], [d//2, d - d//2], "pca")
        yield figure("threads of torch", torch.get_num_threads(), "")
        yield from _index_figures(store, partition, folder/"index")
        explorer = Explorer([build_indexes(store, partition, folder/"index", exact=min(2**17, len(store)//2))], net,
                            tokenizer, model or "random weights")
        size = len(static_page(explorer, chosen_rows(explorer, 6), shadings=()).encode())/1e6
        yield figure("static page of 6 queries, not shaded", size, "MB", "below 5", size < 5)
        ids = store.rows("token", torch.arange(40)).long()
        text = tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids.tolist()))
        if find_browser(): yield from _page_figures(explorer, text, 1 if quick else 5)
        else: yield figure("browser: none on this machine, so the page was not timed", 0, "")
        yield from _shading_figures(explorer)


def _index_figures(store, partition, folder, seed=1):
    "Seconds to build, and queries one by one, in each subspace and measure."
    start = time.perf_counter()
    indexes = build_indexes(store, partition, folder, exact=min(2**17, len(store)//2))
    rate = len(store)*len(indexes)*len(METRICS)/(time.perf_counter() - start)
    yield figure(f"index build, {len(store):,} rows, {len(indexes)} subspaces, 2 measures", rate, "rows/s",
                 "at least 200,000", rate >= 200_000)
    document = store.column("document")
    rows = torch.randperm(len(store), generator=torch.Generator().manual_seed(seed))[:200]
    for name, index in indexes.items():
        for metric in METRICS:
            asked, spent, found = [(index.rows[o], document_rows(document, int(o))) for o in rows], [], []
            for z, own in asked:
                start = time.perf_counter()
                found.append(search_index(index, z, 20, metric, own))
                spent.append(1000*(time.perf_counter() - start))
            right = [_share_right(o, similarities(index, z, metric), metric, own) for o, (z, own) in zip(found, asked)]
            median, late, recall = sorted(spent)[100], sorted(spent)[197], sum(right)/len(right)
            at = f"{name} of {index.rows.shape[1]} dimensions, {metric}"
            yield figure(f"query p50, {at}", median, "ms", "below 10", median < 10)
            yield figure(f"query p99, {at}", late, "ms", "below 50", late < 50)
            yield figure(f"recall, {at}, {index.about[metric]['probes']} of {index.about[metric]['cells']} cells",
                         recall, "", "at least .99", recall >= .99)


def _share_right(found, values, metric, own):
    "Share of found rows that are as near as the last true one."
    true = within(values, -1. if metric == "cosine" else torch.inf, metric, 20, own)
    last = true.value[-1]
    right = found.value >= last - 1e-5 if metric == "cosine" else found.value <= last*(1 + 1e-4) + 1e-4
    return right.float().sum().item()/len(true.row)


_ACTS = {"next subspace": "step(1)", "next query": "document.querySelectorAll('.context')[3].click()",
         "threshold": "go({threshold: '0.5'})",
         "typed text": "go({text: TEXT, row: '', at: ''})", "shading, typed text": "go({shading: 'frozen'})",
         "side by side": "go({shading: 'off', other: here().subspaces[0].name})"}
_TIMED = """new Promise(done => { const start = performance.now(); ACT;
const drawn = () => requestAnimationFrame(() => done(performance.now() - start));
const look = () => READY ? drawn() : setTimeout(look, 1); look(); })"""


def _page_figures(explorer, text, rounds):
    "First paint, and from each act to the drawn answer, in a browser."
    server, paints, spent = start_server(explorer), [], {k: [] for k in _ACTS}
    try:
        for i in range(rounds):
            with Browser() as page:
                page.open(f"http://127.0.0.1:{server.server_port}/#row={(7919*i + 300) % len(explorer.store)}")
                page.wait("document.body.dataset.turn && performance.getEntriesByName('first-contentful-paint').length")
                paints.append(page.run("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
                for k, act in _ACTS.items():
                    ready = ("document.body.dataset.shaded === String(latest)" if k.startswith("shading")
                             else "document.body.getAttribute('aria-busy') === 'false'")
                    typed = f"{text} {i}" if explorer.tokenizer is None else text
                    script = _TIMED.replace("READY", ready).replace("ACT", act.replace("TEXT", json.dumps(typed)))
                    spent[k].append(page.run(script))
    finally: server.stop()
    paint = max(paints)/1000
    yield figure(f"first paint of the local page, slowest of {rounds}", paint, "s", "below 2", paint < 2)
    for k, v in spent.items():
        o = sorted(v)[len(v)//2]
        yield figure(f"interaction, {k}", o, "ms", "below 300", o < 300)


def _shading_figures(explorer, row=300):
    "A long text and its nearest: no bar, they appear one after the other."
    name = list(next(iter(explorer.sites.values())))[0]
    near = [o["row"] for o in explorer.view(dict(row=str(row), n="4"))["neighbours"]]
    for rows, what in (([], "the query"), (near, "four contexts more")):
        start = time.perf_counter()
        explorer.attribution(dict(row=str(row), subspace=name, shading="frozen"), rows)
        tokens = sum(len(explorer.kept["text", o][0]) for o in (rows or [row]))
        yield figure(f"shading {what}, {tokens} tokens together", 1000*(time.perf_counter() - start), "ms")
