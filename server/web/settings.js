// The form: settings of a request, and its errors.

import { chooseClass, chosenClass } from "./classes.js";
import { byId, element, randomBelow } from "./dom.js";

const SEEDS = 2 ** 32;
const NUMBERS = ["seed", "num_images", "steps", "guidance_scale"];
const CHOICES = ["sampler", "format"];
// Fields of the request that share one control.
const CONTROL_OF = { class_id: "class", class_name: "class" };

export class Settings {
  constructor() {
    this.lock = byId("seed-lock");
    byId("seed-random").addEventListener("click", () => this.newSeed());
    // A seed that was typed is kept.
    byId("seed").addEventListener("input", () => this.keepSeed(true));
    this.lock.addEventListener("click", () => this.keepSeed(!this.seedIsKept));
    byId("controls").addEventListener("input", (event) => this.clearError(event.target.id));
    byId("controls").addEventListener("change", (event) => this.clearError(event.target.id));
    this.newSeed();
  }

  /** Offer what the server does, with its defaults. */
  describe({ defaults, limits, samplers, formats, guidance }) {
    const options = (names) => names.map((name) => element("option", { value: name }, name));
    byId("sampler").replaceChildren(...options(samplers));
    byId("format").replaceChildren(...options(formats));
    byId("guidance_scale").disabled = !guidance;
    byId("num_images").max = limits.max_images_per_request;
    for (const [name, value] of Object.entries(defaults)) byId(name).value = value;
  }

  get seedIsKept() {
    return this.lock.getAttribute("aria-pressed") === "true";
  }

  keepSeed(keep) {
    this.lock.setAttribute("aria-pressed", String(keep));
  }

  newSeed() {
    byId("seed").value = randomBelow(SEEDS);
    this.clearError("seed");
  }

  /** The body of the request, or null after marking a field that holds no number. */
  read() {
    const body = chosenClass();
    for (const name of NUMBERS) {
      const input = byId(name);
      if (input.validity.badInput) {
        this.showError(name, `${name} must be a number`);
        return null;
      }
      if (input.value !== "") body[name] = Number(input.value);
    }
    for (const name of CHOICES) if (byId(name).value) body[name] = byId(name).value;
    return body;
  }

  /** Fill the form with the settings of a picture, whose seed is then kept. */
  apply({ class_id, class_name, ...rest }) {
    this.clearErrors();
    chooseClass(class_id);
    for (const [name, value] of Object.entries(rest)) if (byId(name)) byId(name).value = value;
    this.keepSeed(true);
  }

  /** Show an error at its field and go there; false if the form has no such field. */
  showError(field, message) {
    const name = CONTROL_OF[field] ?? field;
    const control = byId(name);
    const place = byId(`${name}-error`);
    if (!control || !place) return false;
    control.setAttribute("aria-invalid", "true");
    place.textContent = message;
    control.focus();
    return true;
  }

  clearError(name) {
    const place = byId(`${name}-error`);
    if (!place) return;
    byId(name).removeAttribute("aria-invalid");
    place.textContent = "";
  }

  clearErrors() {
    for (const name of ["class", ...NUMBERS, ...CHOICES]) this.clearError(name);
    byId("form-error").textContent = "";
  }
}
