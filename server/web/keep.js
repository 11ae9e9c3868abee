// Results that outlive the page: settings and small pictures in localStorage, bounded in number and in size.

import { decodeBase64 } from "./strip.js";
import { element } from "./dom.js";

const PLACE = "robuq.sheet.1";
const MAX_STRIPS = 40;
const MAX_CHARACTERS = 1_500_000; // of the 5 million or so that browsers allow a site
const MAX_WHOLE_BYTES = 16_384;
const THUMBNAIL = 96;

const base64 = async (blob) => btoa(String.fromCharCode(...new Uint8Array(await blob.arrayBuffer())));

/** A picture as it is if it is small, else a thumbnail. */
async function packPicture({ blob, whole }, format) {
  if (blob.size <= MAX_WHOLE_BYTES) return { data: await base64(blob), format: whole ? format : "webp", whole };
  const bitmap = await createImageBitmap(blob, { resizeWidth: THUMBNAIL, resizeHeight: THUMBNAIL, resizeQuality: "high" });
  const canvas = element("canvas", { width: THUMBNAIL, height: THUMBNAIL });
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return { data: canvas.toDataURL("image/webp", 0.8).split(",")[1], format: "webp", whole: false };
}

/** Keep the newest strips that are done and fit. */
export async function save(strips) {
  const packed = [];
  let characters = 0;
  for (const strip of strips.filter(({ state }) => state === "done").slice(0, MAX_STRIPS)) {
    // A strip never changes once it is done, so it is packed once.
    strip.packed ??= {
      request: strip.request,
      label: strip.label,
      checkpoint: strip.checkpoint,
      frames: await Promise.all(strip.frames.map((frame) => packPicture(frame, strip.request.format))),
    };
    characters += JSON.stringify(strip.packed).length;
    if (characters > MAX_CHARACTERS) break;
    packed.push(strip.packed);
  }
  try {
    localStorage.setItem(PLACE, JSON.stringify(packed));
  } catch {
    // Storage is full or turned off: the results are still on the page.
  }
}

/** The strips kept, newest first; `makeStrip(request, label)` builds each. */
export function restore(makeStrip) {
  try {
    return JSON.parse(localStorage.getItem(PLACE) ?? "[]").map(({ request, label, checkpoint, frames }) => {
      const strip = makeStrip({ ...request, num_images: frames.length }, label);
      strip.checkpoint = checkpoint;
      frames.forEach(({ data, format, whole }, index) => {
        strip.setPicture(index, decodeBase64(data, format));
        strip.frames[index].whole = whole;
      });
      strip.end("done", "");
      return strip;
    });
  } catch {
    return []; // storage is turned off, or its content was written by another version; the next save mends that
  }
}
