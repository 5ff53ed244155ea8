// Talking to the service. Paths are relative, so the page works under a proxy's prefix.

export class Problem extends Error {
  constructor(status, body, retryAfter) {
    super(body.error ?? "");
    this.status = status;
    this.type = body.error_type ?? "";
    this.detail = body.error ?? "";
    this.requestId = body.request_id ?? "";
    this.feasible = body.feasible ?? null;
    this.retryS = retryAfter === null ? null : Number(retryAfter);
  }
}

let key = ""; // kept by this page alone, and only while it is open

export const useKey = (given) => {
  key = given;
};

async function ask(path, options = {}) {
  const shown = key ? { Authorization: `Bearer ${key}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...options.headers, ...shown } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, { error_type: "unreachable" }, null);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({})); // a proxy's own error need not be JSON
  throw new Problem(response.status, body ?? {}, response.headers.get("Retry-After"));
}

export const models = async () => (await (await ask("v1/models")).json()).models;

export const model = async (name) => (await ask(`v1/models/${encodeURIComponent(name)}`)).json();

export function budgetHeaders(budget) {
  const headers = {};
  if (budget.compute !== null) headers["Compute-Budget"] = `${budget.compute}%`;
  if (budget.latency !== null) headers["Latency-Budget"] = `${budget.latency}ms`;
  if (budget.floor !== null) headers["Accuracy-Floor"] = `${budget.floor}%`;
  if (budget.width !== "auto") headers["Slice-Width"] = budget.width;
  return headers;
}

export async function classify(name, file, budget, signal) {
  const headers = { ...budgetHeaders(budget), "Content-Type": file.type || "application/octet-stream" };
  const path = `v1/classify?model=${encodeURIComponent(name)}`;
  return (await ask(path, { method: "POST", headers, body: file, signal })).json();
}

export const metrics = async () => (await ask("metrics")).text();

const LABELS = /(\w+)="((?:[^"\\]|\\.)*)"/g;
const IMAGES = /^slicewise_images_total\{((?:\w+="(?:[^"\\]|\\.)*",?)*)\} (\S+)/gm;

// Images answered by one model, by width, over all versions of it that have been served.
export function imagesByWidth(text, name) {
  const counts = new Map();
  for (const [, labels, value] of text.matchAll(IMAGES)) {
    const found = Object.fromEntries([...labels.matchAll(LABELS)].map(([, key, content]) => [key, content]));
    if (found.model === name) counts.set(found.width, (counts.get(found.width) ?? 0) + Number(value));
  }
  return counts;
}
