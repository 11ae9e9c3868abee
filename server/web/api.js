// The server's routes: fetch with the API key, errors as `Problem`, and server-sent events of a generation.

const KEY = "robuq.api-key";

/** An answer that is not a success; `field` names the part of the request to change. */
export class Problem extends Error {
  constructor(status, { code = "error", message, field = null }) {
    super(message);
    Object.assign(this, { status, code, field });
  }

  static async from(answer) {
    try {
      return new Problem(answer.status, (await answer.json()).error);
    } catch {
      return new Problem(answer.status, { message: `the server answered ${answer.status} ${answer.statusText}` });
    }
  }
}

let key = "";
try {
  key = sessionStorage.getItem(KEY) ?? "";
} catch {
  // Storage is turned off: the key lasts as long as the page.
}

export const currentKey = () => key;

export function storeKey(given) {
  key = given;
  try {
    sessionStorage.setItem(KEY, given);
  } catch {
    // As above.
  }
}

let askForKey = async () => false;
/** `ask(reason)` resolves to true once another key has been stored. */
export const onUnauthorised = (ask) => (askForKey = ask);

// Relative to the page, so that the server may live under a path of a proxy.
export const address = (path) => new URL(path, document.baseURI);

/** The answer of a route if it is a success; after a 401 the user is asked for a key, unless `ask` is false. */
export async function call(path, { ask = true, ...options } = {}) {
  for (;;) {
    const headers = new Headers(options.headers);
    if (key) headers.set("Authorization", `Bearer ${key}`);
    let answer;
    try {
      answer = await fetch(address(path), { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem(0, { code: "unreachable", message: "the server cannot be reached; is it running?" });
    }
    if (answer.ok) return answer;
    const problem = await Problem.from(answer);
    if (problem.status !== 401 || !ask || !(await askForKey(problem.message))) throw problem;
  }
}

export const getJson = async (path, options) => (await call(path, options)).json();

const cutOff = () => new Problem(0, { code: "cut_off", message: "the connection ended before the image was done" });

/** Events of a `text/event-stream` body as `[name, data]`, data parsed as JSON. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let name = "message";
  let data = [];
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : cutOff();
    });
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      const [, field, text] = /^([^:]*):? ?(.*)$/.exec(line);
      if (line === "") {
        if (data.length) yield [name, JSON.parse(data.join("\n"))];
        [name, data] = ["message", []];
      } else if (field === "event") name = text;
      else if (field === "data") data.push(text);
    }
  }
}

/** Generate; `on(data)` gets each step and preview. Resolves to the data of the last event, `completed`. */
export async function generate(body, { signal, on }) {
  const answer = await call("generate", {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  for await (const [name, data] of events(answer.body)) {
    if (name === "error") throw new Problem(200, data.error);
    if (name === "image_generation.completed") return data;
    on(data);
  }
  throw cutOff();
}
