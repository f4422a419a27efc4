"use strict";
const $ = id => document.getElementById(id), about = JSON.parse($("about").textContent), live = about.mode === "live";
const fields = ["site", "subspace", "other", "metric", "threshold", "n", "before", "after", "shading"];
const state = Object.assign({}, about.asked);
let latest = 0, tokens = about.tokens || {};

function make(tag, attributes = {}, ...children) {
  const o = tag === "svg" || make.svg.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) k === "onclick" ? o.addEventListener("click", v) : o.setAttribute(k, v);
  o.append(...children);
  return o;
}
make.svg = new Set(["rect", "line", "text", "g", "title"]);

const percent = x => x >= .1 || x === 0 ? `${Math.round(100*x)}%` : `${(100*x).toFixed(1)}%`;
const here = () => about.sites.find(o => o.site === state.site);
const words = o => o.replace("blocks.", "x").replace(".hook_resid_", ".");

// ## The link: everything that was asked, after the #

function readLink() {
  const given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const unknown = Object.keys(given).find(o => !(o in about.asked));
  Object.assign(state, about.asked, unknown ? {} : given);
  defaults();
  if (unknown) say(`“${unknown}” is nothing a link can say: this is the first view instead.`);
}
function defaults() {
  state.site = state.site || about.sites[0].site;
  const at = here();
  if (at) state.subspace = state.subspace || at.subspaces[0].name;
  if (!state.text && state.row === "") state.row = "0";
  if (!live && !chosenQuery()) Object.assign(state, query(about.queries[0].query));
  if (!live) state.n = String(Math.min(Number(state.n) || about.n, about.n));
}
function hash() {
  const kept = Object.entries(state).filter(([k, v]) => v !== about.asked[k] && v !== "");
  return "#" + new URLSearchParams(kept);
}
const query = o => typeof o === "string" ? {text: o, at: "", row: ""} : {row: String(o), text: "", at: ""};
const asText = o => typeof o === "string" ? o : String(o);
const chosenQuery = () => about.queries.find(o => asText(o.query) === (state.text || state.row));

// ## Asking: a server, or what the page carries

const asking = {views: new Map()};
async function ask(path, given) {
  if (!live) return kept(path, given);
  const address = path + "?" + new URLSearchParams(given), views = path === "view";
  if (views && asking.views.has(address)) return asking.views.get(address);
  const reply = await fetch(address), found = await reply.json();
  if (!reply.ok) throw new Error(found.error);
  if (views) asking.views.set(address, found);
  if (asking.views.size > 50) asking.views.delete(asking.views.keys().next().value);
  return found;
}
function kept(path, o) {
  const key = JSON.stringify([o.site, o.subspace, o.metric, o.text || o.row]);
  if (path === "attribution") {
    if (!about.shares[key + o.shading]) throw new Error(`This page holds no shading “${o.shading}”: choose ${["off", ...about.shadings].join(", ")}.`);
    return about.shares[key + o.shading];
  }
  if (!about.views[key]) throw new Error("This page holds chosen queries, sites and measures only; subspace-circuits explore opens all of them.");
  return cut(about.views[key], o);
}
function cut(view, o) {
  // The page carries the nearest few: a threshold chooses among them.
  if (o.threshold === "") return Object.assign({}, view, {neighbours: view.neighbours.slice(0, o.n)});
  const limit = Number(o.threshold);
  if (!Number.isFinite(limit)) throw new Error(`threshold “${o.threshold}”: use a number`);
  const near = view.neighbours.filter(x => o.metric === "cosine" ? x.value >= limit : x.value <= limit);
  return Object.assign({}, view, {neighbours: near.length ? near.slice(0, o.n) : view.neighbours.slice(0, 3), empty: !near.length, count: near.length, most: near.length === view.neighbours.length});
}
function asked(subspace, shading = true) {
  const o = Object.assign({}, state, {subspace});
  if (!shading) for (const k of ["shading", "other", "before", "after"]) delete o[k];
  for (const [k, v] of Object.entries(about.asked)) if (o[k] === v && (k !== "row")) delete o[k];
  return live ? o : Object.assign({}, state, {subspace});
}

// ## Drawing

function say(text) { $("error").textContent = text; $("error").hidden = !text; }

function token(id, classes = "") {
  const o = make("span", {class: "token " + classes});
  o.textContent = tokens[id];
  return o;
}
function shade(element, share, value) {
  if (share === undefined) return;
  element.style.background = `rgba(var(--${share < 0 ? "against" : "for"}), ${Math.min(.85, Math.abs(share)*.85).toFixed(3)})`;
  element.title = `${share < 0 ? "−" : "+"}${Math.abs(share).toFixed(3)} of ${value.toFixed(3)}`;
}
const shareAt = (o, at, i) => o && at - i >= 0 && at - i < o.shares.length ? o.shares[o.shares.length - 1 - (at - i)] : undefined;

