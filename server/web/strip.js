// One request on the contact sheet: a strip of film with a frame for each image.

import { className } from "./classes.js";
import { element } from "./dom.js";

export const SEEDS = 2 ** 32;

/** An undeveloped frame: one transparent pixel. */
export const BLANK = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7";

export function decodeBase64(text, format) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: `image/${format}` });
}

/** Show a picture of few pixels as what it is. */
export function sharpen(image) {
  image.addEventListener("load", () => image.classList.toggle("pixelated", image.naturalWidth < 128));
  return image;
}

export class Strip {
  /**
   * `request` is the body that was sent; `label` names its class until the server does. `onSelect(strip, index)` is called
   * for a click on a frame, `onChange(strip)` after each change.
   */
  constructor(request, label, { onSelect, onChange }) {
    const count = Math.min(Math.max(Math.trunc(request.num_images ?? 1), 1), 64) || 1;
    Object.assign(this, { request, label, onChange, state: "waiting", message: "", timings: null, images: [] });
    this.abort = new AbortController();
    this.title = element("h3");
    this.print = element("p");
    this.frames = Array.from({ length: count }, (_, index) => this.makeFrame(index, onSelect));
    this.node = element(
      "li",
      { class: "strip" },
      element("div", { class: "strip-head" }, this.title, this.print),
      element("ol", { class: "frames" }, ...this.frames.map((frame) => frame.node)),
    );
    this.update();
  }

  makeFrame(index, onSelect) {
    const image = sharpen(element("img", { alt: "", src: BLANK, draggable: false, class: "pixelated" }));
    const button = element("button", { type: "button", class: "frame", "aria-pressed": "false" }, image);
    const progress = element("progress", { max: 1, value: 0, "aria-label": `Image ${index + 1}` });
    const edge = element("span", { class: "edge" });
    button.addEventListener("click", () => onSelect(this, index));
    return { image, button, edge, progress, node: element("li", {}, button, edge, progress), url: null, step: 0 };
  }

  get running() {
    return this.state === "waiting" || this.state === "generating";
  }

  get steps() {
    return this.request.steps ?? 0;
  }

  get name() {
    return this.label.split(",")[0];
  }

  /** The picture of a frame, final or on its way. */
  setPicture(index, blob) {
    const frame = this.frames[index];
    if (!frame) return;
    if (frame.url) URL.revokeObjectURL(frame.url);
    frame.url = URL.createObjectURL(blob);
    frame.image.src = frame.url;
  }

  setStep(index, done, steps) {
    const frame = this.frames[index];
    if (!frame) return;
    this.request.steps = steps;
    this.state = "generating";
    frame.step = Math.max(frame.step, done); // a preview comes later than its step
    frame.progress.max = steps;
    frame.progress.value = frame.step;
    this.update();
  }

  /** The answer has come: take its pictures and the settings as the server resolved them. */
  finish({ images, timings, ...resolved }) {
    this.state = "done";
    Object.assign(this, { timings, images });
    for (const name of ["class_id", "class_name", "seed", "steps", "guidance_scale", "sampler", "format"]) {
      if (resolved[name] !== undefined) this.request[name] = resolved[name];
    }
    this.label = className({ id: this.request.class_id, name: this.request.class_name });
    images.forEach((image, index) => this.setPicture(index, decodeBase64(image, this.request.format)));
    this.update();
  }

  end(state, message) {
    this.state = state;
    this.message = message;
    this.update();
  }

  update() {
    const { seed, steps, sampler, guidance_scale: guidance } = this.request;
    this.title.textContent = this.name;
    const guided = guidance !== undefined && guidance !== 1;
    const ended = this.state === "cancelled" || this.state === "failed";
    const parts = [steps && `${steps} ${sampler ?? ""}`, guided && `guidance ${guidance}`, ended && this.state];
    this.print.textContent = parts.filter(Boolean).join(" · ");
    for (const [index, frame] of this.frames.entries()) {
      frame.seed = seed >= 0 ? ((seed % SEEDS) + index) % SEEDS : "random"; // until the server has chosen one
      frame.edge.textContent = frame.seed;
      frame.button.setAttribute("aria-label", `${this.name}, seed ${frame.seed}`);
      frame.progress.hidden = !this.running;
    }
    this.node.dataset.state = this.state;
    this.onChange(this);
  }

  select(index) {
    this.frames.forEach((frame, i) => frame.button.setAttribute("aria-pressed", String(i === index)));
  }

  remove() {
    this.abort.abort();
    for (const { url } of this.frames) if (url) URL.revokeObjectURL(url);
    this.node.remove();
  }
}
