// Everything that is said: numbers with their units, why a slice was chosen, what went wrong and what is allowed.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const NBSP = "\u00a0";

export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}${NBSP}%`;

export const count = (value) => whole.format(value);

export const exactMadds = (madds) => `${whole.format(madds)}${NBSP}MAdds`;

export function shortMadds(madds) {
  const [unit, size] = [["G", 1e9], ["M", 1e6], ["k", 1e3]].find(([, least]) => madds >= least) ?? ["", 1];
  return `${short.format(madds / size)}${unit ? NBSP + unit : ""}`;
}

export const milliseconds = (ms) => `${ms < 10 ? ms.toFixed(2) : ms.toFixed(1)}${NBSP}ms`;

export function probability(share) {
  if (share > 0 && share < 0.001) return `<${NBSP}0.1${NBSP}%`;
  // Only what is certain is called certain.
  return share < 1 && share > 0.9995 ? `>${NBSP}99.9${NBSP}%` : percent(share);
}

const REASONS = {
  forced: () => "You forced this slice; the gate was not asked.",
  accuracy_floor: (wish) => `Raised to keep the accuracy floor${wish}.`,
  compute_budget: (wish) => `Narrowed to stay within the compute budget${wish}.`,
  latency_budget: (wish) => `Narrowed to answer within the latency budget${wish}.`,
  load: (wish) =>
    wish === ""
      ? "The service is under load: it chose for all images alike, without asking the gate."
      : `Narrowed because the service is under load${wish}.`,
  widened: (wish) => `Widened, as it takes no longer${wish}.`,
  policy: () => "The service's policy chose it without asking the gate.",
  gate: () => "The gate looked at the image and chose it; nothing moved it.",
};

export function reason(slice) {
  const wish = slice.gate_width === null ? "" : `; the gate wished for slice ${slice.gate_width}`;
  return (REASONS[slice.reason] ?? (() => `The service gave the reason ${slice.reason}.`))(wish);
}

// Per error type: what happened, and what to do about it.
const PROBLEMS = {
  infeasible_budget: ["No slice fits these budgets.", "The nearest that is allowed:"],
  deadline_exceeded: ["The answer would come too late.", "Allow more time, or let a narrower slice do."],
  queue_full: ["The service is busy.", "It has as many images in work as it takes."],
  draining: ["The service is stopping.", "It takes no new images."],
  loading: ["The model is warming up.", "This takes some seconds after a start."],
  unsupported_media_type: ["This is not an image that the service reads.", "Allowed: JPEG, PNG, WebP, BMP and GIF."],
  bad_image: ["This file cannot be decoded.", "It may be damaged. Allowed: JPEG, PNG, WebP, BMP and GIF."],
  bad_request: ["The service did not accept the request.", ""],
  unauthorized: ["This service asks for an API key.", "Type yours at the top of the page."],
  forbidden: ["This key may not do that.", ""],
  quota: ["The compute quota of this client is spent.", ""],
  not_found: ["The service does not have this model any more.", "Choose another one, or load the page again."],
  too_large: ["This image is too large.", "A smaller copy will do: the network sees a small picture anyway."],
  timeout: ["The image did not arrive in time.", "The connection may be slow. A smaller file arrives sooner."],
  backend: ["The model failed on this image.", "The service's log says why."],
  internal: ["Something in the service went wrong.", "The service's log says what."],
  unreachable: ["The service does not answer.", "It may have stopped, or the network is down."],
};

export function problemWords(problem) {
  const [title, advice] = PROBLEMS[problem.type] ?? [`The service answered with status ${problem.status}.`, ""];
  const wait = problem.retryS === null ? "" : ` Worth trying again in ${problem.retryS}${NBSP}s.`;
  return { title, advice: `${advice}${wait}`.trim() };
}

export function problemDetail(problem) {
  const id = problem.requestId ? `Request ${problem.requestId}.` : "";
  const status = problem.status ? `Status ${problem.status}` : "";
  const said = problem.detail ? `${status ? ": " : ""}${problem.detail}.` : status && ".";
  return `${status}${said} ${id}`.trim();
}

// What a 422 says would be granted.
export function allowedWords(feasible, widestMadds) {
  const { compute_budget: madds, accuracy_floor: floor } = feasible ?? {};
  const words = [];
  if (madds != null) {
    const share = Math.ceil((100 * madds) / widestMadds);
    words.push(`a compute budget of at least ${share}${NBSP}% (${exactMadds(madds)})`);
  }
  if (floor != null) words.push(`an accuracy floor of at most ${percent(floor)}`);
  return words;
}

// Beside the budgets on narrow screens, where the result is out of sight.
export function brief(answer) {
  const [first] = answer.predictions;
  return `Slice ${answer.slice.width}: ${first.label}, ${probability(first.probability)}`;
}

export function spoken(answer) {
  const [first] = answer.predictions;
  const slice = answer.slice;
  return `${first.label}, ${probability(first.probability)}. Slice ${slice.width} of 0 to ${slice.widest}. ${reason(slice)}`;
}
