// Small helpers around the DOM, and words for numbers.

export const byId = (id) => document.getElementById(id);

/** An element with properties set on it (`class`, `aria-*`, `data-*` and `role` as attributes) and children. */
export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class" || name === "role" || name.includes("-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

/** `<dt>` and `<dd>` pairs inside `<div>`s, as a `<dl>` wants them; long texts get a row of their own. */
export function pairs(entries) {
  return entries.map(([term, text]) =>
    element("div", { class: text.length > 16 ? "wide" : "" }, element("dt", {}, term), element("dd", {}, text)),
  );
}

/** Tell people who listen rather than look. */
export function announce(text) {
  byId("status").textContent = text;
}

export const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

export function bytes(count) {
  if (count < 1e3) return `${count} B`;
  if (count < 1e6) return `${(count / 1e3).toFixed(1)} kB`;
  if (count < 1e9) return `${(count / 1e6).toFixed(1)} MB`;
  return `${(count / 1e9).toFixed(2)} GB`;
}

export const seconds = (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`);

export const randomBelow = (bound) => Math.floor(Math.random() * bound);
