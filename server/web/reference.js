// The API's reference: /openapi.json as a page.

import { getJson } from "./api.js";
import { byId, element } from "./dom.js";

let components = {};

/** A schema with its reference followed and its `null` alternative removed. */
function resolve(schema = {}) {
  if (schema.$ref) return resolve(components[schema.$ref.split("/").pop()]);
  const one = (schema.anyOf ?? schema.allOf ?? []).filter(({ type }) => type !== "null");
  return one.length === 1 ? { ...schema, anyOf: undefined, ...resolve(one[0]), description: schema.description } : schema;
}

/** A schema in words, such as "integer, 1 to 16" or "list of string". */
function kind(schema) {
  const { type, enum: names, const: only, items, minimum, maximum, anyOf, title } = resolve(schema);
  if (names ?? only) return [].concat(names ?? only).join(", ");
  if (type === "array") return `list of ${kind(items ?? {})}`;
  if (anyOf) return anyOf.map(kind).join(" or ");
  const range = minimum === undefined ? "" : maximum === undefined ? `, at least ${minimum}` : `, ${minimum} to ${maximum}`;
  return `${type ?? title ?? "anything"}${range}`;
}

/** Text with `code` in it, as nodes. */
function inline(text) {
  return text.split(/`{1,2}([^`]+)`{1,2}/).map((part, index) => (index % 2 ? element("code", {}, part) : part));
}

/** Paragraphs and lists of a description. */
function prose(text) {
  return text.split(/\n{2,}/).filter(Boolean).map((block) => {
    if (!block.startsWith("- ")) return element("p", {}, ...inline(block));
    return element("ul", {}, ...block.slice(2).split(/\n- /).map((item) => element("li", {}, ...inline(item))));
  });
}

/** Rows of name, kind and meaning under a heading; nothing where there are no rows. */
function table(title, rows) {
  if (!rows.length) return [];
  const row = ([name, type, meaning]) => {
    const head = element("th", { scope: "row" }, element("code", {}, name));
    return element("tr", {}, head, element("td", {}, type), element("td", {}, ...inline(meaning)));
  };
  const body = element("table", {}, element("caption", {}, title), element("tbody", {}, ...rows.map(row)));
  return [element("div", { class: "scroll", tabIndex: 0, role: "group", "aria-label": title }, body)];
}

function fields(schema) {
  const { properties = {} } = resolve(schema);
  return Object.entries(properties).map(([name, field]) => {
    const { description = "", default: initial } = field;
    return [name, kind(field), description + (initial == null || initial === "" ? "" : ` Default: ${initial}.`)];
  });
}

function operation(method, path, { description = "", parameters = [], requestBody, responses }) {
  const [, body] = Object.entries(requestBody?.content ?? {})[0] ?? [];
  const answer = responses[200]?.content?.["application/json"];
  const [summary] = description.split(/[.\n]/);
  const statuses = Object.entries(responses).map(([status, { description: meaning, content = {} }]) => [
    status, status === "200" ? Object.keys(content).join(", ") : "", meaning,
  ]);
  return element(
    "details",
    {},
    element("summary", {}, element("b", {}, method.toUpperCase()), ` ${path} `, element("span", {}, ...inline(summary))),
    ...prose(description),
    ...table("Parameters", parameters.map(({ name, schema, description: meaning = "" }) => [name, kind(schema), meaning])),
    ...table("Body", body ? fields(body.schema) : []),
    ...table("Answer in JSON", answer ? fields(answer.schema) : []),
    ...table("Answers", statuses),
  );
}

try {
  const { paths, components: parts } = await getJson("openapi.json", { ask: false });
  components = parts?.schemas ?? {};
  const sections = new Map();
  for (const [path, methods] of Object.entries(paths)) {
    for (const [method, details] of Object.entries(methods)) {
      const tag = details.tags?.[0] ?? "other";
      if (!sections.has(tag)) sections.set(tag, element("section", {}, element("h2", {}, tag)));
      sections.get(tag).append(operation(method, path, details));
    }
  }
  byId("reference").replaceChildren(...sections.values());
} catch (error) {
  const hint = error.status === 401 ? " Enter it in the playground, then come back." : "";
  byId("reference").replaceChildren(element("p", { class: "error" }, error.message + hint));
}