function drawQuery(view, shares) {
  const o = view.query, box = $("query");
  box.replaceChildren(...o.ids.map((id, i) => {
    const x = token(id, i === o.at ? "here" : "");
    x.addEventListener("click", () => go(o.row === null ? {at: String(i)} : {row: String(o.row + i - o.at)}));
    if (shares) shade(x, shareAt(shares.query, o.at, i), shares.query.value);
    return x;
  }));
  box.classList.toggle("spaced", !Object.values(tokens).some(x => x.startsWith(" ") || x.startsWith("▁")));
  const place = o.row === null ? "typed text" : `row ${o.row.toLocaleString("en")}, document ${o.document.toLocaleString("en")}`;
  $("where").textContent = `“${tokens[o.ids[o.at]]}” at position ${o.position} · ${place}`;
}

function drawGlance(view) {
  const head = make("tr", {}, make("th", {}, "seen by"), ...about.variables.map(v => make("th", {}, {token: "same token", "previous token": "same token before"}[v] || "same " + v)));
  const rows = here().subspaces.map(s => {
    const of = view.glance[s.name], shares = about.variables.map(v => of ? of[v] : null), most = Math.max(...shares);
    return make("tr", {class: s.name === state.subspace ? "on" : "", tabindex: 0, onclick: () => go({subspace: s.name})}, make("th", {}, s.name), ...about.variables.map((v, i) => {
      if (!of) return make("td", {}, "–");
      const fill = make("i"), best = shares[i] === most && most >= .5;
      fill.style.width = `${100*shares[i]}%`;
      const known = s.sees[v] ? `; on average ${percent(s.sees[v].share)} over 100 rows` : "";
      return make("td", {class: best ? "most" : "", title: `${percent(shares[i])} of the 20 nearest contexts, in other documents${known}`}, make("span", {class: "bar" + (best ? " most" : "")}, fill), percent(shares[i]));
    }));
  });
  const chance = make("tr", {class: "chance"}, make("th", {}, "any context"), ...about.variables.map(v => make("td", {}, percent(view.chance[v]))));
  $("glance").replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows, chance));
  $("glance-note").textContent = "Of the 20 nearest contexts in each subspace, those that share this with the query. What they share, the subspace holds.";
}

function drawHistogram(view) {
  const {lo, hi, counts} = view.histogram, w = 340, h = 64, most = Math.log1p(Math.max(...counts)), x = v => 4 + (v - lo)/(hi - lo)*(w - 8);
  const svg = make("svg", {viewBox: `0 0 ${w} ${h + 16}`, role: "img", "aria-label": "Similarities to the whole store", onclick: e => {
    const r = svg.getBoundingClientRect(), v = lo + ((e.clientX - r.left)/r.width*w - 4)/(w - 8)*(hi - lo);
    go({threshold: String(Number(Math.min(hi, Math.max(lo, v)).toPrecision(3)))});
  }});
  const width = (w - 8)/counts.length;
  counts.forEach((c, i) => {
    if (!c) return;
    const y = h*Math.log1p(c)/most, bar = make("rect", {class: "column", x: 4 + i*width, y: h - y, width: Math.max(width - .6, .5), height: y}), at = lo + (hi - lo)*i/counts.length;
    bar.append(make("title", {}, `${at.toFixed(2)} to ${(at + (hi - lo)/counts.length).toFixed(2)}: ${c.toLocaleString("en")} rows`));
    svg.append(bar);
  });
  svg.append(make("line", {class: "base", x1: 0, x2: w, y1: h, y2: h}));
  for (const o of view.neighbours) svg.append(make("line", {class: "tick", x1: x(o.value), x2: x(o.value), y1: h, y2: h + 5}));
  if (state.threshold !== "" && Number.isFinite(Number(state.threshold))) svg.append(make("line", {class: "cut", x1: x(Number(state.threshold)), x2: x(Number(state.threshold)), y1: 0, y2: h}));
  for (const [v, anchor] of [[lo, "start"], [(lo + hi)/2, "middle"], [hi, "end"]]) svg.append(make("text", {x: x(v), y: h + 15, "text-anchor": anchor}, String(Number(v.toPrecision(2)))));
  return make("figure", {}, svg, make("figcaption", {class: "soft"}, `${state.metric === "cosine" ? "Cosine" : "Distance"} to all ${about.rows.toLocaleString("en")} rows, counts on a log scale. Click to set a threshold.`));
}

