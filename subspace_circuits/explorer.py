"""The explorer of a run: `Explorer` answers questions about subspaces as JSON; `static_page` puts the answers to chosen
queries into one offline file; `start_server` answers a live page on 127.0.0.1; `open_run` opens what a run has written.
The notebook 02i_preimages shows all of it."""
import base64, hashlib, html, json, math, re, secrets, sys, threading, unicodedata
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from subspace_circuits.activations import ActivationStore, check_model, given, read_sites
from subspace_circuits.files import for_browser, read_json
from subspace_circuits.models import open_model
from subspace_circuits.partition import Partition
from subspace_circuits.preimages import (
    METRICS, VARIABLES, Index, attribute, build_indexes, checked_query, document_rows, index_job,
    mean_embedding, padded, search_index, similarities, similarity_histogram, text_of, within)
from subspace_circuits.text import encode_text, open_planted, start_id


BEFORE, AFTER = 40, 20 # Tokens that are read around a row: a few lines of a page
LARGEST = 5_000_000 # Bytes of a page
ASSETS = Path(__file__).parent/"assets"
ASKED = dict(site="", subspace="", other="", row="", text="", at="", metric="cosine", threshold="", n="20",
             before="12", after="6", shading="off")


class Query(NamedTuple):
    "What is looked for: a row of the store, or a place in a typed text."
    key: tuple            # What it is called in a cache
    context: dict         # As from `contexts`
    coordinates: dict     # Subspace to coordinates
    out: Tensor|None      # Rows of its own document
    text: tuple           # Tokens and positions up to it


class Explorer:
    "Questions about the subspaces of some sites, answered as JSON."
    def __init__(self,
                 indexes:list[dict[str, Index]], # From `build_indexes`, one for each site
                 model:nn.Module, tokenizer=None, # Those of the store
                 title:str="", # What is explored
    ):
        self.sites = {next(iter(o.values())).site: o for o in indexes}
        self.model, self.tokenizer, self.title = model, tokenizer, title
        self.store = next(iter(indexes[0].values())).store
        check_model(self.store, model)
        self.columns = {o: self.store.column(o).int() for o in ("document", *VARIABLES)}
        self.chance = {o: (self.columns[o] + 1).bincount()/len(self.store) for o in VARIABLES}
        self.baseline, self.kept = mean_embedding(model, self.store), OrderedDict()
        self.lock = threading.Lock() # of what is kept
        self.running = threading.RLock() # of the model, whose hooks only one may set
        self.bos = not self.store.info["capture"]["task"].endswith("without bos")

    def shown(self, *ids:list[int])->dict[str, str]:
        "Readable tokens by id."
        return {str(o): readable(self.tokenizer, o) for o in sorted({i for x in ids for i in x})}

    def _remember(self, key, make):
        "The value of a key, made once while it is among the last 4,096."
        with self.lock: found = self.kept.get(key)
        if found is None: found = make()
        with self.lock:
            self.kept[key] = found
            self.kept.move_to_end(key)
            while len(self.kept) > 4096: self.kept.popitem(last=False)
        return found

    def query(self, asked:dict)->Query: # From `check_link`
        "What is looked for."
        return _text_query(self, asked) if asked["text"] else _row_query(self, asked)

    def view(self, given:dict[str,str])->dict:
        "What a subspace sees of a query."
        return _view(self, check_link(self, given))

    def attribution(self, given:dict[str,str], rows:list[int])->dict:
        "Which tokens make some rows, and the query, similar to the query."
        return _attribution(self, check_link(self, given), rows)


