// The panel at the side: draws a run's figures, at most once a frame.

import { KINDS } from "./stats.js";

const $ = (id) => document.getElementById(id);
let due = null;

export function show(stats, label) {
  const first = due === null;
  due = [stats, label];
  if (first) requestAnimationFrame(() => { const [s, l] = due; due = null; draw(s, l); });
}

function draw(stats, label) {
  $("rate").textContent = stats.rate ? stats.rate.toFixed(stats.rate < 100 ? 1 : 0) : "–";
  $("rate-sub").textContent = `${stats.tokens} tokens in ${stats.seconds.toFixed(2)} s, ${label}`;
  $("accepted").textContent = stats.drafted ? `${Math.round((100 * stats.accepted) / stats.drafted)} %` : "–";
  $("per-pass").textContent = stats.passes ? (stats.tokens / stats.passes).toFixed(2) : "–";
  spark(stats.rates());
  positions(stats);
  lengths(stats.steps.slice(-90));
  mix(stats);
}

function element(name, parent, className) {
  const made = document.createElement(name);
  if (className) made.className = className;
  parent?.append(made);
  return made;
}

function spark(points) {
  const svg = $("spark");
  svg.replaceChildren();
  if (points.length < 2) return;
  const end = points.at(-1)[0], top = Math.max(...points.map((p) => p[1])) * 1.1;
  const line = points.map(([x, y], i) => `${i ? "L" : "M"}${((x / end) * 280).toFixed(1)},${(47 - (y / top) * 45).toFixed(1)}`);
  for (const [d, name] of [[`${line.join("")}L280,48L${((points[0][0] / end) * 280).toFixed(1)},48Z`, "area"], [line.join(""), ""]]) {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", d);
    if (name) path.setAttribute("class", name);
    svg.append(path);
  }
}

function positions(stats) {
  const box = $("positions");
  box.replaceChildren();
  const shares = stats.reached.map((reached, i) => stats.right[i] / reached).slice(0, 16);
  shares.forEach((share, i) => {
    const item = element("div", box, "bar-item");
    item.title = `position ${i + 1}: ${stats.right[i]} of ${stats.reached[i]} accepted`;
    if (shares.length <= 9) element("span", item).textContent = Math.round(100 * share);
    element("i", item).style.height = `${(46 * share).toFixed(1)}px`;
    element("span", item).textContent = i + 1;
  });
  const told = shares.map((share, i) => `position ${i + 1}: ${Math.round(100 * share)} percent`);
  box.setAttribute("aria-label", told.join(", ") || "no drafts yet");
}

function lengths(steps) {
  const box = $("lengths"), top = Math.max(4, ...steps.map((step) => step.drafted));
  box.replaceChildren();
  for (const step of steps) {
    const column = element("span", box);
    column.title = step.drafted ? `${step.accepted} of ${step.drafted} accepted` : "not drafted";
    if (!step.drafted) element("i", column, "none");
    if (step.accepted) element("i", column, "yes").style.height = `${(100 * step.accepted) / top}%`;
    if (step.drafted > step.accepted) element("i", column, "no").style.height = `${(100 * (step.drafted - step.accepted)) / top}%`;
  }
  const mean = steps.length ? steps.reduce((sum, step) => sum + step.drafted, 0) / steps.length : 0;
  box.setAttribute("aria-label", `mean draft length ${mean.toFixed(1)} over ${steps.length} passes`);
}

function mix(stats) {
  const box = $("mix");
  box.replaceChildren();
  for (const kind of KINDS) {
    $(`n-${kind}`).textContent = stats.kinds[kind];
    if (stats.kinds[kind]) element("i", box, kind).style.width = `${(100 * stats.kinds[kind]) / stats.tokens}%`;
  }
}
