// Results that outlive the page: settings and pictures in localStorage, bounded in number and in size.

import { decodeBase64 } from "./strip.js";

const PLACE = "robuq.sheet.2";
const MAX_STRIPS = 40;
const MAX_CHARACTERS = 1_500_000; // of the 5 million or so that browsers allow a site

/** Keep the newest strips that are done and fit. */
export function save(strips) {
  const packed = [];
  let characters = 0;
  for (const { request, label, checkpoint, images } of strips.filter(({ state }) => state === "done").slice(0, MAX_STRIPS)) {
    const strip = JSON.stringify({ request, label, checkpoint, images });
    characters += strip.length;
    if (characters > MAX_CHARACTERS) break;
    packed.push(strip);
  }
  try {
    localStorage.setItem(PLACE, `[${packed}]`);
  } catch {
    // Storage is full or turned off: the results are still on the page.
  }
}

/** The strips kept, newest first; `makeStrip(request, label)` builds each. */
export function restore(makeStrip) {
  try {
    return JSON.parse(localStorage.getItem(PLACE) ?? "[]").map(({ request, label, checkpoint, images }) => {
      const strip = makeStrip({ ...request, num_images: images.length }, label);
      Object.assign(strip, { checkpoint, images });
      images.forEach((image, index) => strip.setPicture(index, decodeBase64(image, request.format)));
      strip.end("done", "");
      return strip;
    });
  } catch {
    return []; // storage is turned off, or its content was written by another version; the next save mends that
  }
}
