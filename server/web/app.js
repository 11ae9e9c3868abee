// The playground: wires the form, the loupe and the contact sheet to the server.

import { currentKey, generate, getJson, onUnauthorised, storeKey } from "./api.js";
import { chooseRandomClass, offerClasses } from "./classes.js";
import { announce, byId, bytes, pairs, plural } from "./dom.js";
import { restore, save } from "./keep.js";
import { Loupe } from "./loupe.js";
import { Settings } from "./settings.js";
import { decodeBase64, Strip } from "./strip.js";

const MAX_IN_FLIGHT = 4; // browsers open six connections to a server, and one strip holds one
const MAX_STRIPS = 60;
const MAX_CLASSES = 1000; // that the server lists at once
const PREVIEWS = 10;
const SETTLE_MS = 300; // rows of a request that was given up leave with the next step
const QUEUE_POLL_MS = { busy: 1000, idle: 5000 };

let info = null;
let strips = []; // newest first

const settings = new Settings();
const loupe = new Loupe({
  reuse(wanted) {
    settings.apply(wanted);
    byId("generate").focus();
    announce("settings filled in");
  },
});

// Generating.

function makeStrip(request, label) {
  return new Strip(request, label, {
    onSelect(strip, index) {
      loupe.show(strip, index);
      bringIntoView(byId("loupe"));
    },
    onChange: (strip) => loupe.changed(strip),
  });
}

function bringIntoView(node) {
  const { top } = node.getBoundingClientRect();
  if (top < 0 || top > innerHeight * 0.6) node.scrollIntoView();
}

function addStrip(strip) {
  strips.unshift(strip);
  byId("strips").prepend(strip.node);
  for (const old of strips.splice(MAX_STRIPS)) old.remove();
  sheetChanged();
}

function dropStrip(strip) {
  strips = strips.filter((other) => other !== strip);
  strip.remove();
  if (loupe.strip === strip) loupe.show(strips[0] ?? null, 0);
  sheetChanged();
}

function sheetChanged() {
  byId("sheet-empty").hidden = strips.length > 0;
  byId("clear").hidden = strips.length === 0;
  const underWay = strips.filter(({ running }) => running).length;
  // Not `disabled`, which would take the keyboard's focus away.
  byId("generate").setAttribute("aria-disabled", String(underWay >= MAX_IN_FLIGHT));
  byId("generate").textContent = underWay >= MAX_IN_FLIGHT ? `${underWay} running` : "Generate";
}

/** Takes the events of one strip; progress is spoken at its quarters only. */
function follower(strip) {
  let spoken = 0;
  return (data) => {
    if (data.b64_json) strip.setPicture(data.image, decodeBase64(data.b64_json, data.format));
    strip.setStep(data.image, data.steps_done, data.steps);
    const quarter = Math.floor((4 * data.steps_done) / data.steps);
    if (data.image === 0 && quarter > spoken && quarter < 4) {
      spoken = quarter;
      announce(`${strip.name}: ${25 * quarter} percent`);
    }
  };
}

/** Some ten previews, whatever the number of steps. */
function previewEvery(steps) {
  const every = Math.round((steps ?? info?.defaults.steps ?? 0) / PREVIEWS);
  return Math.min(Math.max(every, 1), 1000);
}

async function submit() {
  if (byId("generate").getAttribute("aria-disabled") === "true") return;
  settings.clearErrors();
  const body = settings.read();
  if (!body) return;
  const strip = makeStrip(body, byId("class").value.trim() || (info?.num_classes ? "?" : "no class"));
  addStrip(strip);
  loupe.show(strip, 0);
  bringIntoView(byId("loupe"));
  if (!settings.seedIsKept) settings.newSeed();
  announce(`generating ${plural(strip.frames.length, "image")} of ${strip.name}`);
  pollQueue();
  followSwaps(strip);
  try {
    const events = { signal: strip.abort.signal, on: follower(strip) };
    strip.finish(await generate({ ...body, preview_every: previewEvery(body.steps) }, events));
    announce(`${strip.name} is done`);
    save(strips);
  } catch (error) {
    ended(strip, body, error);
  }
  sheetChanged();
  setTimeout(pollQueue, SETTLE_MS);
}