function drawContext(o, view, shares) {
  const q = view.query, share = shares && shares[o.row], before = Number(state.before), after = Number(state.after);
  const part = (from, to) => o.ids.slice(Math.max(from, 0), Math.max(to, 0)).map((id, i) => {
    const at = Math.max(from, 0) + i, x = token(id, (at === o.at ? "here " : "") + (q.ids[q.at + at - o.at] === id ? "same" : ""));
    if (share) shade(x, shareAt(share, o.at, at), share.value);
    return x;
  });
  const number = (text, classes, title = "") => make("span", {class: "number " + classes, title}, text);
  const context = make("button", {class: "context", type: "button", onclick: () => go({row: String(o.row), text: "", at: ""}), title: `row ${o.row}, document ${o.document}`},
    number(o.value.toFixed(3), "", share ? `with average tokens ${share.baseline.toFixed(3)}; the shares miss the change by ${share.error} after ${share.steps} steps` : ""),
    make("span", {class: "left"}, ...part(o.at - before, o.at)), make("span", {class: "middle"}, ...part(o.at, o.at + 1)), make("span", {class: "right"}, ...part(o.at + 1, o.at + 1 + after)),
    number(String(o.position), o.position === q.position ? "same" : ""), number(o.norm.toPrecision(3), "norm"));
  if (!live && !about.queries.some(x => x.query === o.row)) { context.setAttribute("aria-disabled", "true"); context.addEventListener("click", e => e.stopImmediatePropagation(), true); }
  return make("li", {}, context);
}

function explain(view, shares) {
  if (!shares) return "";
  const all = view.neighbours.map(o => shares[o.row]).filter(Boolean), mean = k => all.reduce((s, o) => s + o[k], 0)/all.length;
  if (!all.length) return "";
  const name = state.metric === "cosine" ? "cosine" : "minus the distance";
  return `With average tokens at the same positions the ${name} would be ${mean("baseline").toFixed(2)}; the tokens make it ${mean("value").toFixed(2)}. Largest completeness error ${Math.max(...all.map(o => o.error))}${all.some(o => o.error > .01*(state.metric === "cosine" ? 1 : view.query.norm)) ? " (not converged)" : ""}, ${Math.max(...all.map(o => o.steps))} steps.`;
}

function drawSide(name, view, shares) {
  const s = here().subspaces.find(o => o.name === name), wide = Object.values(tokens).some(x => x.startsWith(" ") || x.startsWith("▁"));
  const within = `${state.metric === "cosine" ? "cosine at least" : "distance at most"} ${state.threshold}`;
  const many = view.count === null || view.count === undefined ? `The ${view.neighbours.length} nearest contexts` : view.empty ? `No context has a ${within}. The nearest instead:` : `${view.count.toLocaleString("en")}${view.most ? " or more" : ""} context${view.count === 1 ? "" : "s"} with a ${within}`;
  const approximate = s.recall ? `, found with recall ${s.recall}` : "";
  const headline = make("div", {class: "headline"}, make("div", {}, make("h3", {}, name), make("p", {class: "soft"}, `${s.size} dimensions · the query's norm here is ${view.query.norm.toPrecision(3)}`),
    make("p", {class: "count"}, many + (view.count == null ? approximate : "")), make("p", {class: "soft explained"}, explain(view, shares))), drawHistogram(view));
  const head = make("li", {}, make("span", {class: "head"}, ...[state.metric === "cosine" ? "cosine" : "distance", "", "", "", "position", "norm"].map(o => make("span", {}, o))));
  return make("section", {class: "side" + (shares ? " shaded" : ""), "data-subspace": name}, headline, make("ol", {class: "contexts tokens" + (wide ? "" : " spaced")}, head, ...view.neighbours.map(o => drawContext(o, view, shares))));
}

function drawControls() {
  const option = (value, text, chosen) => { const o = make("option", {value}, text); o.selected = value === chosen; return o; };
  const names = here().subspaces.map(o => o.name);
  $("site").replaceChildren(...about.sites.map(o => option(o.site, `${words(o.site)} – ${o.site}`, state.site)));
  $("subspace").replaceChildren(...here().subspaces.map(o => option(o.name, `${o.name} (${o.size})`, state.subspace)));
  $("other").replaceChildren(option("", "nothing", state.other), ...names.filter(o => o !== state.subspace).map(o => option(o, o, state.other)));
  for (const o of ["metric", "threshold", "n", "before", "after", "shading", "row", "text"]) if (document.activeElement !== $(o) || $(o).tagName === "SELECT") $(o).value = state[o];
  if (!live) {
    for (const o of $("metric").options) o.hidden = !about.metrics.includes(o.value);
    for (const o of $("shading").options) o.hidden = o.value !== "off" && !about.shadings.includes(o.value);
    $("chosen").replaceChildren(...about.queries.map(o => {
      const c = o.context;
      return option(asText(o.query), (typeof o.query === "number" ? `row ${o.query}: ` : "") + c.ids.slice(Math.max(0, c.at - 5), c.at).map(i => tokens[i]).join(" ") + ` [${tokens[c.ids[c.at]].trim() || "␣"}] ` + c.ids.slice(c.at + 1, c.at + 3).map(i => tokens[i]).join(" "), state.text || state.row);
    }));
  }
}

