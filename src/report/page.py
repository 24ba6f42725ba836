"""The page that a report is: its looks, and what moves on it. All of it stands in the one file; it asks for nothing else."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple


class Section(NamedTuple):
    """A part of a page; one without `content` is left out."""

    name: str
    title: str
    content: str


STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf8; --card: #fff; --ink: #21242a; --soft: #6a6f78; --edge: #dedbd5; --mark: #2f5fb3;
  --running: #2f5fb3; --finished: #2a7d46; --stopped: #a8620b;
  --line-0: #2f6fc4; --line-1: #d2691e; --line-2: #2e8b57; --line-3: #b0479a;
  --line-4: #8a6d1f; --line-5: #12919b; --line-6: #c0392b; --line-7: #6b5fc7;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16181c; --card: #1e2126; --ink: #e4e3df; --soft: #9a9fa8; --edge: #34383f; --mark: #7fa9ee;
    --running: #7fa9ee; --finished: #74c48f; --stopped: #e0a257;
    --line-0: #6fa8f5; --line-1: #f09a5b; --line-2: #66c28f; --line-3: #dd85cc;
    --line-4: #cfb04f; --line-5: #4fc7d1; --line-6: #f07a6d; --line-7: #a79df3;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1440px; padding: 16px clamp(12px, 2.5vw, 36px) 48px; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 26px; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 36px 0 12px; font-size: 19px; }
h3 { margin: 16px 0 6px; font-size: 15px; }
p { margin: 6px 0; }
a { color: var(--mark); }
[hidden] { display: none !important; }
.soft, figcaption, .legend, dt { color: var(--soft); }
.state { padding: 1px 10px; border: 1.5px solid; border-radius: 99px; font-weight: 600; }
.state.running { color: var(--running); } .state.finished { color: var(--finished); } .state.stopped { color: var(--stopped); }
.head { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px 18px; margin: 14px 0; }
.facts dd { margin: 0; font-size: 19px; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.facts dt { font-size: 13px; }
progress { width: 100%; height: 8px; accent-color: var(--mark); }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-top: 8px; }
.player { padding: 12px; border: 1px solid var(--edge); border-radius: 8px; background: var(--card); }
.controls { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center; margin-bottom: 12px; }
.controls input { flex: 1 1 200px; min-width: 0; accent-color: var(--mark); }
.controls output { min-width: 15em; font-variant-numeric: tabular-nums; }
button, select { padding: 5px 14px; border: 1px solid var(--edge); border-radius: 6px; background: var(--paper);
  color: inherit; font: inherit; max-width: 100%; }
.frame, .pictures { display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-start; }
.frame figure, .pictures figure { margin: 0; max-width: 100%; overflow-x: auto; }
.frame figcaption, .pictures figcaption { font-size: 13px; overflow-wrap: anywhere; }
img { display: block; max-width: 100%; height: auto; border-radius: 3px; }
@media (max-width: 640px) {
  .frame figure:not(:only-child) { width: calc(50% - 7px); }
  .frame:has(figure[hidden]) figure { width: auto; }
}
.wide { min-width: 600px; }
.pictures img { width: auto; max-height: 440px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); gap: 14px; }
.chart { margin: 0; padding: 10px 12px; border: 1px solid var(--edge); border-radius: 8px; background: var(--card);
  min-width: 0; }
.chart figcaption { color: var(--ink); font-weight: 600; }
.chart output { float: right; color: var(--soft); font-weight: 400; }
svg { display: block; width: 100%; height: auto; touch-action: pan-y; cursor: crosshair; }
svg text { fill: var(--soft); font-size: 12px; }
.rule { stroke: var(--edge); stroke-width: 0.7; } .axis, .pointer { stroke: var(--soft); }
svg path { fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linejoin: round; } circle { fill: currentColor; }
.legend { display: flex; flex-wrap: wrap; gap: 0 14px; margin: 2px 0 0; padding: 0; list-style: none; font-size: 13px; }
.legend li { overflow-wrap: anywhere; } .legend b { color: var(--ink); font-weight: 500; font-variant-numeric: tabular-nums; }
.legend i { display: inline-block; width: 10px; height: 10px; margin-right: 5px; border-radius: 2px; }
pre { margin: 8px 0; padding: 10px 12px; border: 1px solid var(--edge); border-radius: 6px; background: var(--card);
  font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
pre.command { user-select: all; }
ul.names { margin: 6px 0; padding-left: 20px; } ul.names li { overflow-wrap: anywhere; }
summary { cursor: pointer; }
footer { margin-top: 40px; font-size: 13px; color: var(--soft); }
"""

