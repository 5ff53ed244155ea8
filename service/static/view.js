// State of the page -> what is seen. Nothing here talks to the service.

import { drawCurve } from "./chart.js";
import { bar, byId, element } from "./dom.js";
import * as text from "./text.js";

const STAGES = { decode: "Decode", queue: "Queue", trunk: "Trunk", body: "Body", total: "Total" };

export function showKeyField() {
  byId("key-field").hidden = false;
  byId("key").focus();
}

export function showModels(models, chosen) {
  byId("model").replaceChildren(...models.map((model) => element("option", { value: model.name }, model.name)));
  byId("model").value = chosen;
  byId("model-field").hidden = models.length < 2;
}

export function showModel(info) {
  byId("model-line").textContent =
    `${info.name}, version ${info.version}: ${info.slices.length} slices, ${info.classes.length} classes`;
  const slices = info.slices.map((slice) =>
    element("option", { value: slice.width }, `${slice.width} (${text.shortMadds(slice.madds_served)} MAdds)`),
  );
  byId("width").replaceChildren(element("option", { value: "auto" }, "automatic"), ...slices);
}

export function showImage(url) {
  byId("preview").src = url;
  byId("preview").hidden = false;
}

// The browser cannot draw the file; whether the service can read it is for the service to say.
export function hideImage() {
  byId("preview").hidden = true;
}

export function showImageName(name) {
  byId("preview").alt = `The chosen image, ${name}`;
  byId("drop-text").textContent = name;
}

function showOnly(id) {
  for (const part of ["empty", "problem", "answer"]) byId(part).hidden = part !== id;
}

export function showNothing() {
  showOnly("empty");
}

export function showAnswer(answer, info) {
  showOnly("answer");
  byId("classes").replaceChildren(...answer.predictions.map(classRow));
  const { slice } = answer;
  byId("slice-width").textContent = String(slice.width);
  byId("slice-range").textContent = `(0 is the narrowest, ${slice.widest} the widest)`;
  byId("reason").textContent = text.reason(slice);
  byId("reason-code").textContent = slice.reason;
  byId("madds").textContent = text.exactMadds(slice.madds);
  byId("madds-share").textContent = `= ${text.percent(slice.madds / info.slices.at(-1).madds_served)} of the widest`;
  byId("accuracy").textContent =
    slice.accuracy === null ? "not measured" : `${text.percent(slice.accuracy)} for this slice on the test split`;
  byId("stage-rows").replaceChildren(...Object.keys(STAGES).map((stage) => stageRow(stage, answer.timings_ms)));
  byId("announce").textContent = text.spoken(answer);
  byId("brief").textContent = text.brief(answer);
}

function classRow(prediction, index) {
  return element(
    "li",
    { class: index ? "" : "first" },
    element("span", { class: "label" }, prediction.label),
    bar(prediction.probability, index ? "" : "strong"),
    element("span", { class: "number" }, text.probability(prediction.probability)),
  );
}

function stageRow(stage, timings) {
  return element(
    "tr",
    stage === "total" ? { class: "total" } : {},
    element("th", { scope: "row" }, STAGES[stage]),
    element("td", { class: "wide" }, stage === "total" ? "" : bar(timings[stage] / timings.total)),
    element("td", { class: "number" }, text.milliseconds(timings[stage])),
  );
}

export function showProblem(problem, info) {
  showOnly("problem");
  const { title, advice } = text.problemWords(problem);
  const allowed = info ? text.allowedWords(problem.feasible, info.slices.at(-1).madds_served) : [];
  byId("problem-title").textContent = title;
  byId("problem-advice").textContent = advice;
  byId("problem-allowed").replaceChildren(...allowed.map((words) => element("li", {}, words)));
  byId("problem-detail").textContent = text.problemDetail(problem);
  byId("apply").hidden = problem.feasible === null;
  // The same request may do better a moment later.
  byId("retry").hidden = problem.status !== 0 && problem.status !== 429 && problem.status < 500;
  byId("announce").textContent = "";
  byId("brief").textContent = title;
}

export function showCurve(info, served, budget) {
  const isMeasured = info.slices.every((slice) => slice.accuracy !== null);
  byId("curve").toggleAttribute("hidden", !isMeasured);
  byId("curve-note").textContent = isMeasured
    ? "Each point is a slice, by its index: accuracy on the test split, cost with the gate. Dashed: the budgets."
    : "The accuracies of this model are not measured.";
  if (isMeasured) drawCurve(byId("curve"), info.slices, served, budget);
}

const sum = (counts) => [...counts.values()].reduce((total, images) => total + images, 0);

// mixes: images by width, of this page, of the service lately, and of the service since its start.
export function showMix(info, mixes) {
  const totals = mixes.map(sum);
  const cell = (counts, total, width) => {
    const images = counts.get(width) ?? 0;
    const share = total ? images / total : 0;
    const words = total ? `${text.count(images)} · ${text.percent(share, 0)}` : "–";
    return element("td", {}, bar(share), element("span", { class: "number" }, words));
  };
  const rows = info.slices.map(({ width }) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, String(width)),
      ...mixes.map((counts, index) => cell(counts, totals[index], String(width))),
    ),
  );
  byId("mix-rows").replaceChildren(...rows);
}
