"The report of a run on a language model: its claims, how each was tested, what would have refuted it; all figures."
from pathlib import Path
from statistics import mean

from subspace_circuits.circuit_graph import short_site, site_depth, three_digits
from subspace_circuits.files import read_json, write_text
from subspace_circuits.report import axis, pct, plain, titled

__all__ = ["write_language_report"]

STABLE = .8 # Overlap between halves of the rows from which a subspace counts as stable
ASSETS = Path(__file__).parent/"assets"
COLOURS = {"found": "var(--heat2)", "pca": "var(--second)", "random": "var(--third)", "whole sites": "var(--soft)"}
WORDS = {"found": "found", "pca": "PCA", "ica": "ICA", "ndm": "NDM", "random": "random rotation",
         "whole sites": "whole sites"}


def write_language_report(run: Path) -> Path:
    "Write `report.html` into the folder of a finished run and return its path."
    import jinja2
    from plotly.offline import get_plotlyjs
    run = Path(run)
    config, metrics, cards, circuit, sink = (read_json(run/f"{k}.json", v) for k, v in (
        ("config", "run"), ("metrics", "metrics"), ("cards", "cards"), ("circuit", "window circuit"), ("sink", "sink")))
    env = jinja2.Environment(loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, trim_blocks=True,
                             lstrip_blocks=True)
    env.filters |= dict(pct=pct, num=three_digits, short=short_site)
    page = env.get_template("language.html.jinja").render(
        config=config, metrics=metrics, circuit=circuit, claims=claims(config, circuit, cards, sink), sink=sink,
        words=WORDS, needed=needed_rows(circuit), components=component_rows(circuit), curve=curves(circuit),
        grade=metrics["grade"], stable=sum(o >= STABLE for o in metrics["grade"]["halves"].values()),
        judged=judged_on(circuit), cards={s: cards[s] for s in sorted(cards, key=site_depth)},
        edges=circuit["edges"][:40], plotly=get_plotlyjs())
    write_text(run/"report.html", page, "report")
    return run/"report.html"


def claims(config: dict, circuit: dict, cards: dict, sink: dict) -> list[dict]:
    "What the run says of the model: a claim, its test, and what would have refuted it."
    return [components_claim(config, circuit), *behaviour_claim(config, circuit), *sink_claim(sink),
            edges_claim(circuit), *subspace_claim(cards)]


def components_claim(config: dict, circuit: dict) -> dict:
    "Which components of the window the model needs."
    costs = {k: v for k, v in circuit["components"].items() if k != "all"}
    order, every = sorted(costs, key=lambda o: -costs[o]["kl"]), circuit["components"]["all"]["kl"]
    top, a, b = order[:3], *config["layers"]
    return dict(
        claim=f"In layers {a} to {b}, {', '.join(top)} matter most: without {top[0]} alone the model's answers move by "
              f"{costs[top[0]]['kl']:.3f} ± {costs[top[0]]['error']:.3f} nats a token, without the whole window by "
              f"{every:.3f}.",
        test=f"Each of {len(costs)} components wrote its mean instead, one at a time, on "
             f"{circuit['tokens']['ranked']:,} {'prompts' if 'behaviour' in circuit else 'tokens'}; the "
             f"median costs {costs[order[len(order)//2]]['kl']:.4f}.",
        refuted="Costs that lie within each other's standard errors, or a window whose loss changes nothing.")


def behaviour_claim(config: dict, circuit: dict) -> list[dict]:
    "What is left of a behaviour when only the circuit's edges run, beside other bases and none."
    if "behaviour" not in circuit: return []
    found, asked, n = circuit["behaviour"], config["behaviour"], circuit["needed"]["found"]["n"]
    def said(o): return f"{pct(o['right'])} ± {pct(o['error'])} (margin {o['margin']:.2f} nats)"
    mean = found["mean"]
    return [dict(
        claim=f"On prompts of {asked['task']} the right answer wins in {said(found['whole'])}; with the window's "
              f"means alone in {said(mean['none'])}, with {n:,} of {circuit['candidates']['found']:,} edges in "
              f"{said(mean['found'])}.",
        test=f"{circuit['tokens']['judged']} prompts that no edge was ranked on. With zeros in place of the others: "
             f"{said(found['zero']['found'])}, with another prompt's: {said(found['resample']['found'])}. As many "
             f"edges as they need, means elsewhere: PCA {said(mean['pca'])}, a random rotation {said(mean['random'])}.",
        refuted="Prompts that are answered as well without the window, or as badly with the circuit.")]