SCRIPT = """
"use strict";
// Samples through time: a slider, a button that plays, arrow keys, and a chooser of the class.
for (const player of document.querySelectorAll(".player")) {
  const slider = player.querySelector("input"), told = player.querySelector("output");
  const button = player.querySelector("button"), chooser = player.querySelector("select");
  const frames = [...player.querySelectorAll(".frame")];
  let playing = null;
  const show = () => {
    frames.forEach((frame, i) => { frame.hidden = i !== Number(slider.value); });
    told.textContent = frames[slider.value].dataset.told;
    if (chooser) for (const sheet of player.querySelectorAll("figure"))
      sheet.hidden = chooser.value !== "all" && sheet.dataset.name !== chooser.value;
  };
  const stop = () => { clearInterval(playing); playing = null; button.textContent = "Play"; };
  const go = (by) => {
    slider.value = Math.max(0, Math.min(frames.length - 1, Number(slider.value) + by));
    show();
    if (Number(slider.value) === frames.length - 1) stop();
  };
  button.onclick = () => {
    if (playing) return stop();
    if (Number(slider.value) === frames.length - 1) { slider.value = 0; show(); }
    button.textContent = "Stop";
    playing = setInterval(() => go(1), 400);
  };
  slider.oninput = () => { stop(); show(); };
  if (chooser) chooser.onchange = show;
  addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.altKey || event.ctrlKey || event.metaKey || event.target.matches("input, select")) return;
    stop();
    go(by);
  });
  show();
}
// The values of a chart at the pointer, in its legend.
const short = (value) => {
  if (value && Math.abs(value) < 1e-3) return value.toExponential(3).replace(/\\.?0*e/, "e");
  for (const [size, unit, by] of [[1e9, "G", 1e9], [1e6, "M", 1e6], [1e4, "k", 1e3]])
    if (Math.abs(value) >= size) return Number((value / by).toPrecision(4)) + unit;
  return String(Number(value.toPrecision(4)));
};
for (const figure of document.querySelectorAll(".chart")) {
  const { left, right, width, low, high, lines } = JSON.parse(figure.querySelector("script").textContent);
  const svg = figure.querySelector("svg"), pointer = svg.querySelector(".pointer"), told = figure.querySelector("output");
  const values = [...figure.querySelectorAll("b")], latest = values.map((value) => value.textContent);
  const nearest = (points, x) => points.reduce((best, one) => Math.abs(one[0] - x) < Math.abs(best[0] - x) ? one : best);
  const move = (event) => {
    const box = svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width * width - left) / (right - left);
    const x = nearest(lines.map((points) => nearest(points, low + share * (high - low))), low + share * (high - low))[0];
    const at = left + (right - left) * (x - low) / (high - low);
    pointer.setAttribute("x1", at);
    pointer.setAttribute("x2", at);
    pointer.setAttribute("visibility", "visible");
    told.textContent = "at " + short(x);
    lines.forEach((points, i) => {
      const y = nearest(points, x)[1];
      values[i].textContent = y === null ? "not finite" : short(y);
    });
  };
  svg.addEventListener("pointermove", move);
  svg.addEventListener("pointerdown", move);
  svg.addEventListener("pointerleave", () => {
    pointer.setAttribute("visibility", "hidden");
    told.textContent = "";
    values.forEach((value, i) => { value.textContent = latest[i]; });
  });
}
// How long ago it was, and whether a run that says it is running has gone quiet.
for (const time of document.querySelectorAll("time")) {
  const minutes = (Date.now() / 1000 - Number(time.dataset.seconds)) / 60;
  const ago = minutes < 90 ? Math.round(minutes) + " min" : minutes < 2880 ? Math.round(minutes / 60) + " h"
    : Math.round(minutes / 1440) + " days";
  if (minutes >= 1) time.textContent += ", " + ago + " before this page was opened";
  if (minutes > 60) for (const hint of document.querySelectorAll(".quiet")) hint.hidden = false;
}
"""


def page(title: str, head: str, sections: Sequence[Section], foot: str) -> str:
    """One HTML file of `head` (HTML, as `foot` and the sections' contents), and sections with links to them."""
    there = [section for section in sections if section.content]
    links = "".join(f'<a href="#{section.name}">{escape(section.title)}</a>' for section in there)
    body = "\n".join(
        f'<section id="{section.name}"><h2>{escape(section.title)}</h2>\n{section.content}</section>' for section in there
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>{head}
<nav>{links}</nav></header>
<main>
{body}
</main>
<footer>{foot}</footer>
<script>{SCRIPT}</script>
</body>
</html>
"""
