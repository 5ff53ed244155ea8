// The page's state and what moves it: an image, the budgets, the model, the clock.

import { byId } from "./dom.js";
import { Slider, computeStops, floorStops, latencyStops } from "./sliders.js";
import * as view from "./view.js";
import * as wire from "./wire.js";

const SETTLE_MS = 120; // a slider that is being dragged sends one request, not fifty
const POLL_MS = 2000;
const LATELY_MS = 60_000;
const PAGE_IMAGES = 50;

const state = {
  info: null, // the chosen model, as GET /v1/models/{model} shows it
  file: null,
  url: null, // of the preview
  served: null, // width of the last image
  widths: [], // of this page's latest images, oldest first
  samples: [], // of the service's counters: {at, counts}, oldest first
  problem: null,
  sending: null, // AbortController of the request in work
};
const sliders = {};
let settling = 0;
let starting = 0;
let polling = false;

function budget() {
  return {
    compute: sliders.compute.value,
    latency: sliders.latency.value,
    floor: sliders.floor.value,
    width: byId("width").value,
  };
}

function drawCurve() {
  if (!state.info) return;
  const { compute, floor } = budget();
  const widest = state.info.slices.at(-1).madds_served;
  const limits = {
    madds: compute === null ? null : Math.floor((compute / 100) * widest),
    floor: floor === null ? null : floor / 100,
  };
  view.showCurve(state.info, state.served, limits);
}

function drawMix() {
  if (!state.info) return;
  const own = new Map();
  for (const width of state.widths) own.set(width, (own.get(width) ?? 0) + 1);
  const latest = state.samples.at(-1)?.counts ?? new Map();
  const before = state.samples[0]?.counts ?? new Map();
  const lately = new Map([...latest].map(([width, images]) => [width, images - (before.get(width) ?? 0)]));
  view.showMix(state.info, [own, lately, latest]);
}

async function classify() {
  if (!state.file || !state.info) return;
  state.sending?.abort();
  const sending = (state.sending = new AbortController());
  try {
    const answer = await wire.classify(state.info.name, state.file, budget(), sending.signal);
    if (answer.version !== state.info.version) await chooseModel(answer.model); // it was replaced meanwhile
    if (sending.signal.aborted) return;
    state.served = answer.slice.width;
    state.widths = [...state.widths, String(answer.slice.width)].slice(-PAGE_IMAGES);
    state.problem = null;
    view.showAnswer(answer, state.info);
  } catch (error) {
    if (error.name === "AbortError" || sending.signal.aborted) return;
    fail(error);
  }
  drawCurve();
  drawMix();
}

function fail(error) {
  if (!(error instanceof wire.Problem)) throw error;
  state.problem = error;
  state.served = null;
  if (error.status === 401) view.showKeyField();
  view.showProblem(error, state.info);
}

function budgetMoved() {
  for (const slider of Object.values(sliders)) slider.show();
  drawCurve();
  clearTimeout(settling);
  settling = setTimeout(classify, SETTLE_MS);
}

function take(file) {
  if (!file) return;
  if (state.url) URL.revokeObjectURL(state.url);
  state.file = file;
  state.url = URL.createObjectURL(file);
  view.showImage(state.url);
  view.showImageName(file.name);
  classify();
}

// The nearest budgets that the service named. A floor that it does not mention may stay beside a new ceiling.
function applyAllowed() {
  const { compute_budget: madds, accuracy_floor: floor } = state.problem.feasible;
  const widest = state.info.slices.at(-1).madds_served;
  if (madds !== null) sliders.compute.moveTo((100 * madds) / widest);
  if (floor !== null) sliders.floor.moveTo(100 * floor);
  else if (madds === null) sliders.floor.loosen();
  budgetMoved();
}

function reset() {
  for (const slider of Object.values(sliders)) slider.loosen();
  byId("width").value = "auto";
  budgetMoved();
}

async function chooseModel(name) {
  const info = await wire.model(name);
  if (byId("model").value !== name) return; // another one has been picked meanwhile
  state.info = info;
  Object.assign(state, { served: null, widths: [], samples: [] });
  view.showModel(state.info);
  sliders.floor.setStops(floorStops(state.info.slices));
  drawCurve();
  drawMix();
}

function modelPicked() {
  state.sending?.abort(); // an answer of the former model would be shown as the new one's
  chooseModel(byId("model").value).then(classify, fail);
}

async function start() {
  clearTimeout(starting);
  try {
    const models = await wire.models();
    if (!models.length) throw new wire.Problem(404, { error_type: "not_found" }, null);
    view.showModels(models, models[0].name);
    await chooseModel(models[0].name);
  } catch (error) {
    fail(error);
    if (error.status === 503 || error.status === 0) starting = setTimeout(start, 1000 * (error.retryS ?? 2));
    return;
  }
  state.problem = null;
  view.showNothing();
  classify();
  if (!polling) poll();
}

async function poll() {
  polling = true;
  const { info } = state;
  if (document.visibilityState === "visible") {
    const at = performance.now();
    const taken = await wire.metrics().then((text) => wire.imagesByWidth(text, info.name), () => null);
    if (taken && state.info === info) addSample(at, taken);
  }
  setTimeout(poll, POLL_MS);
}

function addSample(at, counts) {
  const before = state.samples.at(-1)?.counts ?? new Map();
  // Counters that fell belong to a service that has started anew.
  if ([...before].some(([width, images]) => (counts.get(width) ?? 0) < images)) state.samples = [];
  state.samples = [...state.samples.filter((sample) => at - sample.at <= LATELY_MS), { at, counts }];
  drawMix();
}

const again = () => (state.info ? classify() : start());

function listen() {
  for (const id of ["compute", "latency", "floor", "width"]) byId(id).addEventListener("input", budgetMoved);
  byId("reset").addEventListener("click", reset);
  byId("apply").addEventListener("click", applyAllowed);
  byId("retry").addEventListener("click", again);
  byId("key-field").addEventListener("submit", (event) => {
    event.preventDefault();
    wire.useKey(byId("key").value.trim());
    again();
  });
  byId("model").addEventListener("change", modelPicked);
  byId("file").addEventListener("change", () => take(byId("file").files[0]));
  byId("preview").addEventListener("error", view.hideImage);
  document.addEventListener("paste", (event) => take(event.clipboardData?.files[0]));
  // Anywhere on the page: a drop that just misses would otherwise leave the page for the image.
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    byId("drop").classList.add("over");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) byId("drop").classList.remove("over");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    byId("drop").classList.remove("over");
    take(event.dataTransfer?.files[0]);
  });
  new ResizeObserver(drawCurve).observe(byId("curve").parentElement);
}

sliders.compute = new Slider("compute", computeStops(), true);
sliders.latency = new Slider("latency", latencyStops(), true);
sliders.floor = new Slider("floor", [], false);
byId("page-span").textContent = `last ${PAGE_IMAGES}`;
listen();
start();
