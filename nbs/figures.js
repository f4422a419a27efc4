// Draws the figures of a page from their data: in the theme of the page, and no wider than can be read there.
(() => {
const isDark = () => document.body.classList.contains("quarto-dark")
  || !document.body.classList.contains("quarto-light") && matchMedia("(prefers-color-scheme: dark)").matches;
const brush = document.createElement("canvas").getContext("2d");

// A colour on a dark page: lightness turned around, so that what was near the page is near it again. What has a hue
// of its own stays as light as it was, except in a scale, whose order must not change.
function turned(colour, inScale) {
  brush.fillStyle = "#010203";
  brush.fillStyle = colour;
  if (brush.fillStyle === "#010203") return colour; // no colour
  const [r, g, b, alpha = 1] = brush.fillStyle.match(/^#(..)(..)(..)$/)?.slice(1).map(o => parseInt(o, 16)/255)
    ?? brush.fillStyle.match(/[\d.]+/g).map((o, i) => i < 3 ? o/255 : +o);
  const top = Math.max(r, g, b), low = Math.min(r, g, b), chroma = top - low, l = (top + low)/2;
  const h = 60*(!chroma ? 0 : top === r ? (g - b)/chroma + 6 : top === g ? (b - r)/chroma + 2 : (r - g)/chroma + 4);
  const dark = .13 + .78*(1 - l), light = chroma > .25 && !inScale ? Math.max(dark, Math.min(l, .65)) : dark;
  const s = Math.min(.85, chroma/(1 - Math.abs(2*light - 1)));
  brush.fillStyle = `hsla(${h.toFixed(0)}, ${(100*s).toFixed(0)}%, ${(100*light).toFixed(0)}%, ${alpha})`;
  return brush.fillStyle; // as Plotly reads it everywhere
}

function themed(value, key = "", inColour = false) {
  if (/colou?r(scale|way)?$/i.test(key)) inColour = key.toLowerCase().endsWith("scale") ? "scale" : "colour";
  if (typeof value === "string") return inColour ? turned(value, inColour === "scale") : value;
  if (Array.isArray(value)) return value.map(o => themed(o, "", inColour));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([k, o]) => [k, themed(o, k, inColour)]));
}

// Panels that stand side by side, one below the other.
function stacked(layout) {
  const ends = Object.keys(layout).filter(o => /^xaxis\d*$/.test(o)).map(o => o.slice(5));
  const panels = ends.map(o => [layout["xaxis" + o], layout["yaxis" + o]])
    .sort((a, b) => (a[0].domain?.[0] ?? 0) - (b[0].domain?.[0] ?? 0));
  if (panels.length < 2 || panels.some(([, y]) => !y || y.domain && (y.domain[0] > .01 || y.domain[1] < .99))) return false;
  const height = panels.length*layout.height, below = 90/height;
  const titles = (layout.annotations ?? []).filter(o => o.yref === "paper" && o.y === 1).sort((a, b) => a.x - b.x);
  panels.forEach(([x, y], i) => {
    const high = 1 - i*(1 + below)/panels.length, low = high - (1 + below)/panels.length + below;
    [x.domain, y.domain, y.showticklabels] = [[0, 1], [Math.max(low, 0), high], true];
    if (titles.length === panels.length) Object.assign(titles[i], { x: .5, y: high });
  });
  layout.height = height;
  return true;
}

function draw(box) {
  box.spec ??= box.querySelector("script").textContent;
  let { data, layout } = JSON.parse(box.spec);
  const room = box.clientWidth, wanted = layout.width ?? room;
  const least = layout.meta.least ?? (layout.showlegend === false || !data.some(o => o.name) ? .62 : .5)*wanted; // narrower, words lie on each other
  if (room < least && stacked(layout)) layout.width = room;
  else layout.width = Math.max(Math.min(room, wanted), Math.min(least, wanted));
  if (layout.meta.least) layout.width = Math.max(room, least);
  if (room < 560 && data.some(o => o.name) && layout.showlegend !== false && !layout.legend?.orientation) {
    layout.legend = { ...layout.legend, orientation: "h", x: 0, y: 0, yref: "container", yanchor: "bottom" };
    layout.margin = { ...layout.margin, b: (layout.margin?.b ?? 50) + 75 };
    layout.height += 60;
  }
  if (isDark()) ({ data, layout } = { data: themed(data), layout: themed(layout) });
  layout.font ??= {};
  if (isDark()) layout.font.color ??= "#e6e7e9";
  layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0, 0, 0, 0)";
  box.drawn = [room, isDark()].join();
  Plotly.react(box.plot ??= box.appendChild(document.createElement("div")), data, layout, { displayModeBar: false });
}

function drawAll() {
  for (const box of document.querySelectorAll(".figure-data"))
    if (box.clientWidth && box.drawn !== [box.clientWidth, isDark()].join()) draw(box);
  for (const frame of document.querySelectorAll("iframe[srcdoc]")) frame.style.colorScheme = isDark() ? "dark" : "light";
}

drawAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
new MutationObserver(drawAll).observe(document.body, { attributeFilter: ["class"] });
addEventListener("resize", drawAll);
})();