/** A strip that came to nothing is taken away; one that had begun stays, marked. */
function ended(strip, body, error) {
  const cancelled = error.name === "AbortError";
  if (cancelled) announce("cancelled");
  if (strip.state === "generating") strip.end(cancelled ? "cancelled" : "failed", error.message);
  else dropStrip(strip);
  if (cancelled) return;
  if (!settings.seedIsKept) byId("seed").value = body.seed ?? byId("seed").value; // to try the same again
  const message = error.status === undefined ? `error in this page: ${error.message}` : error.message;
  if (!error.field || !settings.showError(error.field, message)) byId("form-error").textContent = message;
}

// The server.

async function describeServer() {
  info = await getJson("info");
  settings.describe(info);
  byId("facts").replaceChildren(
    ...pairs([
      ["checkpoint", info.checkpoint],
      ["backend", info.backend],
      ["activations", `${info.average_activation_bits.toFixed(2)} bits`],
      ["weights", bytes(info.weight_bytes)],
      ["images", `${info.image_size} × ${info.image_size}`],
      ["classes", info.num_classes.toLocaleString("en")],
      ["predicts", info.prediction_type],
    ]),
  );
  byId("class").closest(".field").hidden = !info.num_classes;
  offerClasses(info.num_classes ? (await getJson(`classes?limit=${MAX_CLASSES}`)).classes : []);
  if (!info.num_classes) byId("class").value = "";
  else if (!byId("class").value) chooseRandomClass();
}

/** Another checkpoint may have been loaded since the page was opened. */
async function followSwaps(strip) {
  strip.checkpoint = info?.checkpoint;
  try {
    if ((await getJson("info", { ask: false })).checkpoint !== info?.checkpoint) await describeServer();
    strip.checkpoint = info.checkpoint;
    loupe.changed(strip);
  } catch {
    // Generating reports it.
  }
}

let queueTimer = 0;

async function pollQueue() {
  clearTimeout(queueTimer);
  if (!document.hidden) {
    try {
      const { status, requests_running: running, requests_waiting: waiting, replicas } = await getJson("queue", { ask: false });
      const sum = (name) => replicas.reduce((total, replica) => total + replica[name], 0);
      const rows = `${sum("rows")}/${sum("row_budget")} rows`;
      showQueue(status, [status, `${running} running`, `${waiting} waiting`, rows].join(" · "));
    } catch (error) {
      showQueue("down", error.status === 401 ? "needs a key" : error.message);
    }
  }
  clearTimeout(queueTimer);
  queueTimer = setTimeout(pollQueue, QUEUE_POLL_MS[strips.some(({ running }) => running) ? "busy" : "idle"]);
}

function showQueue(state, text) {
  byId("queue").dataset.state = state;
  if (byId("queue-text").textContent !== text) byId("queue-text").textContent = text;
}

// The key.

let asking = null;

/** Open the dialog; resolves to whether another key has been entered. Askers at the same time share one dialog. */
function askForKey(reason) {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    byId("key-reason").textContent = reason;
    byId("key").value = currentKey();
    dialog.returnValue = "cancel";
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "use"), { once: true });
    dialog.showModal();
  }).then((given) => {
    if (given) storeKey(byId("key").value.trim());
    byId("key").value = "";
    asking = null;
    if (given) pollQueue();
    if (given && !info) attempt(describeServer);
    return given;
  });
  return asking;
}

async function attempt(task) {
  try {
    await task();
  } catch (error) {
    byId("form-error").textContent = error.message;
  }
}

onUnauthorised(askForKey);
byId("key-cancel").addEventListener("click", () => byId("key-dialog").close("cancel"));
byId("key-button").addEventListener("click", async () => {
  if (await askForKey("Sent with each request to this server.")) attempt(describeServer);
});
byId("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
byId("class-random").addEventListener("click", chooseRandomClass);
byId("clear").addEventListener("click", () => {
  for (const strip of strips.filter(({ running }) => !running)) dropStrip(strip);
  save(strips);
  byId("sheet-title").focus();
});
document.addEventListener("visibilitychange", () => document.hidden || pollQueue());

for (const strip of restore(makeStrip).reverse()) addStrip(strip);
if (strips.length) loupe.show(strips[0], 0);
attempt(describeServer);
pollQueue();