def open_run(
    run:str|Path, # A folder of `subspace-circuits run`, or one with `store` and `partitions`
    model:str|None=None, # What `open_model` takes; by default the one that the run's config.json names
    overwrite:bool=False, # Replace indexes of another store or partition
)->Explorer:
    "Open a run's store, partitions and model, and index what is not indexed yet, in its folder `index`."
    run = Path(run)
    for o in ("store/store.json", "partitions"):
        if not (run/o).exists():
            raise ValueError(f"{run} holds no {o}: pass a folder that subspace-circuits run has finished, or one with "
                             f"a store and partitions")
    files = sorted(run.glob("partitions/*/partition.json"))
    if not files:
        raise ValueError(f"{run}/partitions holds no partition: subspace-circuits partition --out "
                         f"{run}/partitions/NAME writes one")
    for o in (run/"store", *files, run/"index"):
        if not o.resolve().is_relative_to(run.resolve()):
            raise ValueError(f"{o} leads out of {run}: copy it into the run")
    config = read_json(run/"config.json", "run", public=True) if (run/"config.json").exists() else {}
    if not (name := model or config.get("model")): raise ValueError(f"{run} does not name its model: pass --model")
    net, tokenizer = (known.model, None) if (known := open_planted(name)) else open_model(name)
    store = ActivationStore(run/"store")
    check_model(store, net)
    indexes = [build_indexes(store, Partition.from_pretrained(o.parent), run/"index"/o.parent.name,
                             overwrite=overwrite and _stale(store, o.parent, run/"index"/o.parent.name)) for o in files]
    order = sorted(indexes, key=lambda o: store.sites.index(next(iter(o.values())).site))
    return Explorer(order, net.eval(), tokenizer, f"{name} · {store.info['capture']['task']}")


def _stale(store, partition, folder):
    "Whether a folder holds an index of something else, or a damaged one."
    if not (folder/"index.json").exists(): return False
    try: about = read_json(folder/"index.json", "index")
    except ValueError: return True
    return any(about.get(k) != v for k, v in index_job(store, Partition.from_pretrained(partition), 2**17).items())


def static_page(
    explorer:Explorer,
    queries:list[int|str], # Rows of the store, and texts
    n:int=10, # Neighbours of each
    sites:list[str]|None=None, metrics:tuple[str,...]=METRICS, # All that are open, unless some are named
    shadings:tuple[str,...]=("frozen", "free"), # Attribution with attention as in the text, or free
    mode:str="file", # "cell" for the inside of a notebook
)->str:
    "Answer chosen queries for every subspace, in one page that needs nothing else."
    if not queries: raise ValueError("no queries: choose rows of the store, or texts")
    views, shares, tokens, chosen, sites = {}, {}, {}, [], sites or list(explorer.sites)
    asks = [(s, k, m, q) for q in queries for s in sites
            for k in explorer.sites[_choice(dict(site=s), "site", list(explorer.sites))] for m in metrics]
    for site, name, metric, query in tqdm(asks, desc="page", unit="view", disable=None):
        ask = (dict(site=site, subspace=name, metric=metric, n=str(n))
               | (dict(text=query) if isinstance(query, str) else dict(row=str(query))))
        key = json.dumps([site, name, metric, str(query)], ensure_ascii=False, separators=(",", ":"))
        view = explorer.view(ask)
        tokens |= view.pop("tokens")
        views[key] = view
        for o in shadings:
            shares[key + o] = explorer.attribution(ask | dict(shading=o), [x["row"] for x in view["neighbours"]])
        if len(chosen) < len(queries) and query not in [o["query"] for o in chosen]:
            chosen.append(dict(query=query, context=view["query"]))
    about = _about(explorer, mode, views=views, shares=shares, tokens=tokens, queries=chosen, shadings=list(shadings),
                   metrics=list(metrics), n=n)
    about["sites"] = [o for o in about["sites"] if o["site"] in sites]
    page = render_page(about)
    if len(page.encode()) >= LARGEST:
        raise ValueError(f"{len(queries)} queries make a page of {len(page.encode())/1e6:.1f} MB, the most is "
                         f"{LARGEST/1e6:.0f}: choose fewer queries, fewer neighbours, or some of the sites")
    return page


def chosen_rows(
    explorer:Explorer, n:int=6, # How many
    seed:int=0,
)->list[int]:
    "Draw rows that stand at least four tokens into a sequence."
    first = torch.randperm(len(explorer.store), generator=torch.Generator().manual_seed(seed))[:50*n]
    return [o["row"] for o in contexts(explorer.store, first.sort().values) if o["at"] >= 4][::25][:n]


