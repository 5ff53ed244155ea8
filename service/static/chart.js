// Accuracy against cost of every slice, with the limits of the budgets and the slice of the last image.

import { svg } from "./dom.js";
import { percent, shortMadds } from "./text.js";

const HEIGHT = 250;
const MARGIN = { left: 54, right: 22, top: 22, bottom: 42 };

// Round numbers that cover low..high, about `about` of them.
function ticks(low, high, about) {
  const rough = (high - low) / about;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const first = Math.floor(low / step + 1e-9);
  const last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: last - first + 1 }, (_, index) => (first + index) * step);
}

const scale = (domain, range) => (value) =>
  range[0] + ((value - domain[0]) / (domain[1] - domain[0])) * (range[1] - range[0]);

function frame(slices, width) {
  const accuracies = slices.map((slice) => slice.accuracy);
  const low = Math.min(...accuracies);
  const high = Math.max(...accuracies);
  const room = Math.max(0.005, 0.15 * (high - low));
  const yTicks = ticks(Math.max(0, low - room), Math.min(1, high + room), 4);
  const xTicks = ticks(0, slices.at(-1).madds_served, width < 420 ? 3 : 6);
  const right = width - MARGIN.right;
  const bottom = HEIGHT - MARGIN.bottom;
  const x = scale([0, xTicks.at(-1)], [MARGIN.left, right]);
  const y = scale([yTicks[0], yTicks.at(-1)], [bottom, MARGIN.top]);
  return { x, y, xTicks, yTicks, right, bottom };
}

function axes({ x, y, xTicks, yTicks, right, bottom }) {
  const digits = yTicks[1] - yTicks[0] < 0.0099 ? 1 : 0;
  const parts = yTicks.flatMap((tick) => [
    svg("line", { class: "grid", x1: MARGIN.left, x2: right, y1: y(tick), y2: y(tick) }),
    svg("text", { x: MARGIN.left - 8, y: y(tick) + 4, "text-anchor": "end" }, percent(tick, digits)),
  ]);
  for (const tick of xTicks) {
    parts.push(svg("text", { x: x(tick), y: bottom + 18, "text-anchor": "middle" }, shortMadds(tick)));
  }
  const title = "MAdds per image";
  parts.push(svg("text", { x: (MARGIN.left + right) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, title));
  return parts;
}

// Dashed lines where the budgets cut.
function limits({ x, y, xTicks, yTicks, right, bottom }, budget) {
  const parts = [];
  if (budget.madds !== null && budget.madds <= xTicks.at(-1)) {
    const at = x(budget.madds);
    parts.push(svg("line", { class: "limit", x1: at, x2: at, y1: MARGIN.top, y2: bottom }));
  }
  if (budget.floor !== null && budget.floor >= yTicks[0] && budget.floor <= yTicks.at(-1)) {
    const at = y(budget.floor);
    parts.push(svg("line", { class: "limit", x1: MARGIN.left, x2: right, y1: at, y2: at }));
  }
  return parts;
}

function points({ x, y }, slices, served) {
  const path = slices.map((slice) => `${x(slice.madds_served)},${y(slice.accuracy)}`).join(" ");
  const parts = [svg("polyline", { class: "curve", points: path })];
  for (const slice of slices) {
    const [cx, cy] = [x(slice.madds_served), y(slice.accuracy)];
    const isServed = slice.width === served;
    if (isServed) parts.push(svg("circle", { class: "halo", cx, cy, r: 10 }));
    parts.push(svg("circle", { class: isServed ? "point served" : "point", cx, cy, r: isServed ? 6 : 4 }));
    parts.push(svg("text", { class: isServed ? "name served" : "name", x: cx, y: cy - 14 }, String(slice.width)));
  }
  return parts;
}

function described(slices, served) {
  const each = slices.map((slice) => `slice ${slice.width}: ${shortMadds(slice.madds_served)} MAdds, ${percent(slice.accuracy)}`);
  const image = served === null ? "" : ` The last image ran through slice ${served}.`;
  return `Accuracy against cost. ${each.join("; ")}.${image}`;
}

// budget: {madds, floor}, null where there is no limit. served: the last image's width, or null.
export function drawCurve(target, slices, served, budget) {
  const width = Math.max(280, Math.round(target.parentElement.clientWidth));
  const shape = frame(slices, width);
  target.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  target.setAttribute("aria-label", described(slices, served));
  target.replaceChildren(...axes(shape), ...limits(shape, budget), ...points(shape, slices, served));
}
