// Making and finding elements. Styles are set by classes and attributes alone: the page's policy forbids inline ones.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  node.append(...children);
  return node;
}

export const element = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);

export const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

// A share 0..1 as a horizontal bar; the number beside it is what screen readers get.
export function bar(share, kind = "") {
  const width = `${(100 * Math.min(1, Math.max(0, share))).toFixed(2)}%`;
  return svg(
    "svg",
    { class: `bar ${kind}`.trim(), "aria-hidden": "true" },
    svg("rect", { class: "rail", width: "100%", height: "100%" }),
    svg("rect", { class: "level", width, height: "100%" }),
  );
}