def cell(
    page:str, # From `static_page` with mode="cell", or the address of a server
    height:int=760, # Pixels
)->str:
    "A frame for a notebook, around a page or a server's address."
    what = (f'src="{html.escape(page)}"' if page.startswith("http://127.0.0.1:")
            else f'srcdoc="{html.escape(page)}" sandbox="allow-scripts"')
    style = f"width: 100%; height: {height}px; border: 1px solid #ccc; border-radius: 6px"
    return f'<iframe {what} title="Explorer: what the subspaces of a model see" style="{style}"></iframe>'


def render_page(about:dict)->str: # From the explorer, with a mode: live, file or cell
    "Write the page."
    import jinja2
    script = (ASSETS/"explorer.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    env = jinja2.Environment(loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, trim_blocks=True,
                             lstrip_blocks=True)
    return env.get_template("explorer.html.jinja").render(about=for_browser(about), script=script, digest=digest)


def _about(explorer, mode, **more):
    "What a page knows before it asks."
    def subspace(name, o):
        recall = o.about.get("cosine", {}).get("recall")
        return dict(name=name, size=o.rows.shape[1], sees=o.about["sees"], recall=recall)
    sites = [dict(site=k, subspaces=[subspace(*o) for o in here.items()]) for k, here in explorer.sites.items()]
    return dict(mode=mode, title=explorer.title, rows=len(explorer.store), sites=sites, variables=list(VARIABLES),
                n_ctx=explorer.model.cfg.n_ctx, asked=ASKED, most=dict(before=BEFORE, after=AFTER, n=100)) | more


def start_server(
    explorer:Explorer, port:int=0, # 0: any that is free
)->ThreadingHTTPServer: # Runs until `stop()`, at `http://127.0.0.1:{server_port}`
    "Answer on this machine alone."
    try: return _Server(("127.0.0.1", port), type("Handler", (_Handler,), dict(explorer=explorer))).start()
    except (OSError, OverflowError) as e:
        raise ValueError(f"port {port} cannot be used ({e}): pass another, or 0 for any that is free") from None


class _Server(ThreadingHTTPServer):
    "A server in a thread of its own."
    daemon_threads = True

    def handle_error(self, *about):
        if not isinstance(sys.exception(), ConnectionError): super().handle_error(*about) # a closed page is no error

    def start(self):
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)
        self.thread.start()
        return self

    def wait(self): self.thread.join()

    def stop(self):
        self.shutdown()
        self.server_close()
        with self.RequestHandlerClass.explorer.running: pass # what is running ends first


class _Handler(BaseHTTPRequestHandler):
    "Answers of one explorer."
    explorer, protocol_version = None, "HTTP/1.1"

    def log_message(self, *_): pass

    def _send(self, status, body, kind):
        self.send_response(status)
        for k, v in {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": len(body),
                     "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store",
                     "Referrer-Policy": "no-referrer"}.items():
            self.send_header(k, str(v))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        url, port = urlsplit(self.path), self.server.server_address[1]
        here = [f"127.0.0.1:{port}", f"localhost:{port}"]
        if self.headers.get("Host") not in here or self.headers.get("Origin", f"http://{here[0]}") not in [
                f"http://{o}" for o in here]: # a page from elsewhere, under its own or a borrowed name
            return self._send(403, b"ask for 127.0.0.1", "text/plain")
        try: status, answer = 200, self._answer(url.path, dict(parse_qsl(url.query, keep_blank_values=True)))
        except ValueError as e: status, answer = 400, dict(error=str(e))
        if isinstance(answer, str): return self._send(status, answer.encode(), "text/html")
        self._send(status, json.dumps(for_browser(answer), allow_nan=False).encode(), "application/json")

    def _answer(self, path, given):
        explorer, rows = self.explorer, given.pop("rows", "")
        if path == "/": return render_page(_about(explorer, "live"))
        if path == "/view": return explorer.view(given)
        if path == "/attribution":
            if not re.fullmatch(r"(\d{1,12}(,\d{1,12})*)?", rows):
                raise ValueError(f"rows {rows[:60]!r}: use whole numbers, separated by commas")
            return explorer.attribution(given, [int(o) for o in rows.split(",") if o])
        if path == "/find":
            return find_tokens(explorer, given.get("text", ""),
                               _number(dict(after=given.get("after") or "-1"), "after", int, -1, len(explorer.store)))
        if path == "/random": return dict(row=secrets.randbelow(len(explorer.store)))
        raise ValueError(f"{path[:60]!r} is not served here: open /")


