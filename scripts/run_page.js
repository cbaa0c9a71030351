// The page of scripts/plot.py: values under the pointer, runs shown and hidden, light and dark. The charts are there without it.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const svgs = [...document.querySelectorAll("svg[data-chart]")];
const hidden = new Set();
const NS = "http://www.w3.org/2000/svg";

function add(svg, name, attributes) {
  const element = document.createElementNS(NS, name);
  for (const key in attributes) element.setAttribute(key, attributes[key]);
  svg.append(element);
  element.classList.add("mark");
}

function clear() {
  for (const mark of document.querySelectorAll(".mark")) mark.remove();
  tip.classList.add("hidden");
}

function say(event, title, rows) {
  tip.replaceChildren();
  const head = document.createElement("b");
  head.textContent = title;
  tip.append(head);
  for (const [color, name, value, range] of rows) {
    const row = document.createElement("div"), swatch = document.createElement("i"), label = document.createElement("span");
    swatch.style.background = color;
    label.textContent = name;
    const number = document.createElement("span");
    number.className = "value";
    number.textContent = value;
    row.append(swatch, label, number);
    if (range) {
      const from = document.createElement("span");
      from.textContent = range;
      row.append(from);
    }
    tip.append(row);
  }
  tip.classList.remove("hidden");
  const box = tip.getBoundingClientRect(), gap = 16;
  tip.style.left = Math.max(4, event.clientX + gap + box.width > innerWidth ? event.clientX - gap - box.width : event.clientX + gap) + "px";
  tip.style.top = Math.max(4, Math.min(event.clientY + gap, innerHeight - box.height - 4)) + "px";
}

const digits = value => Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(5)));
const color = run => `var(--s${run})`;

// The point of a series whose step is nearest.
function nearest(points, step) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < step) low = middle; else high = middle;
  }
  return Math.abs(points[low][0] - step) <= Math.abs(points[high][0] - step) ? points[low] : points[high];
}

function hoverLine(event, svg, chart, x) {
  const step = chart.first + (x - chart.left) / chart.plot * (chart.last - chart.first);
  for (const other of svgs) {
    const c = data.charts[other.dataset.chart];
    if (c.kind !== "line") continue;
    add(other, "line", {x1: x, x2: x, y1: c.top, y2: c.bottom, class: "cross"});
    for (const series of c.runs) {
      if (hidden.has(series.run)) continue;
      const point = nearest(series.points, step);
      const reach = Math.abs(point[0] - step) / (c.last - c.first) * c.plot;
      if (point[1] === null || reach > 40) continue;
      const y = c.top + (c.bottom - c.top) * (1 - (point[1] - c.low) / (c.high - c.low));
      if (y >= c.top - 4)
        add(other, "circle", {cx: c.left + c.plot * (point[0] - c.first) / (c.last - c.first), cy: y, r: 4, class: `dot f${series.run}`});
    }
  }
  const rows = [];
  for (const series of chart.runs) {
    if (hidden.has(series.run)) continue;
    const point = nearest(series.points, step);
    if (Math.abs(point[0] - step) / (chart.last - chart.first) * chart.plot > 40) continue;
    rows.push([point[1] === null ? 0 : point[1], color(series.run), data.names[series.run],
               point[1] === null ? "not finite" : digits(point[1]), point.length > 2 && point[1] !== null ? `${digits(point[2])} to ${digits(point[3])}` : ""]);
  }
  rows.sort((a, b) => b[0] - a[0]);
  if (rows.length) say(event, `step ${Math.round(step).toLocaleString("en")}`, rows.map(row => row.slice(1)));
}

function hoverLoad(event, svg, chart, x, y) {
  if (x < chart.left || x > chart.right) return;
  for (const [layer, row] of Object.entries(chart.layers)) {
    if (y < row.top || y >= row.top + chart.tall) continue;
    const columns = chart.steps.length, wide = (chart.right - chart.left) / columns, tall = chart.tall / row.experts;
    const column = Math.min(columns - 1, Math.floor((x - chart.left) / wide)), expert = Math.floor((y - row.top) / tall);
    row.decoded = row.decoded || atob(row.bytes);
    const index = row.decoded.charCodeAt(expert * columns + column), level = (index - 127) / 127 * chart.range;
    const [first, last] = chart.steps[column];
    const value = index === 255 ? "no tokens" : (index === 0 ? "\u2264 " : index === 254 ? "\u2265 " : "") + (2 ** level).toPrecision(3) + "\u00d7 the mean";
    add(svg, "rect", {x: chart.left + column * wide, y: row.top + expert * tall, width: wide, height: tall, class: "cell"});
    say(event, first === last ? `step ${first.toLocaleString("en")}` : `steps ${first.toLocaleString("en")} to ${last.toLocaleString("en")}`,
        [[index > 127 ? "var(--more)" : "var(--less)", `layer ${layer}, expert ${expert}`, value]]);
  }
}

for (const svg of svgs) {
  const chart = data.charts[svg.dataset.chart];
  svg.addEventListener("pointerleave", clear);
  svg.addEventListener("pointermove", event => {
    clear();
    const said = event.target.dataset && event.target.dataset.tip;
    if (said) return say(event, said, []);
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
    if (chart.kind === "line" && x >= chart.left && x <= chart.left + chart.plot) hoverLine(event, svg, chart, x);
    if (chart.kind === "load") hoverLoad(event, svg, chart, x, y);
  });
}

for (const button of document.querySelectorAll("button[data-run]"))
  button.addEventListener("click", () => {
    const run = Number(button.dataset.run), off = !hidden.has(run);
    if (off) hidden.add(run); else hidden.delete(run);
    button.classList.toggle("off", off);
    button.setAttribute("aria-pressed", String(!off));
    for (const element of document.querySelectorAll(`g[data-run="${run}"], figure[data-run="${run}"]`)) element.classList.toggle("hidden", off);
  });

document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
