// The class field: names as suggestions of the browser, and what a request says of what is in it.

import { byId, element, randomBelow } from "./dom.js";

export const className = ({ id, name }) => name || `class ${id}`;

let shown = new Map(); // class id to what the field holds for it: its name, or the id where no name decides

/** Offer `classes`, each `{id, name}`; another checkpoint may have others. */
export function offerClasses(classes) {
  const names = classes.map(({ name }) => name);
  const decides = (name) => name && names.indexOf(name) === names.lastIndexOf(name);
  shown = new Map(classes.map(({ id, name }) => [id, decides(name) ? name : String(id)]));
  const options = classes.map(({ id, name }) => element("option", { value: shown.get(id), label: `${name} ${id}` }));
  byId("class-list").replaceChildren(...options);
}

export function chooseClass(id) {
  byId("class").value = shown.get(id) ?? id ?? "";
  byId("class").dispatchEvent(new Event("change", { bubbles: true }));
}

export const chooseRandomClass = () => shown.size && chooseClass(randomBelow(shown.size));

/** What the request should say: a number, or a name for the server to resolve. */
export function chosenClass() {
  const text = byId("class").value.trim();
  if (/^\d+$/.test(text)) return { class_id: Number(text) };
  return text ? { class_name: text } : {};
}