def check_link(
    explorer:Explorer, given:dict[str,str], # What a link says
)->dict: # Every field of `ASKED`, checked
    "Refuse a link that asks for what is not there."
    if unknown := sorted(set(given) - set(ASKED)):
        raise ValueError(f"{unknown[0][:60]!r} is nothing a link can say: use {', '.join(ASKED)}")
    asked = ASKED | given
    asked["site"] = asked["site"] or next(iter(explorer.sites))
    here = explorer.sites[_choice(asked, "site", list(explorer.sites))]
    asked["subspace"] = asked["subspace"] or next(iter(here))
    for o in ("subspace", "other"): _choice(asked, o, list(here), o == "other")
    _choice(asked, "metric", METRICS), _choice(asked, "shading", ("off", "frozen", "free"))
    for k, lo, hi in (("n", 1, 100), ("before", 0, BEFORE), ("after", 0, AFTER)):
        asked[k] = _number(asked, k, int, lo, hi)
    asked["threshold"] = (None if asked["threshold"] == ""
                          else _number(asked, "threshold", float, -1 if asked["metric"] == "cosine" else 0,
                                       1 if asked["metric"] == "cosine" else 1e9))
    if not asked["text"].strip():
        asked["text"], asked["row"] = "", _number(asked | dict(row=asked["row"] or "0"), "row", int, 0,
                                                  len(explorer.store) - 1)
    return asked


def _choice(asked, name, choices, unset=False):
    "One of some names."
    if asked[name] not in choices and not (unset and asked[name] == ""):
        raise ValueError(f"no {name} {asked[name][:60]!r} here: use one of {', '.join(choices)}")
    return asked[name]


def _number(asked, name, kind, lo, hi):
    "A number within bounds."
    try: value = kind(asked[name])
    except ValueError: value = math.nan
    if not lo <= value <= hi: raise ValueError(f"{name} {asked[name][:60]!r}: use a number from {lo} to {hi}")
    return value


def _row_query(explorer, asked):
    "A row of the store."
    row, here = asked["row"], explorer.sites[asked["site"]]
    context = contexts(explorer.store, torch.tensor([row]))[0]
    text = explorer._remember(("text", row), lambda: text_of(explorer.store, row))
    return Query(("row", row), context, {k: o.rows[row] for k, o in here.items()},
                 document_rows(explorer.columns["document"], row), text)


def _text_query(explorer, asked):
    "A place in a typed text; the model is run on it."
    ids = encode_query(explorer.tokenizer, asked["text"], explorer.model.cfg.n_ctx, explorer.bos)
    if not ids or max(ids) >= explorer.model.cfg.d_vocab:
        raise ValueError(f"ids up to {max(ids, default=0)}: this model has {explorer.model.cfg.d_vocab}")
    at = len(ids) - 1 if asked["at"] == "" else _number(asked, "at", int, 0, len(ids) - 1)
    def run():
        with explorer.running:
            return {k: v[0] for k, v in read_sites(explorer.model, given(torch.tensor([ids])),
                                                   list(explorer.sites)).items()}
    h = explorer._remember(("typed", *ids), run)
    context = dict(row=None, document=None, position=at, ids=ids, at=at)
    where = {k: o.coordinates(h[asked["site"]][at]) for k, o in explorer.sites[asked["site"]].items()}
    return Query(("typed", *ids, at), context, where, None, (torch.tensor(ids[:at + 1]), torch.arange(at + 1)))


