"One self-contained offline page, `report.html`, made only of the files in a finished run folder."
import json, math, os, re
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

__all__ = ["write_report"]

assets = Path(__file__).parent/"assets"
edge_words = dict(Q="query", K="key", OV="moved by the head", MLP="MLP", skip="stays in the stream", embed="embedding",
                  unembed="unembedding")


def write_report(run: Path) -> Path:
    "Write `report.html` into the folder `run` and return its path; `ValueError` if `run` is no run folder."
    run = Path(run)
    if not (run/"config.json").is_file(): raise ValueError(f"{run} is not a run folder: it holds no config.json")
    page, part = run/"report.html", run/f".report.{os.getpid()}.html"
    part.write_text(render(*(read(run, o) for o in "config metrics partitions attention circuit".split())), encoding="utf-8")
    os.replace(part, page)
    return page


def read(run: Path, name: str) -> dict:
    "The JSON object `name` of `run`, NaN read as None; empty if the file is missing."
    path = run/f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda o: None) if path.is_file() else {}


def render(config: dict, metrics: dict, partitions: dict, attention: dict, circuit: dict) -> str:
    "The page, as text."
    import jinja2
    from plotly.offline import get_plotlyjs
    env = jinja2.Environment(loader=jinja2.FileSystemLoader(assets), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.filters |= dict(pct=pct, num=num, score=score)
    graph = read_graph(circuit, metrics)
    return env.get_template("report.html.jinja").render(
        config=config, metrics=metrics, claim=claim(metrics, graph), accuracy=accuracy_table(metrics), edge_words=edge_words,
        drawing=draw(graph, config) if circuit else None, curve=curve_figure(metrics.get("circuit", {})),
        sites=[site_table(o, metrics["sites"][o]) for o in sorted(metrics.get("sites", {}), key=site_depth)],
        matrices=[matrix_pair(o, partitions[o]) for o in sorted(partitions, key=site_depth)],
        attention=attention_figures(attention, metrics.get("head_scores", {})), plotly=get_plotlyjs())


# ## Words and numbers

def pct(x: float | None) -> str:
    "A share as a percentage with one decimal."
    return "–" if x is None else f"{100*x:.1f}%"


def num(x: float | None) -> str:
    "A number with three significant digits, integers whole."
    if x is None: return "–"
    return (f"{x:,}" if isinstance(x, int) else f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}").replace("-", "−")


def score(o: dict) -> str:
    "An edge's score with its unit."
    if o.get("score") is None: return "unscored"
    unit = o.get("unit") or ""
    if unit.startswith("share of"): return f"{num(100*o['score'])}%{unit.removeprefix('share')}"
    return f"{num(o['score'])} {unit}".strip()


def tested(o: dict) -> str:
    "An edge's score with its p-value."
    return score(o) if o.get("p") is None else f"{score(o)} · p = {num(o['p'])}"


def buckets(accuracy: dict) -> list[str]:
    "Names of the length buckets, shortest first."
    return sorted(accuracy.get("full", {}), key=lambda o: [int(n) for n in re.findall(r"\d+", o)])


def claim(metrics: dict, graph) -> str:
    "What the run showed, in one sentence."
    circuit, accuracy = metrics.get("circuit", {}), metrics.get("accuracy", {})
    if not circuit and not graph.number_of_edges(): return "Subspaces found; no circuit was computed."
    n, of = circuit.get("n_edges", graph.number_of_edges()), circuit.get("n_candidates")
    if not n: return "No edge survives" + (f" of {of:,} candidates." if of else ".")
    edges = f"{n:,} of {of:,} edges" if of else f"{n:,} edge{'s'*(n != 1)}"
    full, kept = accuracy.get("full", {}), accuracy.get("keep_only", {})
    shares = [pct(kept[o]/full[o]) for o in buckets(accuracy) if kept.get(o) is not None and full[o]]
    if not shares: return f"The circuit keeps {edges}."
    if len(shares) == 2: return f"Keeping {edges} keeps {shares[0]} of the accuracy at trained and {shares[1]} at longer lengths."
    return f"Keeping {edges} keeps {', '.join(shares)} of the accuracy."


def accuracy_table(metrics: dict) -> dict | None:
    "Full model, keep-only model and the two controls, a column a length bucket."
    accuracy, circuit = metrics.get("accuracy", {}), metrics.get("circuit", {})
    names, control = buckets(accuracy), circuit.get("control", {})
    if not names: return None
    rows = [("full model", circuit.get("n_candidates"), accuracy["full"]),
            ("keep-only model", circuit.get("n_edges"), accuracy.get("keep_only", {})),
            ("untrained copy, same procedure", control.get("n_edges"), control.get("accuracy") or {}),
            ("nothing kept", 0, accuracy.get("null", {}))]
    words = ["trained lengths", "longer lengths"] if len(names) == 2 else [""]*len(names)
    return dict(heads=list(zip(words, (o.replace("-", "–") for o in names))),
                rows=[(label, n, [values.get(o) for o in names]) for label, n, values in rows])


def site_table(site: str, o: dict) -> dict:
    "One site's subspaces with what each holds of the known variables."
    variables, variance = o.get("variables", {}), o.get("variance", {})
    sizes = o.get("sizes") or dict.fromkeys(variables)
    known = list(dict.fromkeys(v for shares in variables.values() for v in shares))
    rows = [dict(name=n, d=d, variance=variance.get(n), shares=[variables.get(n, {}).get(v) for v in known],
                 words=holds(variables.get(n, {}))) for n, d in sizes.items()]
    return dict(site=site, known=known, rows=rows, **{k: o.get(k) for k in ("n_subspaces", "objective", "null", "verdict")})


def holds(shares: dict) -> str:
    "What a subspace holds, in words."
    shares = {k: v for k, v in shares.items() if v is not None}
    most = [k for k in sorted(shares, key=shares.get, reverse=True) if shares[k] >= .5]
    if most: return "holds " + " and ".join(f"{100*shares[k]:.0f}% of {k}" for k in most)
    some = max(shares, key=shares.get, default=None)
    return f"only {100*shares[some]:.0f}% of {some}" if some and shares[some] >= .1 else "none of the known variables"


# ## The circuit, by site and layer

width = dict(input=66, subspace=108, match=186, mlp=58, output=50)
gap, row, head, line, stream = 24, 38, 24, 25, 190


def read_graph(circuit: dict, metrics: dict):
    "The circuit with every subspace of the partition, wired or not."
    import networkx as nx
    graph = nx.node_link_graph(circuit, edges="edges") if circuit else nx.MultiDiGraph()
    for site, o in metrics.get("sites", {}).items():
        for name, d in (o.get("sizes") or {}).items():
            if f"{site}/{name}" not in graph: graph.add_node(f"{site}/{name}", kind="subspace", site=site, name=name, d=d)
    return graph


def site_depth(site: str) -> float:
    "Three steps a layer: what attention reads, what it writes, what the MLP writes."
    found = re.match(r"blocks\.(\d+)\.(?:\w*_(pre|mid|post))?", site)
    return 3*int(found[1]) + {"pre": 0, "mid": 1, "post": 2}.get(found[2], .75) if found else -.5


def head_depth(component: str) -> float:
    "Half a step after what the head reads."
    return 3*int(re.match(r"L(\d+)", component)[1]) + .5


def node_depth(o: dict) -> float:
    "Where a node stands, left to right."
    if o["kind"] == "subspace": return site_depth(o["site"])
    if o["kind"] == "match": return head_depth(o["component"])
    return {"input": -1, "mlp": 3*o.get("layer", 0) + 1.5, "output": math.inf}[o["kind"]]


def columns(graph, config: dict) -> tuple[dict, float]:
    "Where the column of each depth begins, and the width of all."
    kinds = {3*o + .5: "match" for o in range(config.get("n_layers") or 0)}
    kinds |= {node_depth(o): o["kind"] for _, o in graph.nodes(data=True) if "kind" in o}
    xs, x = {}, 1
    for depth, following in zip(sorted(kinds), [*sorted(kinds)[1:], None]):
        xs[depth] = x
        x += width[kinds[depth]] + (16 if "match" in (kinds[depth], kinds.get(following)) else 0) + gap
    return xs, x - gap + 1


def node_name(graph, i: str) -> str:
    "What a node is called in the figure."
    o = graph.nodes[i]
    return f"{o['query']} ⋈ {o['key']}" if o.get("kind") == "match" else o.get("name") or str(i)


def fit(text: str, room: float) -> str:
    "Cut `text` to `room` pixels."
    n = int(room/6.2)
    return text if len(text) <= n else text[:n - 1] + "…"


def head_rows(graph) -> dict:
    "For each head that has edges its lines: where it looks (match), then what it moves (OV)."
    rows = defaultdict(list)
    for i, o in graph.nodes(data=True):
        if o.get("kind") == "match" and graph.degree(i): rows[o["component"]].append(dict(o, id=i, label=node_name(graph, i)))
    for s, t, k, e in graph.edges(keys=True, data=True):
        if e["type"] != "OV": continue
        rows[e["component"]].append(dict(e, id=(s, t, k), kind="moves", label=f"{node_name(graph, s)} → {node_name(graph, t)}"))
    return rows


def layer_panels(depth: float, heads: dict, n_heads: int) -> list[dict]:
    "The heads of one layer from top to bottom; those without an edge share one panel."
    names = sorted((o for o in heads if head_depth(o) == depth), key=lambda o: [int(n) for n in re.findall(r"\d+", o)])
    panels = [dict(label=o, rows=heads[o], h=head + row*len(heads[o]) + 2) for o in names]
    idle = n_heads - len(names)
    if idle <= 0: return panels
    label = f"{'all' if not names else 'other'} {idle} heads" if idle > 1 else f"L{int(depth//3)}H0" if n_heads == 1 else "other head"
    return panels + [dict(label=label, rows=[], idle="no edge survives", h=2*head)]


def head_boxes(graph, config: dict, xs: dict) -> tuple[list, list]:
    "Panels of the heads, stacked upwards from y = 0, and the boxes of their lines."
    heads, panels, boxes = head_rows(graph), [], []
    for depth in sorted({head_depth(o) for o in heads} | {3*o + .5 for o in range(config.get("n_layers") or 0)}):
        y = 0
        for o in reversed(layer_panels(depth, heads, config.get("n_heads") or 0)):
            panels.append(dict(o, x=xs[depth], y=y - o["h"], w=width["match"]))
            boxes += [dict(line, x=xs[depth] + 5, y=y - o["h"] + head + row*i, w=width["match"] - 10, h=row - 4, sub=score(line),
                           tip=f"{o['label']} · {line['label']} · {tested(line)}") for i, line in enumerate(o["rows"])]
            y -= o["h"] + 10
    return panels, boxes


def stream_box(o: dict, most: int) -> dict:
    "Size and words of a node of the residual stream, or of an MLP above it."
    if o["kind"] == "mlp":
        name = f"MLP {o['layer']}" + (f" → {o['target']}" if o.get("target") else "")
        return dict(y=-52*(1 + o.get("slot", 0)), h=46, label=f"MLP {o['layer']}", sub=o.get("target", ""), tip=name)
    if o["kind"] == "output": return dict(h=stream, tip=o["label"])
    if o["kind"] == "input": return dict(tip=o["label"])
    return dict(h=max(line, stream*o["d"]/most), sub=f"d {o['d']}", tip=f"{o['label']}, {o['d']} dimensions of {o['site']}")


def column_boxes(graph, xs: dict) -> list[dict]:
    "Boxes of the residual stream from y = 0 down, and of the MLPs above it."
    found, boxes = defaultdict(list), []
    for i, o in graph.nodes(data=True):
        if o.get("kind", "match") != "match": found[node_depth(o)].append(dict(o, id=i, label=node_name(graph, i)))
    order = list(dict.fromkeys(o["label"] for depth in sorted(found) for o in found[depth]))
    most = max((sum(o.get("d", 0) for o in nodes) for nodes in found.values()), default=0) or 1
    for depth, nodes in found.items():
        y = 0
        for o in sorted(nodes, key=lambda o: (o["label"] in ("rest", "bias"), order.index(o["label"]))):
            boxes.append(dict(o, x=xs[depth], w=width[o["kind"]], h=line, y=y, sub="") | stream_box(o, most))
            y += boxes[-1]["h"] + 5
    return boxes


def wires(graph, boxes: dict) -> list[dict]:
    "Lines between boxes, weak ones first; an OV edge is two lines, through its head."
    most = defaultdict(float)
    for *_, e in graph.edges(data=True): most[e.get("unit")] = max(most[e.get("unit")], abs(e.get("score") or 0))
    found = []
    for n, (s, t, k, e) in enumerate(graph.edges(keys=True, data=True)):
        share = abs(e.get("score") or 0)/(most[e.get("unit")] or 1)
        via = [s, (s, t, k), t] if e["type"] == "OV" else [s, t]
        tip = " · ".join(filter(None, [e.get("component"), e["type"], f"{node_name(graph, s)} → {node_name(graph, t)}", tested(e)]))
        found += [dict(edge=n, a=a, b=b, type=e["type"], width=round(1.2 + 4*share, 2), negative=(e.get("score") or 0) < 0, tip=tip)
                  for a, b in pairwise(via) if a in boxes and b in boxes]
    return sorted(found, key=lambda o: o["width"])


def route(boxes: dict, lines: list[dict]):
    "Give each line its curve; lines that share a side of a box are spread over it in the order of where they lead."
    sides = defaultdict(list)
    for o in lines:
        sides[o["a"], "right"].append((o, "y1", boxes[o["b"]]))
        sides[o["b"], "left"].append((o, "y2", boxes[o["a"]]))
    for (i, _), ends in sides.items():
        ends.sort(key=lambda end: end[2]["y"] + end[2]["h"]/2)
        for n, (o, y, _) in enumerate(ends, 1): o[y] = boxes[i]["y"] + boxes[i]["h"]*(n - .5)/len(ends)
    for o in lines:
        x1, x2 = boxes[o["a"]]["x"] + boxes[o["a"]]["w"], boxes[o["b"]]["x"]
        o["x2"], bend = x2, (x2 - x1)/2
        o["path"] = f"M{x1:.1f},{o['y1']:.1f} C{x1 + bend:.1f},{o['y1']:.1f} {x2 - bend:.1f},{o['y2']:.1f} {x2:.1f},{o['y2']:.1f}"


def draw(graph, config: dict) -> dict:
    "The figure's boxes, panels, lines and labels, in pixels; the stream's top is y = 0."
    xs, w = columns(graph, config)
    panels, rows = head_boxes(graph, config, xs)
    boxes = {o["id"]: o for o in rows + column_boxes(graph, xs)}
    lines = wires(graph, boxes)
    route(boxes, lines)
    for i, o in boxes.items():
        o["edges"] = sorted({e["edge"] for e in lines if i in (e["a"], e["b"])})
        o["tall"] = bool(o["sub"]) and o["h"] >= 32
        if not o["tall"] and len(o["label"] + o["sub"]) > 13: o["sub"] = ""
        o["label"] = fit(o["label"], o["w"] - (22 if o["kind"] in ("match", "moves") else 10))
    sites = sorted({o["site"] for o in boxes.values() if o["kind"] == "subspace"}, key=site_depth)
    labels = [dict(x=xs[site_depth(o)] + width["subspace"]/2, text=short(o), site=o) for o in sites]
    bottom = max([stream] + [o["y"] + o["h"] for o in boxes.values()])
    top = min([0] + [o["y"] for o in panels + list(boxes.values())])
    types = [o for o in edge_words if any(e["type"] == o for e in lines)]
    return dict(width=w, top=round(top - 30), height=round(bottom - top + 60), bottom=round(bottom), panels=panels, labels=labels,
                boxes=list(boxes.values()), lines=lines, types=types, edges=edge_rows(graph))


def short(site: str) -> str:
    "A site's short form, for figures."
    return re.sub(r"blocks\.(\d+)\.hook_resid_", r"x\1.", site)


def edge_rows(graph) -> list[dict]:
    "Every scored edge as a table row, Q and K as one match; components first, strongest first within one and its type."
    site = {i: short(o.get("site", "")) for i, o in graph.nodes(data=True)}
    rows = [dict(o, type="QK", label=node_name(graph, i), where=site[next(graph.predecessors(i))])
            for i, o in graph.nodes(data=True) if o.get("kind") == "match" and graph.in_degree(i)]
    rows += [dict(e, label=f"{node_name(graph, s)} → {node_name(graph, t)}", where=" → ".join(filter(None, [site[s], site[t]])))
             for s, t, e in graph.edges(data=True) if e["type"] not in ("Q", "K") and (e["type"] != "MLP" or e["score"] is not None)]
    types = ["QK", *edge_words]
    def place(o): return o.get("component") is None, o.get("component") or "", types.index(o["type"]), -abs(o.get("score") or 0)
    return sorted(rows, key=place)


# ## Figures drawn by plotly

clear = "rgba(0,0,0,0)"
axis = dict(showgrid=False, zeroline=False, color="var(--soft)", tickfont=dict(size=11), ticks="outside", ticklen=5, tickcolor=clear)
plain = dict(paper_bgcolor=clear, plot_bgcolor=clear, font=dict(family="system-ui, sans-serif", size=12, color="var(--text)"),
             hoverlabel=dict(bgcolor="var(--card)", font=dict(color="var(--text)")), showlegend=False)
shades = [[0, "var(--heat0)"], [.5, "var(--heat1)"], [1, "var(--heat2)"]]


def titled(text: str) -> dict:
    "An axis title in the type of the page."
    return dict(text=text, font=dict(size=12), standoff=6)


def heatmap(z: list, x: dict, y: dict, hover: str, top: float, margin: dict, height: int, **extra) -> dict:
    "A heatmap whose first row is at the top."
    data = dict(type="heatmap", z=z, zmin=0, zmax=top, colorscale=shades, showscale=False, hovertemplate=hover + "<extra></extra>",
                hoverongaps=False, **extra)
    return dict(data=[data], layout=plain | dict(height=height, margin=margin, xaxis=axis | x, yaxis=axis | dict(autorange="reversed") | y))


def matrix_figure(z: list, names: list, hover: str, top: float) -> dict:
    "A small matrix between subspaces with its values printed."
    text = [["" if v is None else f"{v:.2f}" for v in row] for row in z]
    ticks = dict(tickvals=list(range(len(names))), ticktext=names)
    return heatmap(z, ticks | dict(side="top"), ticks, hover, top, dict(l=100, r=4, t=30, b=4), 40 + 44*len(names),
                   text=text, texttemplate="%{text}", xgap=2, ygap=2)


def matrix_pair(site: str, o: dict) -> dict:
    "Mutual information and determination between the subspaces of one site."
    names = o["names"]
    # A subspace's information about itself has no bound, and would hide all the others.
    mi = [[None if i == j else v for j, v in enumerate(row)] for i, row in enumerate(o.get("mutual_information") or [])]
    most = max([v for row in mi for v in row if v is not None], default=0)
    pair = dict(site=site, null=o.get("mutual_information_null"), most=most)
    if mi: pair["mi"] = matrix_figure(mi, names, "%{y} and %{x}: %{z:.3f} nats", max(most, .5))
    if o.get("determination"):
        pair["determination"] = matrix_figure(o["determination"], names, "matching in %{y} determines %{z:.1%} of %{x}", 1)
    return pair


def attention_figures(attention: dict, scores: dict) -> list[dict]:
    "A lower-triangular heatmap for each head, with the head's scores."
    tokens = [str(o) for o in attention.get("tokens", [])]
    shown = range(0, len(tokens), 1 + len(tokens)//30)
    ticks = dict(tickvals=list(shown), ticktext=[tokens[o] for o in shown], tickfont=dict(size=10))
    x = ticks | dict(title=titled("attended (key)"), tickangle=-90, constrain="domain", constraintoward="left")
    y = ticks | dict(title=titled("attending (query)"), scaleanchor="x", constrain="domain")
    figures = []
    for o in attention.get("patterns", []):
        z = [[round(v, 3) if j <= i else None for j, v in enumerate(row)] for i, row in enumerate(o["pattern"])]
        figure = heatmap(z, x, y, "%{y} attends to %{x}: %{z:.2f}", 1, dict(l=56, r=4, t=4, b=60), 400)
        named = {k: v[o["component"]] for k, v in scores.items() if o["component"] in v}
        figures.append(dict(component=o["component"], figure=figure, scores=named))
    return figures


def curve_line(points: list, chosen: int | None, key: str, y: str) -> dict:
    "One line of the sparsity curve; what a log scale cannot show is left out."
    marked = [i == chosen for i, _ in points]
    marks = dict(size=[13 if o else 6 for o in marked], color=["var(--mark)" if o else "var(--heat2)" for o in marked],
                 opacity=1, line=dict(width=0))
    return dict(type="scatter", mode="lines+markers", x=[o["n_edges"] for _, o in points], yaxis=y, marker=marks,
                y=[None if key == "kl" and not o.get(key) else o.get(key) for _, o in points],
                line=dict(width=1.5, color="var(--heat2)"), hovertemplate="%{x} edges: %{y:.3g}<extra></extra>")


def curve_figure(circuit: dict) -> dict | None:
    "Accuracy and KL against the number of edges kept, the chosen point marked."
    points = sorted(enumerate(circuit.get("curve") or []), key=lambda o: o[1]["n_edges"])
    if not points: return None
    grid = axis | dict(showgrid=True, gridcolor="var(--line)")
    layout = plain | dict(height=300, margin=dict(l=52, r=10, t=6, b=42),
        xaxis=axis | dict(title=titled("edges kept"), rangemode="tozero", anchor="y2"),
        yaxis=grid | dict(title=titled("accuracy"), domain=[.55, 1], rangemode="tozero"),
        yaxis2=grid | dict(title=titled("KL, nats"), type="log", domain=[0, .45], dtick=1, tickformat="~g"))
    return dict(data=[curve_line(points, circuit.get("chosen"), *o) for o in (("accuracy", "y"), ("kl", "y2"))], layout=layout)
