"One self-contained offline page, `report.html`, made only of the files in a finished run folder."
import json, math, re
from pathlib import Path

from subspace_circuits.circuit_graph import (
    EDGE_WORDS, edge_rows, layout, read_circuit, score_words, site_depth, three_digits)
from subspace_circuits.files import for_browser, read_json, write_text

__all__ = ["write_report"]

assets = Path(__file__).parent/"assets"


def write_report(run: Path) -> Path:
    "Write `report.html` into the folder `run` and return its path; `ValueError` if `run` is no run folder."
    run = Path(run)
    if not (run/"config.json").is_file(): raise ValueError(f"{run} is not a run folder: it holds no config.json")
    kinds = dict(config="run", metrics="metrics", partitions="evidence", attention="attention", circuit="circuit",
                 attack="attack")
    write_text(run/"report.html", render(*(read(run/f"{k}.json", v) for k, v in kinds.items())), "report")
    return run/"report.html"


def read(file: Path, kind: str) -> dict:
    "A JSON file of a run, NaN read as None; empty if it is missing."
    return for_browser(read_json(file, kind)) if file.is_file() else {}


def render(config: dict, metrics: dict, partitions: dict, attention: dict, circuit: dict, attack: dict = {}) -> str:
    "The page, as text."
    import jinja2
    from plotly.offline import get_plotlyjs
    env = jinja2.Environment(loader=jinja2.FileSystemLoader(assets), autoescape=True, trim_blocks=True,
                             lstrip_blocks=True)
    env.filters |= dict(pct=pct, num=three_digits, score=score_words)
    graph = read_graph(circuit, metrics)
    return env.get_template("report.html.jinja").render(
        config=config, metrics=metrics, claim=headline(metrics, graph), accuracy=accuracy_table(metrics),
        edge_words=EDGE_WORDS,
        drawing=layout(graph) | dict(edges=edge_rows(graph)) if circuit else None,
        curve=curve_figure(metrics.get("circuit", {})), attack=attack_figure(attack), attacked=attack,
        sites=[site_table(o, metrics["sites"][o]) for o in sorted(metrics.get("sites", {}), key=site_depth)],
        matrices=[matrix_pair(o, partitions[o]) for o in sorted(partitions, key=site_depth)],
        attention=attention_figures(attention, metrics.get("head_scores", {})), plotly=get_plotlyjs())


# ## Words and numbers

def pct(x: float | None) -> str:
    "A share as a percentage with one decimal."
    return "–" if x is None else f"{100*x:.1f}%"


def buckets(accuracy: dict) -> list[str]:
    "Names of what accuracy was measured on, the shortest lists first."
    return sorted(accuracy.get("full", {}), key=lambda o: [int(n) for n in re.findall(r"\d+", o)])


def headline(metrics: dict, graph) -> str:
    "What the run showed, in one sentence."
    circuit, accuracy = metrics.get("circuit", {}), metrics.get("accuracy", {})
    if not circuit and not graph.number_of_edges(): return "Subspaces found; no circuit was computed."
    n, of = circuit.get("n_edges", graph.number_of_edges()), circuit.get("n_candidates")
    if not n: return "No edge survives" + (f" of {of:,} candidates." if of else ".")
    edges = f"{n:,} of {of:,} edges" if of else f"{n:,} edge{'s'*(n != 1)}"
    full, kept = accuracy.get("full", {}), accuracy.get("keep_only", {})
    shares = {o: pct(kept[o]/full[o]) for o in buckets(accuracy) if kept.get(o) is not None and full[o]}
    if not shares: return f"The circuit keeps {edges}."
    if len(shares) != 2: return f"Keeping {edges} keeps {', '.join(shares.values())} of the accuracy."
    (a, one), (b, two) = zip(lengths(list(shares)), shares.values())
    return f"Keeping {edges} keeps {one} of the accuracy {a} and {two} {b}."


def lengths(names: list[str]) -> list[str]:
    "What two buckets are, in words."
    return ["at trained", "at longer lengths"] if all(map(is_length, names)) else [f"on {o}" for o in names]


def is_length(name: str) -> bool:
    "Whether a bucket is a range of lengths."
    return bool(re.fullmatch(r"\d+-\d+", name))


def accuracy_table(metrics: dict) -> dict | None:
    "Full model, keep-only model and the two controls, a column a length bucket."
    accuracy, circuit = metrics.get("accuracy", {}), metrics.get("circuit", {})
    names, control = buckets(accuracy), circuit.get("control", {})
    if not names: return None
    rows = [("full model", circuit.get("n_candidates"), accuracy["full"]),
            ("keep-only model", circuit.get("n_edges"), accuracy.get("keep_only", {})),
            *([("untrained copy, same procedure", control.get("n_edges"), control.get("accuracy") or {})] if control
              else []),
            ("nothing kept", 0, accuracy.get("null", {}))]
    words = ["trained lengths", "longer lengths"] if len(names) == 2 and all(map(is_length, names)) else [""]*len(names)
    return dict(heads=list(zip(words, (o.replace("-", "–") if is_length(o) else o for o in names))),
                rows=[(label, n, [values.get(o) for o in names]) for label, n, values in rows])


def site_table(site: str, o: dict) -> dict:
    "One site's subspaces with what each holds of the known variables."
    variables, variance = o.get("variables", {}), o.get("variance", {})
    sizes = o.get("sizes") or dict.fromkeys(variables)
    known = list(dict.fromkeys(v for shares in variables.values() for v in shares))
    rows = [dict(name=n, d=d, variance=variance.get(n), shares=[variables.get(n, {}).get(v) for v in known],
                 words=holds(variables.get(n, {}))) for n, d in sizes.items()]
    return dict(site=site, known=known, rows=rows,
                **{k: o.get(k) for k in ("n_subspaces", "objective", "null", "verdict")})