def encode_query(
    tokenizer, text:str, # As typed
    n_ctx:int, # Tokens that the model takes
    bos:bool=True, # Start with the tokenizer's marker, as sequences of the store do
)->list[int]:
    "Turn a typed text into ids, or say why it cannot be run."
    if tokenizer is None:
        if bad := [o for o in text.split() if not o.isdigit()]:
            raise ValueError(f"{bad[0][:60]!r} is no id, and this model has no tokenizer: type ids, separated by "
                             f"spaces")
        ids = [int(o) for o in text.split()]
    else: ids = encode_text(tokenizer, text.strip())
    start = start_id(tokenizer)
    if bos and start is not None and ids[:1] != [start]: ids = [start] + ids
    if len(ids) > n_ctx:
        raise ValueError(f"the text has {len(ids)} tokens and this model takes {n_ctx}: shorten it by "
                         f"{len(ids) - n_ctx}")
    return ids


def contexts(
    store:ActivationStore, rows:Int[Tensor, "k"],
    before:int=BEFORE, after:int=AFTER, # Tokens on each side, fewer at the ends of a sequence
)->list[dict]: # For each row its document and position, the ids around it, and where among them it is
    "Read the tokens around some rows, all at once."
    offset = torch.arange(-before, after + 1)
    near = rows[:, None] + offset
    token, position, document = (store.rows(o, near.clamp(0, len(store) - 1).flatten()).long().view(near.shape)
                                 for o in ("token", "position", "document"))
    same = (near >= 0) & (near < len(store))
    same &= (position - position[:, before, None] == offset) & (document == document[:, before, None])
    return [dict(row=int(r), document=int(d[before]), position=int(p[before]), ids=t[s].tolist(),
                 at=int(s[:before].sum())) for r, t, p, d, s in zip(rows, token, position, document, same)]


def _view(explorer, asked):
    "One answer: neighbours, histogram, agreement."
    query, index, metric = explorer.query(asked), explorer.sites[asked["site"]][asked["subspace"]], asked["metric"]
    z = checked_query(index, query.coordinates[asked["subspace"]], metric)
    values = similarities(index, z, metric)
    found = (search_index(index, z, asked["n"], metric, query.out) if asked["threshold"] is None
             else within(values, asked["threshold"], metric, asked["n"], query.out))
    count, empty = found.count, asked["threshold"] is not None and not found.count
    if empty: found = search_index(index, z, 3, metric, query.out)
    near = [o | dict(value=round(v, 4), norm=round(n, 4))
            for o, v, n in zip(contexts(explorer.store, found.row), found.value.tolist(),
                               index.norms[found.row].tolist())]
    glance = explorer._remember(("glance", asked["site"], metric, query.key), lambda: _glance(explorer, asked, query))
    chance = {k: round(explorer.chance[k][v + 1].item(), 4) if v + 1 < len(explorer.chance[k]) else 0
              for k, v in _of(query.context).items()}
    return dict(query=query.context | dict(norm=round(z.norm().item(), 4)), neighbours=near, empty=empty,
                count=count if asked["threshold"] is not None else None, histogram=similarity_histogram(values, metric),
                glance=glance, chance=chance, tokens=explorer.shown(query.context["ids"], *(o["ids"] for o in near)))


def _glance(explorer, asked, query, k=20):
    "For every subspace of the site, how many of the nearest rows agree with the query in each variable."
    values, out = _of(query.context), {}
    for name, index in explorer.sites[asked["site"]].items():
        z = query.coordinates[name]
        if asked["metric"] == "cosine" and not z.norm() > 0: continue
        near = search_index(index, z, k, asked["metric"], query.out).row
        if len(near): # none in a store of one document: a query's own is left out
            out[name] = {o: round((explorer.columns[o][near] == v).float().mean().item(), 3) for o, v in values.items()}
    return out


def _of(context):
    "The variables of a context."
    return {"token": context["ids"][context["at"]],
            "previous token": context["ids"][context["at"] - 1] if context["at"] else -1,
            "position": context["position"]}


