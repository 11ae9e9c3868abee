// A combobox over the classes (the ARIA pattern with a listbox popup): type a part of a name or a number.

import { announce, element, plural } from "./dom.js";

const DEBOUNCE_MS = 120;

export const className = ({ id, name }) => name || `class ${id}`;

export class ClassPicker {
  /** `search(query, signal)` resolves to a list of `{id, name}`, best first. */
  constructor(input, list, search) {
    Object.assign(this, { input, list, search, found: [], active: -1, chosen: null, pending: null, timer: 0 });
    input.addEventListener("input", () => this.typed());
    input.addEventListener("keydown", (event) => this.key(event));
    input.addEventListener("click", () => this.open());
    input.addEventListener("focus", () => input.select());
    input.addEventListener("blur", () => this.close());
    // The list must not take the focus from the input, or the click would close it first.
    list.addEventListener("pointerdown", (event) => event.preventDefault());
    list.addEventListener("click", (event) => {
      const option = event.target.closest("[role=option]");
      if (option) this.choose(this.found[Number(option.dataset.index)]);
    });
  }

  /** What the request should say: the class chosen, a number typed, or a name for the server to resolve. */
  value() {
    const text = this.input.value.trim();
    if (this.chosen) return { class_id: this.chosen.id };
    if (/^\d+$/.test(text)) return { class_id: Number(text) };
    return text ? { class_name: text } : {};
  }

  label() {
    return this.chosen ? className(this.chosen) : this.input.value.trim();
  }

  choose(item) {
    this.chosen = item;
    this.input.value = className(item);
    this.close();
    this.input.dispatchEvent(new Event("change", { bubbles: true }));
  }

  clear() {
    this.chosen = null;
    this.input.value = "";
    this.close();
  }

  /** Show the name that the server gave to the number that is still in the field. */
  learn({ class_id, class_name }) {
    if (this.input.value.trim() !== String(class_id) || document.activeElement === this.input) return;
    this.chosen = { id: class_id, name: class_name };
    this.input.value = className(this.chosen);
  }

  get isOpen() {
    return !this.list.hidden;
  }

  typed() {
    this.chosen = null;
    this.searching = true;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.open(), DEBOUNCE_MS);
  }

  async open() {
    this.pending?.abort();
    const pending = (this.pending = new AbortController());
    try {
      // With a class chosen, the list is for choosing another: show them all.
      const found = await this.search(this.chosen ? "" : this.input.value.trim(), pending.signal);
      if (pending.signal.aborted || document.activeElement !== this.input) return;
      this.show(found);
    } catch (error) {
      if (error.name !== "AbortError") this.close(); // a search that fails leaves plain text, which the server judges
    }
  }

  show(found) {
    this.found = found;
    this.searching = false;
    this.list.replaceChildren(
      ...found.map((item, index) =>
        element(
          "li",
          { id: `class-option-${index}`, role: "option", "aria-selected": "false", "data-index": index },
          element("span", {}, item.name || "(no name)"),
          element("span", { class: "number" }, String(item.id)),
        ),
      ),
    );
    this.list.hidden = found.length === 0;
    this.input.setAttribute("aria-expanded", String(this.isOpen));
    this.mark(-1);
    announce(found.length ? `${plural(found.length, "class")}` : "no class found");
  }

  close() {
    this.searching = false;
    clearTimeout(this.timer);
    this.pending?.abort();
    this.list.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
    this.mark(-1);
  }

  mark(index) {
    this.list.children[this.active]?.setAttribute("aria-selected", "false");
    this.active = index;
    const option = this.list.children[index];
    option?.setAttribute("aria-selected", "true");
    option?.scrollIntoView({ block: "nearest" });
    if (option) this.input.setAttribute("aria-activedescendant", option.id);
    else this.input.removeAttribute("aria-activedescendant");
  }

  async key(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) {
      event.preventDefault();
      if (!this.isOpen) await this.open();
      const count = this.found.length;
      if (this.isOpen && count) this.mark(this.active < 0 && step < 0 ? count - 1 : (this.active + step + count) % count);
    } else if (event.key === "Enter" && this.isOpen && this.active >= 0) {
      event.preventDefault(); // takes the option; without one, Enter sends the form
      this.choose(this.found[this.active]);
    } else if (event.key === "Escape") {
      if (this.isOpen || this.searching) this.close();
      else this.clear();
    } else if (event.key === "Enter") this.close();
  }
}