def holds(shares: dict) -> str:
    "What a subspace holds, in words."
    shares = {k: v for k, v in shares.items() if v is not None}
    most = [k for k in sorted(shares, key=shares.get, reverse=True) if shares[k] >= .5]
    if most: return "holds " + " and ".join(f"{100*shares[k]:.0f}% of {k}" for k in most)
    some = max(shares, key=shares.get, default=None)
    return f"only {100*shares[some]:.0f}% of {some}" if some and shares[some] >= .1 else "none of the known variables"


# ## The circuit

def read_graph(circuit: dict, metrics: dict):
    "The circuit with every subspace of the partition, wired or not."
    import networkx as nx
    graph = read_circuit(circuit) if circuit else nx.MultiDiGraph()
    for site, o in metrics.get("sites", {}).items():
        for name, d in (o.get("sizes") or {}).items():
            if f"{site}/{name}" not in graph:
                graph.add_node(f"{site}/{name}", kind="subspace", site=site, name=name, d=d)
    return graph


# ## Figures drawn by plotly

clear = "rgba(0,0,0,0)"
axis = dict(showgrid=False, zeroline=False, color="var(--soft)", tickfont=dict(size=11), ticks="outside", ticklen=5,
            tickcolor=clear)
plain = dict(paper_bgcolor=clear, plot_bgcolor=clear,
             font=dict(family="system-ui, sans-serif", size=12, color="var(--text)"),
             hoverlabel=dict(bgcolor="var(--card)", font=dict(color="var(--text)")), showlegend=False)
shades = [[0, "var(--heat0)"], [.5, "var(--heat1)"], [1, "var(--heat2)"]]


def titled(text: str) -> dict:
    "An axis title in the type of the page."
    return dict(text=text, font=dict(size=12), standoff=6)


def heatmap(z: list, x: dict, y: dict, hover: str, top: float, margin: dict, height: int, **extra) -> dict:
    "A heatmap whose first row is at the top."
    data = dict(type="heatmap", z=z, zmin=0, zmax=top, colorscale=shades, showscale=False,
                hovertemplate=hover + "<extra></extra>",
                hoverongaps=False, **extra)
    return dict(data=[data], layout=plain
                | dict(height=height, margin=margin, xaxis=axis | x, yaxis=axis | dict(autorange="reversed") | y))


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
        pair["determination"] = matrix_figure(o["determination"], names,
                                              "matching in %{y} determines %{z:.1%} of %{x}", 1)
    return pair


def attention_figures(attention: dict, scores: dict) -> list[dict]:
    "A heatmap for each head, its lower triangle if heads look back only, with the head's scores."
    tokens = [str(o) for o in attention.get("tokens", [])]
    shown = range(0, len(tokens), 1 + len(tokens)//30)
    ticks = dict(tickvals=list(shown), ticktext=[tokens[o] for o in shown], tickfont=dict(size=10))
    x = ticks | dict(title=titled("attended (key)"), tickangle=-90, constrain="domain", constraintoward="left")
    y = ticks | dict(title=titled("attending (query)"), scaleanchor="x", constrain="domain")
    figures = []
    for o in attention.get("patterns", []):
        ahead = any(v for i, row in enumerate(o["pattern"]) for v in row[i + 1:])
        z = [[round(v, 3) if ahead or j <= i else None for j, v in enumerate(row)]
             for i, row in enumerate(o["pattern"])]
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
    grid, kl = axis | dict(showgrid=True, gridcolor="var(--line)"), [o["kl"] for _, o in points if o.get("kl")]
    decades = math.log10(max(kl)/min(kl)) if kl else 0
    layout = plain | dict(height=300, margin=dict(l=64, r=10, t=6, b=42),
        xaxis=axis | dict(title=titled("edges kept"), rangemode="tozero", anchor="y2"),
        yaxis=grid | dict(title=titled("accuracy"), domain=[.55, 1], rangemode="tozero"),
        yaxis2=grid | dict(title=titled("KL, nats"), type="log", domain=[0, .45], dtick=1 + int(decades//4),
                           tickformat="~g"))
    return dict(data=[curve_line(points, circuit.get("chosen"), *o) for o in (("accuracy", "y"), ("kl", "y2"))],
                layout=layout)


def attack_figure(curves: dict) -> dict | None:
    "What an adversary reached against its steps: of the circuit, of random edges, of the model but one edge."
    if not curves: return None
    looks = {"circuit": ("var(--mark)", "solid"), "random edges": ("var(--heat2)", "dot"),
             "all but one edge": ("var(--heat2)", "dash")}
    data = [dict(type="scatter", mode="lines+markers", name=k, x=[n for n, _ in c], y=[max(x, 1e-5) for _, x in c],
                 line=dict(width=1.5, color=looks[k][0], dash=looks[k][1]),
                 hovertemplate=f"{k}, %{{x}} steps: %{{y:.3g}} nats<extra></extra>") for k, c in curves.items()]
    steps = sorted({n for c in curves.values() for n, _ in c})
    layout = plain | dict(
        height=300, margin=dict(l=64, r=10, t=6, b=42), showlegend=True, legend=dict(orientation="h", y=1.15),
        xaxis=axis | dict(title=titled("steps of the adversary"), type="log", tickvals=steps),
        yaxis=axis | dict(title=titled("KL, nats"), type="log", showgrid=True, gridcolor="var(--line)", dtick=1,
                          tickformat="~g"))
    return dict(data=data, layout=layout)