def _attribution(explorer, asked, rows):
    "Shares of the tokens up to each row, the last of them the row's own; the query comes first."
    query, index = explorer.query(asked), explorer.sites[asked["site"]][asked["subspace"]]
    if len(rows) > 100 or any(not 0 <= o < len(explorer.store) for o in rows):
        raise ValueError(f"attribution of {len(rows)} rows: ask for at most 100 of rows 0 to {len(explorer.store) - 1}")
    z, frozen = query.coordinates[asked["subspace"]], asked["shading"] != "free"
    key = ("shares", asked["site"], asked["subspace"], asked["metric"], frozen, query.key)
    with explorer.running:
        if missing := [o for o in dict.fromkeys((None, *rows)) if (*key, o) not in explorer.kept]:
            texts = [query.text if o is None else explorer._remember(("text", o), lambda: text_of(explorer.store, o))
                     for o in missing]
            batch, at = padded(texts)
            a = attribute(explorer.model, batch, at, index, z, explorer.baseline, asked["metric"], frozen, steps=6,
                          most=48)
            for i, o in enumerate(missing): explorer._remember((*key, o), lambda: _shares(a, i, int(at[i])))
        return {"query" if o is None else str(o): explorer.kept[*key, o] for o in (None, *rows)}


def _shares(a, i, at):
    "What a page shows of the attribution of one text."
    number = lambda o: round(o[i].item(), 3)
    return dict(shares=[round(v, 3) for v in a.shares[i, max(0, at - BEFORE):at + 1].tolist()], value=number(a.value),
                baseline=number(a.baseline), error=float(f"{a.error[i].item():.1g}"), steps=int(a.steps[i]))


def find_tokens(
    explorer:Explorer, text:str, # Typed tokens
    after:int=-1, # Begin behind this row
)->dict: # The next row, around the end of the store if need be; how many there are
    "Find the next place where some tokens stand in the store."
    tries = [encode_query(explorer.tokenizer, o, len(explorer.store), bos=False)
             for o in dict.fromkeys((text, f" {text}"))] if text.strip() else []
    if isinstance(getattr(explorer.tokenizer, "bos_token_id", None), int):
        tries.append(encode_text(explorer.tokenizer, f" {text.strip()}"))
    token, hits = explorer.columns["token"], torch.zeros(len(explorer.store), dtype=torch.bool)
    for ids in filter(None, tries):
        here = torch.ones(len(token) - len(ids) + 1, dtype=torch.bool)
        for i, o in enumerate(ids):
            here &= (token[i:i + len(here)] == o) & (explorer.columns["document"][i:i + len(here)]
                                                     == explorer.columns["document"][len(ids) - 1:])
        hits[len(ids) - 1:] |= here
    rows = hits.nonzero()[:, 0]
    if not len(rows):
        raise ValueError(f"{text.strip()[:60]!r} stands nowhere in the store: try other tokens, or type it as a text")
    return dict(row=int(rows[torch.searchsorted(rows, after, right=True) % len(rows)]), count=len(rows))


_SHOWN = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
def readable(
    tokenizer, # From `open_model`, or None
    token:int, # An id
)->str: # Never empty; no character that is invisible or turns the text around
    "Show one token."
    if hasattr(tokenizer, "pieces"):
        text = tokenizer.decode([token]) if 3 <= token < 259 else tokenizer.pieces[token].decode(errors="replace")
    else: text = str(token) if tokenizer is None else tokenizer.decode([token])
    if "\ufffd" in text and hasattr(tokenizer, "convert_ids_to_tokens"):
        text = str(tokenizer.convert_ids_to_tokens(token))
    if hasattr(tokenizer, "pieces") and token == 13: text = "\n"
    def visible(o):
        return _SHOWN.get(o) or (o if o == " " or unicodedata.category(o)[0] not in "CZ" else f"‹{ord(o):x}›")
    text = "".join(map(visible, text))
    return text if text.strip() else "␣"*len(text) or "∅"