def sink_claim(sink: dict) -> list[dict]:
    "Which component makes rows of another order, and of which subspace."
    if "maker" not in sink: return []
    kinds = "subspace", "random", "direction", "rival"
    ours, random, (one,), (pca,) = ([o for o in sink["swaps"] if o["kind"] == k] for k in kinds)
    both = [o for o in ours if o["name"] in set(sink["needed"]) & set(sink["enough"])]
    best = min(ours, key=lambda o: o["without"])
    others = [o for o in ours if o is not best]
    looks = sink["looked"]
    made = (f"{sink['maker']} makes {sink['rows']} rows of another order, {three_digits(sink['length'])} long where "
            f"others are {three_digits(sink['usual'])}, {sink['first']} of them at the first position")
    if both == [best]:
        made += f"; it reads that in one subspace, {best['name']} of {short_site(sink['read'])}"
        made += f" ({best['d']} dimensions)."
    else: made += "; no one subspace of this cut is needed for it and enough."
    seen = "" if looks["whole"] is None else (f" Heads behind it give those rows {pct(looks['whole'])} of their "
                                              f"attention, {pct(looks['without'])} without {best['name']}.")
    return [dict(
        claim=made,
        test=f"With a usual row's coordinates in {best['name']} {three_digits(best['without'])} is written there "
             f"instead of {three_digits(sink['added'])}, and the answers move by {best['kl']:.3f} ± "
             f"{best['error']:.3f} nats a token; with the sink's in {best['name']}, usual rows get "
             f"{three_digits(best['alone'])}. Any other subspace: at least "
             f"{three_digits(min(o['without'] for o in others))}, at most {max(o['kl'] for o in others):.3f} nats, at "
             f"most {three_digits(max(o['alone'] for o in others))}. Random subspaces of that size: "
             f"{three_digits(mean(o['without'] for o in random))}, {mean(o['kl'] for o in random):.3f} nats, "
             f"{three_digits(mean(o['alone'] for o in random))} on average; the difference of means, which was told "
             f"the rows: {three_digits(one['without'])} and {three_digits(one['alone'])}; {pca['name']}: "
             f"{three_digits(pca['without'])} and {three_digits(pca['alone'])}.{seen}",
        refuted="Rows that are still made without it, are not made of it alone, or a random subspace that does the "
                "same.")]


def edges_claim(circuit: dict) -> dict:
    "How many edges bring back what the window does, beside other bases."
    n, of, goal = circuit["needed"], circuit["candidates"], circuit["goal"]
    def said(k):
        enough = n[k]["recovered"] >= goal
        return f"{n[k]['n']:,} of {of[k]:,}" if enough else f"not even {of[k]:,}"
    others = {k: n[k]["n"] for k in ("pca", "random") if n[k]["recovered"] >= goal}
    ours = n["found"]["n"] if n["found"]["recovered"] >= goal else None
    least = min(others, key=others.get, default=None)
    if ours is None or least is None: verdict = "The comparison is open."
    elif ours <= others[least]/2: verdict = f"That is at most half of what {WORDS[least]} needs."
    elif ours < others[least]: verdict = f"That is {ours/others[least]:.0%} of what {WORDS[least]} needs, not half."
    else: verdict = f"The found blocks need no fewer edges than {WORDS[least]}: they give no smaller circuit here."
    return dict(
        claim=f"{said('found')} edges between found subspaces bring back {pct(goal)} of what the window does; "
              f"{said('pca')} between PCA's, {said('random')} between those of a random rotation. {verdict}",
        test=f"Only the first edges of a ranking were kept, means in place of the others, the rest of the model "
             f"untouched, on {judged_on(circuit)}, which nothing was fitted on.",
        refuted="A random rotation that needs as few edges.")


def subspace_claim(cards: dict) -> list[dict]:
    "The subspace with the clearest name among those that were tried by intervention."
    tried = [o for some in cards.values() for o in some if o["resampled"] and o["suggested"]]
    if not tried: return []
    best = max(tried, key=lambda o: o["agree"][o["suggested"]]["errors"])
    kl, null, error = (best["resampled"][k] for k in ("kl", "random", "error"))
    used = kl - null > 2*error
    return [dict(
        claim=f"Subspace {best['name']} of {short_site(best['site'])} ({best['d']} dimensions, {pct(best['variance'])} "
              f"of the variance) holds {best['suggested']}"
              + (", and the model uses it." if used else ", but later layers need it no more than a random one."),
        test=f"{best['evidence'][0].upper()}{best['evidence'][1:]}; with another row's coordinates there the model's "
             f"answers move by {kl:.4f} ± {error:.4f} nats a token, by {null:.4f} in a random subspace of the same "
             "size and variance.",
        refuted="Nearest contexts that agree no more than in a random subspace; an exchange that costs no more.")]


def judged_on(circuit: dict) -> str:
    "What circuits are judged on."
    n = circuit["tokens"]["judged"]
    return f"{n:,} answers to prompts" if "behaviour" in circuit else f"{n:,} tokens of the end of the text"


def component_rows(circuit: dict) -> list[dict]:
    "Components, the most needed first."
    costs = {k: v for k, v in circuit["components"].items() if k != "all"}
    return [dict(name=k, kept=k in circuit["alive"], **costs[k]) for k in sorted(costs, key=lambda o: -costs[o]["kl"])]


def needed_rows(circuit: dict) -> list[dict]:
    "For every basis: candidates, edges that bring back enough, and what they do."
    return [dict(name=WORDS[k], of=circuit["candidates"][k], enough=o["recovered"] >= circuit["goal"], **o)
            for k, o in circuit["needed"].items()]


def curves(circuit: dict) -> dict:
    "Share recovered against share of candidate edges, a line for each basis."
    data = []
    for k, points in circuit["curves"].items():
        points = sorted([*points, circuit["needed"][k]], key=lambda o: o["n"])
        data.append(dict(type="scatter", mode="lines+markers", name=WORDS[k], x=[o["n"] for o in points],
                         y=[o["recovered"] for o in points], line=dict(width=1.6, color=COLOURS[k]),
                         text=[f"{WORDS[k]}: {o['n']:,} edges, KL {o['kl']:.4f}" for o in points],
                         hovertemplate="%{text}, %{y:.1%} recovered<extra></extra>"))
    grid = axis | dict(showgrid=True, gridcolor="var(--line)")
    layout = plain | dict(height=340, margin=dict(l=60, r=10, t=6, b=48), showlegend=True,
        legend=dict(orientation="h", y=1.12, x=0), xaxis=grid | dict(title=titled("edges kept"), type="log", dtick=1),
        yaxis=grid | dict(title=titled("share of the window recovered"), tickformat=".0%", range=[-.05, 1.05]))
    return dict(data=data, layout=layout)
