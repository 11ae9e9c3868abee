// The frame under the loupe: large, with how it was made, how to make it again, and how to stop it.

import { address, currentKey } from "./api.js";
import { announce, byId, pairs, seconds } from "./dom.js";
import { BLANK, sharpen } from "./strip.js";

/** A shell command that generates one image again, bit for bit; without the API key. */
export function curlLine(request, seed) {
  const { class_id, steps, guidance_scale, sampler, format } = request;
  const body = JSON.stringify({ class_id, seed, steps, guidance_scale, sampler, format });
  const key = currentKey() ? [`-H "Authorization: Bearer $ROBUQ_API_KEY"`] : [];
  return [
    `curl -fsS '${address("generate")}'`,
    "-H 'Content-Type: application/json'",
    `-H 'Accept: image/${format}'`,
    ...key,
    `-d '${body}'`,
    `-o '${fileName(request, seed)}'`,
  ].join(" \\\n  ");
}

const fileName = ({ class_id, format }, seed) => `robuq-${class_id ?? "image"}-${seed}.${format === "jpeg" ? "jpg" : format}`;

export class Loupe {
  /** `reuse(settings)` fills the form. */
  constructor({ reuse }) {
    this.strip = null;
    this.index = 0;
    this.shown = null;
    sharpen(byId("loupe-image"));
    this.update();
    byId("cancel").addEventListener("click", () => this.strip?.abort.abort());
    byId("reuse").addEventListener("click", () => reuse({ ...this.strip.request, seed: this.frame.seed, num_images: 1 }));
    byId("copy").addEventListener("click", () => this.copy());
  }

  get frame() {
    return this.strip.frames[this.index];
  }

  show(strip, index) {
    this.strip?.select(-1);
    this.strip = strip;
    this.index = index;
    strip?.select(index);
    this.update();
  }

  /** Look again, if it is this strip that has changed. */
  changed(strip) {
    if (strip === this.strip) this.update();
  }

  update() {
    const { strip } = this;
    byId("loupe").dataset.state = strip?.state ?? "empty";
    byId("loupe-making").hidden = !strip?.running;
    byId("loupe-made").hidden = strip?.state !== "done";
    byId("loupe-facts").replaceChildren(...(strip ? pairs(this.facts()) : []));
    byId("loupe-title").textContent = strip ? strip.name : "No image yet";
    byId("loupe-state").textContent = strip ? this.sentence() : "Choose a class and press Generate.";
    const image = byId("loupe-image");
    if (!strip) {
      Object.assign(image, { src: BLANK, alt: "" });
      return;
    }
    image.alt = `${strip.name}, seed ${this.frame.seed}`;
    if (image.src !== this.frame.image.src) image.src = this.frame.image.src;
    const progress = byId("loupe-progress");
    progress.max = strip.steps || 1;
    progress.value = this.frame.step;
    if (strip.state === "done") this.describeMade();
  }

  sentence() {
    const { strip, frame } = this;
    if (strip.state === "waiting") return "Waiting for its first step";
    if (strip.state === "generating") return `Step ${frame.step} of ${strip.steps}`;
    if (strip.state === "cancelled") return `Cancelled at step ${frame.step} of ${strip.steps}`;
    if (strip.state === "failed") return strip.message;
    if (!strip.timings) return "From an earlier visit";
    const { queue_s: queue, inference_s: inference, total_s: total } = strip.timings;
    return `Generated in ${seconds(total)}: ${seconds(queue)} in the queue, ${seconds(inference)} in the model`;
  }

  facts() {
    const { request, checkpoint } = this.strip;
    const known = [
      ["class", request.class_id == null ? null : `${request.class_id} ${request.class_name ?? ""}`],
      ["seed", this.frame.seed],
      ["steps", request.steps],
      ["guidance", request.guidance_scale],
      ["sampler", request.sampler],
      ["format", request.format],
      ["checkpoint", checkpoint],
    ];
    return known.filter(([, value]) => value !== undefined && value !== null).map(([term, value]) => [term, String(value)]);
  }

  describeMade() {
    const { strip, frame } = this;
    Object.assign(byId("download"), { href: frame.url, download: fileName(strip.request, frame.seed) });
    byId("curl").textContent = curlLine(strip.request, frame.seed);
  }

  async copy() {
    try {
      await navigator.clipboard.writeText(byId("curl").textContent);
      byId("copy").textContent = "Copied";
      announce("copied");
      setTimeout(() => (byId("copy").textContent = "Copy"), 2000);
    } catch {
      // Without permission or outside of a secure context: select it, so that Ctrl+C does the rest.
      getSelection().selectAllChildren(byId("curl"));
      announce("selected; press Ctrl+C to copy");
    }
  }
}
