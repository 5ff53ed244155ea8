// Sliders over a list of stops, one of which is "none": index on the input, value and words here.

import { byId } from "./dom.js";

const NONE = { value: null, text: "none" };
const NBSP = "\u00a0";
const LATENCIES_MS = [1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 40, 50, 75, 100, 150, 200, 300, 500, 1000];
const FLOOR_STEP = 0.5;
const FLOOR_MARGIN = 3; // stops this far beyond what the slices reach, in percentage points

export class Slider {
  // looseLast: the stop "none" is the last one, as for ceilings; else the first one, as for floors.
  constructor(id, stops, looseLast) {
    this.input = byId(id);
    this.output = byId(`${id}-value`);
    this.looseLast = looseLast;
    this.setStops(stops);
  }

  setStops(stops) {
    this.stops = this.looseLast ? [...stops, NONE] : [NONE, ...stops];
    this.input.max = String(this.stops.length - 1);
    this.input.disabled = stops.length === 0;
    this.loosen();
  }

  get value() {
    return this.stops[Number(this.input.value)].value;
  }

  loosen() {
    this.#move(this.looseLast ? this.stops.length - 1 : 0);
  }

  // The least stop that is not below `value`; for a floor the greatest that is not above it.
  moveTo(value) {
    const fits = (stop) => stop.value !== null && (this.looseLast ? stop.value >= value : stop.value <= value);
    const found = this.looseLast ? this.stops.findIndex(fits) : this.stops.findLastIndex(fits);
    if (found < 0) this.loosen();
    else this.#move(found);
  }

  show() {
    const { text } = this.stops[Number(this.input.value)];
    this.output.textContent = text;
    this.input.setAttribute("aria-valuetext", text);
  }

  #move(index) {
    this.input.value = String(index);
    this.show();
  }
}

export const computeStops = () =>
  Array.from({ length: 100 }, (_, index) => ({ value: index + 1, text: `${index + 1}${NBSP}%` }));

export const latencyStops = () => LATENCIES_MS.map((value) => ({ value, text: `${value}${NBSP}ms` }));

// Around the accuracies that the slices have: elsewhere a floor would not tell them apart.
export function floorStops(slices) {
  const accuracies = slices.map((slice) => slice.accuracy);
  if (accuracies.includes(null)) return [];
  const least = Math.max(1, Math.floor(100 * Math.min(...accuracies)) - FLOOR_MARGIN);
  const most = Math.min(100, Math.ceil(100 * Math.max(...accuracies)) + FLOOR_MARGIN);
  return Array.from({ length: Math.round((most - least) / FLOOR_STEP) + 1 }, (_, index) => {
    const value = least + FLOOR_STEP * index;
    return { value, text: `${value.toFixed(1)}${NBSP}%` };
  });
}
