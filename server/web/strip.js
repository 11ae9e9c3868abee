// One request on the contact sheet: a strip of film with a frame for each image.

import { className } from "./class_picker.js";
import { element } from "./dom.js";

export const SEEDS = 2 ** 32;

const MEDIA_TYPE = { png: "image/png", jpeg: "image/jpeg", webp: "image/webp" };
const GRAIN = 32;
const TONES = ["#1b2022", "#2c3437", "#465053"];

/** An undeveloped frame: noise of three tones that depends on the seed alone, as a data URL. */
export function grain(seed) {
  const canvas = element("canvas", { width: GRAIN, height: GRAIN });
  const context = canvas.getContext("2d");
  let state = seed >>> 0; // of a mulberry32 generator
  for (let i = 0; i < GRAIN * GRAIN; i++) {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    context.fillStyle = TONES[((mixed ^ (mixed >>> 14)) >>> 0) % TONES.length];
    context.fillRect(i % GRAIN, Math.floor(i / GRAIN), 1, 1);
  }
  return canvas.toDataURL();
}

export function decodeBase64(text, format) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: MEDIA_TYPE[format] });
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
    Object.assign(this, { request, label, onChange, state: "waiting", message: "", timings: null, savedAt: 0 });
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
    const seed = ((this.request.seed ?? 0) + index) % SEEDS;
    const image = sharpen(element("img", { alt: "", src: grain(seed), draggable: false, class: "pixelated" }));
    const button = element("button", { type: "button", class: "frame", "aria-pressed": "false" }, image);
    const progress = element("progress", { max: 1, value: 0, "aria-label": `Image ${index + 1}` });
    const edge = element("span", { class: "edge" }, String(seed));
    button.addEventListener("click", () => onSelect(this, index));
    // `whole` is false for a thumbnail that stands for a picture no longer kept.
    return { seed, image, button, progress, node: element("li", {}, button, edge, progress), blob: null, url: null, step: 0, whole: true };
  }

  get running() {
    return this.state === "waiting" || this.state === "drawing";
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
    frame.blob = blob;
    frame.url = URL.createObjectURL(blob);
    frame.image.src = frame.url;
  }

  setStep(index, done, steps) {
    const frame = this.frames[index];
    if (!frame) return;
    this.request.steps = steps;
    this.state = "drawing";
    frame.step = Math.max(frame.step, done); // a preview comes later than its step
    frame.progress.max = steps;
    frame.progress.value = frame.step;
    this.update();
  }

  /** The answer has come: take its pictures and the settings as the server resolved them. */
  finish({ images, timings, ...resolved }) {
    this.state = "done";
    this.timings = timings;
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
    const { steps, sampler, guidance_scale: guidance } = this.request;
    this.title.textContent = this.name;
    const guided = guidance !== undefined && guidance !== 1;
    const ended = this.state === "cancelled" || this.state === "failed";
    const parts = [steps && `${steps} ${sampler ?? ""}`, guided && `guidance ${guidance}`, ended && this.state];
    this.print.textContent = parts.filter(Boolean).join(" · ");
    for (const frame of this.frames) {
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