async function refresh() {
  const turn = ++latest, started = performance.now(), names = [state.subspace, ...(state.other && state.other !== state.subspace ? [state.other] : [])];
  document.body.setAttribute("aria-busy", "true");
  $("sides").classList.add("busy");
  try {
    if (!here()) throw new Error(`no site “${state.site}” here: use one of ${about.sites.map(o => o.site).join(", ")}`);
    const views = await Promise.all(names.map(o => ask("view", asked(o, false))));
    if (turn !== latest) return;
    for (const o of views) Object.assign(tokens, o.tokens || {});
    drawControls();
    draw(names, views, views.map(() => null));
    say("");
    document.body.dataset.milliseconds = (performance.now() - started).toFixed(1);
    if (state.shading !== "off") {
      const shares = names.map(() => ({})), rows = views.map(o => o.neighbours.map(x => x.row)), most = Math.max(...rows.map(o => o.length));
      for (let first = -4; first < (live ? most : 0); first += 4) { // the query first, then four contexts at a time
        const parts = await Promise.all(names.map((o, i) => attribution(o, first < 0 ? [] : rows[i].slice(first, first + 4))));
        if (turn !== latest) return;
        parts.forEach((o, i) => Object.assign(shares[i], o));
        draw(names, views, shares);
        if (first < 0) document.body.dataset.shaded = turn;
      }
    }
  } catch (e) { if (turn === latest) say(e.message); }
  finally {
    if (turn === latest) { document.body.setAttribute("aria-busy", "false"); $("sides").classList.remove("busy"); document.body.dataset.turn = turn; }
  }
}
const attribution = (name, rows) => ask("attribution", Object.assign(asked(name), live ? {rows: rows.join(",")} : {}));

function draw(names, views, shares) {
  drawQuery(views[0], shares[0]);
  drawGlance(views[0]);
  $("sides").className = names.length > 1 ? "two" : "";
  $("sides").replaceChildren(...names.map((o, i) => drawSide(o, views[i], shares[i])));
}

function go(changes) {
  if (changes.site && changes.site !== state.site) Object.assign(changes, {subspace: "", other: ""});
  if (changes.metric && changes.metric !== state.metric) changes.threshold = "";
  Object.assign(state, changes);
  if (state.other === state.subspace) state.other = "";
  defaults();
  if (about.mode !== "cell") history.replaceState(null, "", hash());
  return refresh();
}

// ## Controls

for (const o of fields) $(o).addEventListener("change", () => go({[o]: $(o).value}));
function step(by) {
  const names = here().subspaces.map(o => o.name);
  go({subspace: names[(names.indexOf(state.subspace) + by + names.length) % names.length]});
}
$("previous").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));
$("row").addEventListener("change", () => go({row: $("row").value, text: "", at: ""}));
$("chosen").addEventListener("change", () => go(query(about.queries[$("chosen").selectedIndex].query)));
const runText = () => $("text").value.trim() && go({text: $("text").value.trim(), at: "", row: ""});
async function row(path, given) {
  try { go({row: String((await ask(path, given)).row), text: "", at: ""}); } catch (e) { say(e.message); }
}
const find = () => row("find", {text: $("search").value, after: state.row || "-1"});
$("run").addEventListener("click", runText);
$("find").addEventListener("click", find);
$("random").addEventListener("click", () => row("random", {}));
for (const [id, act] of [["text", runText], ["search", find]]) $(id).addEventListener("keydown", e => { if (e.key === "Enter") { e.preventDefault(); act(); } });
$("controls").addEventListener("submit", e => e.preventDefault());
$("link").addEventListener("click", async () => {
  try { await navigator.clipboard.writeText(location.href); $("link").textContent = "Copied"; } catch { say(`The browser does not let the page copy: the link is in the address bar.`); }
  setTimeout(() => { $("link").textContent = "Copy link"; }, 1500);
});
async function load() {
  say("");
  readLink();
  const refused = $("error").textContent;
  await refresh();
  if (refused && $("error").hidden) say(refused);
}
addEventListener("hashchange", load);
document.addEventListener("keydown", e => {
  if (["INPUT", "SELECT"].includes(document.activeElement.tagName) || e.ctrlKey || e.metaKey || e.altKey) return;
  if (e.key === "ArrowLeft") step(-1);
  if (e.key === "ArrowRight") step(1);
});

$("subtitle").textContent = `${about.title} · ${about.rows.toLocaleString("en")} rows`;
for (const o of ["before", "after", "n"]) $(o).max = about.most[o];
load();
