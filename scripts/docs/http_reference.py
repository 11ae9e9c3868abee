"""The HTTP reference as Markdown, from the application's own OpenAPI document; and the options of the server.

The document is the one that a running server gives at ``/openapi.json``; the model behind it is a stand-in with five
classes, so nothing of the page depends on a checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Schema = dict[str, Any]


def http_reference() -> str:
    """Every route by tag, then every schema that bodies and answers name."""
    from server.app import create_app
    from server.fake import FakeSampler
    from server.metrics import Metrics
    from server.pool import Pool
    from server.request import ModelInfo
    from server.settings import Settings
    from server.worker import describe

    sampler = FakeSampler()
    fields = describe(sampler) | {"path": Path(), "class_names": sampler.class_names, "defaults": sampler.defaults}

    class Documented(Pool):
        """Knows its model without a worker."""

        model = ModelInfo(**fields)  # type: ignore[assignment]

    settings = Settings.model_construct()
    return render(create_app(Documented(settings, Metrics(settings.max_batch_rows)), settings).openapi())


def settings_table() -> str:
    """Every option of ``robuq-serve``."""
    from server.settings import Settings

    rows = []
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, ()) else f"`{field.default}`"
        rows.append((f"`--{name.replace('_', '-')}`", default, field.description or ""))
    return _table(("Option", "Default", ""), rows)


def render(document: Schema) -> str:
    """Markdown of an OpenAPI 3.1 document."""
    tags: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            section = "\n\n".join(_operation(method, path, operation))
            tags.setdefault(operation.get("tags", ["other"])[0], []).append(section)
    parts = [f"## {tag[0].upper()}{tag[1:]}\n\n" + "\n\n".join(sections) for tag, sections in tags.items()]
    schemas = document["components"]["schemas"]
    parts.append("## Schemas\n\n" + "\n\n".join(_component(name, schemas[name]) for name in sorted(schemas)))
    return "\n\n".join(parts)


def _operation(method: str, path: str, operation: Schema) -> Iterator[str]:
    yield f"### `{method.upper()} {path}`"
    if text := operation.get("description") or operation.get("summary"):
        yield text.strip()
    if parameters := operation.get("parameters"):
        rows = [
            (f"`{p['name']}`", p["in"], _required(p.get("required")), _type(p["schema"]), p.get("description", ""))
            for p in parameters
        ]
        yield _table(("Parameter", "In", "", "Type", ""), rows)
    for content_type, media in operation.get("requestBody", {}).get("content", {}).items():
        yield f"Body, `{content_type}`: {_type(media['schema'])}"
        if table := _fields(media["schema"]):
            yield table
        if example := _example(media):
            yield f"```json\n{json.dumps(example, indent=2, ensure_ascii=False)}\n```"
    rows = []
    for status, response in operation["responses"].items():
        bodies = [f"`{kind}` {_type(media.get('schema', {}))}" for kind, media in response.get("content", {}).items()]
        rows.append((status, response.get("description", ""), "<br>".join(bodies)))
    yield _table(("Status", "", "Answer"), rows)


def _component(name: str, schema: Schema) -> str:
    lines = [f"### {name}"]
    if text := schema.get("description"):
        lines.append(text.strip())
    lines.append(_fields(schema) or _type(schema))
    return "\n\n".join(lines)


def _example(media: Schema) -> Any:
    for holder in (media, media["schema"]):
        if "example" in holder:
            return holder["example"]
        examples = holder.get("examples")
        if isinstance(examples, dict):
            return next(iter(examples.values()))["value"]
        if examples:
            return examples[0]
    return None


def _fields(schema: Schema) -> str:
    """A table of an object's properties; empty for what has none."""
    required = schema.get("required", ())
    rows = [
        (f"`{name}`", _required(name in required), _type(field), _default(field), field.get("description", ""))
        for name, field in schema.get("properties", {}).items()
    ]
    return _table(("Field", "", "Type", "Default", ""), rows) if rows else ""


def _required(required: object) -> str:
    return "required" if required else ""


def _default(field: Schema) -> str:
    return f"`{json.dumps(field['default'])}`" if field.get("default") is not None else ""


def _type(schema: Schema) -> str:
    """A type in a few words, with its bounds; a link where it is a schema of its own."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(_type(choice) for choice in schema[key]))
    if "allOf" in schema:
        return " and ".join(_type(part) for part in schema["allOf"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    kind = schema.get("type", "any")
    if isinstance(kind, list):
        return " or ".join(kind)
    if kind == "array":
        return f"array of {_type(schema.get('items', {}))}{_bounds(schema, 'Items')}"
    if kind == "string":
        kind = schema.get("format", kind)
        return kind + _bounds(schema, "Length")
    if kind in ("integer", "number"):
        return kind + _range(schema)
    return str(kind)


def _bounds(schema: Schema, suffix: str) -> str:
    low, high = schema.get(f"min{suffix}"), schema.get(f"max{suffix}")
    unit = "" if suffix == "Items" else " characters"
    if low is None and high is None:
        return ""
    if high is None:
        return f", at least {low}{unit}"
    return f", at most {high}{unit}" if not low else f", {low} to {high}{unit}"


def _range(schema: Schema) -> str:
    low = schema.get("minimum")
    high = schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f", {low} to {high}"
    told = [("at least", low), ("at most", high), ("above", above), ("below", below)]
    return "".join(f", {word} {value}" for word, value in told if value is not None)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table without the columns that are empty in every row."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [[head[i] for i in kept], ["---"] * len(kept), *([_cell(row[i]) for i in kept] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")
