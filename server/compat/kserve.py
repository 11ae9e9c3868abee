"""The Open Inference Protocol (KServe v2) with Triton's binary tensors: metadata, health and inference under ``/v2``.

Each field of ``POST /generate`` that describes an image is an input: ``[n]``, or ``[1]`` for all images.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json

import robuq_core
from robuq_core.params import MAX_IMAGES, ImageParams, read_params
from server.cache import idempotent_seed
from server.errors import ApiError, invalid
from server.generate import check_choices
from server.request import ModelInfo, Request, Result
from server.service import JSON, Parts, Service, classes_of, documented, documented_headers, headers_of, json_parts

VERSION = "1"
IMAGE, SEED = "image", "seed"
BINARY = "application/octet-stream"
BINARY_HEADER = "Inference-Header-Content-Length"
_EXAMPLE: dict[str, Any] = {"inputs": [{"name": "class_id", "shape": [1], "datatype": "INT64", "data": [207]}]}

Datatype = Literal["INT64", "FP32", "BYTES"]
Parameters = dict[str, Any]
_FORMATS = {"INT64": "<q", "FP32": "<f"}  # of struct
_PYTHON: dict[str, tuple[type, ...]] = {"INT64": (int,), "FP32": (int, float), "BYTES": (str,)}
_DATATYPES: dict[str, Datatype] = {"integer": "INT64", "number": "FP32", "string": "BYTES", "array": "INT64"}


class InferInput(BaseModel):
    """A tensor; ``data`` in row-major order, flat or nested, or ``binary_data_size`` bytes of what follows the JSON."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(max_length=64)]
    shape: Annotated[list[Annotated[int, Field(ge=0, le=MAX_IMAGES)]], Field(min_length=1, max_length=2)]
    datatype: Annotated[str, Field(max_length=16)]
    parameters: Parameters | None = None
    data: Annotated[list[Any], Field(max_length=2 * MAX_IMAGES)] | None = None


class InferOutput(BaseModel):
    """A tensor that the answer shall have, in binary with ``parameters.binary_data``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(max_length=64)]
    parameters: Parameters | None = None


class InferRequest(BaseModel):
    """Inputs by the names of ``POST /generate``."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [_EXAMPLE]})

    id: Annotated[str | None, Field(max_length=128)] = None
    parameters: Parameters | None = None
    inputs: Annotated[list[InferInput], Field(min_length=1, max_length=16)]
    outputs: Annotated[list[InferOutput] | None, Field(max_length=16)] = None


class TensorMetadata(BaseModel):
    """-1 is the number of images."""

    name: str
    datatype: Datatype
    shape: list[int]


class KServeError(BaseModel):
    """The protocol wants a string under ``error``; ``code`` and ``field`` are as in every other answer."""

    error: str
    code: str
    field: str | None = None


def _input_of(name: str, schema: Mapping[str, Any]) -> TensorMetadata:
    kind = schema["anyOf"][0]
    width = [kind["minItems"]] if kind["type"] == "array" else []
    return TensorMetadata(name=name, datatype=_DATATYPES[kind["type"]], shape=[-1, *width])


INFER_SCHEMA = InferRequest.model_json_schema(ref_template="#/components/schemas/{model}")
INPUTS = {name: _input_of(name, schema) for name, schema in ImageParams.model_json_schema()["properties"].items()}
OUTPUTS = (
    TensorMetadata(name=IMAGE, datatype="BYTES", shape=[-1]),
    TensorMetadata(name=SEED, datatype="INT64", shape=[-1]),
)


def _parse(content: bytes, header_length: str | None) -> tuple[InferRequest, memoryview]:
    """The request, and the bytes that follow its JSON."""
    length = len(content)
    if header_length is not None:
        if not header_length.isdecimal() or len(header_length) > 9 or int(header_length) > length:
            raise invalid(BINARY_HEADER, f"{BINARY_HEADER} must be the bytes of the JSON, at most those of the body")
        length = int(header_length)
    try:
        return InferRequest.model_validate_json(content[:length]), memoryview(content)[length:]
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"])[1:][:100]
        example = "" if path else f", such as {to_json(_EXAMPLE).decode()}"
        raise invalid(path or "body", f"{path or 'body'}: {fault['msg']}{example}") from None


def _elements(raw: memoryview) -> Iterator[str]:
    """Strings of a binary BYTES tensor: each after its length, 4 bytes little-endian."""
    while raw:
        (size,) = struct.unpack_from("<I", raw)
        if size > len(raw) - 4:
            raise ValueError("cut off")
        yield str(raw[4 : 4 + size], "utf-8")
        raw = raw[4 + size :]


def read_inputs(body: InferRequest, raw: memoryview) -> dict[str, list[Any]]:
    """Values by the field's name, one for each image or a single one for all; ranges are not checked."""
    values: dict[str, list[Any]] = {}
    for position, tensor in enumerate(body.inputs):
        kind = INPUTS.get(tensor.name)
        if kind is None:
            known = ", ".join(INPUTS)
            raise invalid(f"inputs[{position}].name", f"unknown input {tensor.name!a}; this model takes {known}")
        if tensor.name in values:
            raise invalid(f"inputs[{position}].name", f"input {tensor.name} is given twice")
        if tensor.datatype != kind.datatype:
            raise invalid(tensor.name, f"input {tensor.name} must have the datatype {kind.datatype}")
        size = (tensor.parameters or {}).get("binary_data_size")
        try:
            if size is None:
                data = tensor.data
            elif type(size) is not int or not 0 <= size <= len(raw) or tensor.data is not None:
                raise ValueError(size)
            else:
                form = _FORMATS.get(tensor.datatype)
                part, raw = raw[:size], raw[size:]
                data = list(_elements(part)) if form is None else [value for (value,) in struct.iter_unpack(form, part)]
            values[tensor.name] = _per_image(tensor, data, kind)
        except (ValueError, struct.error):
            shape = "[n, 2]" if len(kind.shape) > 1 else "[n] or [n, 1]"
            message = f"input {tensor.name} must have the shape {shape}, and n values {kind.datatype} in data or binary"
            raise invalid(tensor.name, message) from None
    if raw:
        raise invalid("inputs", "bytes are left after the tensors; binary_data_size must name all of them")
    return values


def _per_image(tensor: InferInput, data: list[Any] | None, kind: TensorMetadata) -> list[Any]:
    """One value, or one list of a field that is a list, for each image; ValueError if shape and data do not fit."""
    is_list = len(kind.shape) > 1
    width = kind.shape[1] if is_list else 1
    shape = tensor.shape if len(tensor.shape) == 2 else [1, *tensor.shape] if is_list else [*tensor.shape, 1]
    flat = [value for item in data or () for value in (item if isinstance(item, list) else [item])]
    images = shape[0]
    if shape[1] != width or len(flat) != images * width or not images:
        raise ValueError("shape")
    if not all(type(value) in _PYTHON[kind.datatype] for value in flat):
        raise ValueError("type")
    return [flat[i * width : (i + 1) * width] for i in range(images)] if is_list else flat


def make_specs(service: Service, model: ModelInfo, values: dict[str, list[Any]], http: HttpRequest) -> Request:
    """A request of which each image may have its own class, seed and settings."""

    def read(fields: dict[str, Any]) -> ImageParams:
        return read_params(ImageParams, fields, lambda: service.body_schemas["/generate"](model))

    counts = values.pop("num_images", [1])
    if len(counts) > 1:
        raise invalid("num_images", "input num_images must have 1 value")
    images = max(read({"num_images": counts[0]}).num_images, *map(len, values.values()), 1)
    for name, data in values.items():
        if len(data) not in (1, images):
            raise invalid(name, f"input {name} must have 1 value or {images}, one for each image, not {len(data)}")
    classes, key_seed, specs = classes_of(model), idempotent_seed(http), []
    first: ImageParams | None = None
    for i in range(images):
        fields = {name: data[i] if len(data) > 1 else data[0] for name, data in values.items()}
        params = read(fields)
        check_choices(model, params.sampler, params.guidance_scale)
        repeatable = params.seed is not None or key_seed is not None
        # One seed for several images counts up from image to image, as in POST /generate.
        params = params.resolved(model.defaults, key_seed if first is None else first.seed)
        first = first or params
        counted = 0 if len(values.get(SEED, ())) == images > 1 else i
        specs.append(params.spec(classes.of_request(params.class_id, params.class_name), counted))
    assert first is not None
    assert first.seed is not None
    return Request(model, tuple(specs), seed=first.seed, timeout_s=service.timeout(None), repeatable=repeatable)


def _wanted(body: InferRequest) -> dict[str, bool]:
    """Names of the outputs, and whether each is to be binary."""
    whole = bool((body.parameters or {}).get("binary_data_output"))
    known, wanted = [tensor.name for tensor in OUTPUTS], {}
    for position, output in enumerate(body.outputs or ()):
        if output.name not in known or output.name in wanted:
            message = f"outputs must name each of {', '.join(known)} at most once, and no other: {output.name!a}"
            raise invalid(f"outputs[{position}].name", message)
        wanted[output.name] = bool((output.parameters or {}).get("binary_data", whole))
    return wanted or dict.fromkeys(known, whole)


def answer(
    body: InferRequest, wanted: Mapping[str, bool], request: Request, result: Result
) -> tuple[list[bytes], dict[str, str], str]:
    """Pieces, headers and media type of an inference response."""
    seeds = [spec.seed for spec in request.specs]
    named = {} if body.id is None else {"id": body.id}
    fields: dict[str, Any] = {
        "model_name": request.model.name,
        "model_version": VERSION,
        **named,
        "parameters": vars(result.timings),
    }
    head, tail = [to_json(fields)[:-1] + b',"outputs":['], []
    for tensor in (tensor for tensor in OUTPUTS if tensor.name in wanted):
        fields = {"name": tensor.name, "datatype": tensor.datatype, "shape": [len(seeds)]}
        if len(head) > 1:
            head.append(b",")
        if wanted[tensor.name]:
            pieces = [struct.pack(f"<{len(seeds)}q", *seeds)]
            if tensor.name == IMAGE:
                pieces = [part for image in result.images for part in (struct.pack("<I", len(image)), image)]
            head.append(to_json(fields | {"parameters": {"binary_data_size": sum(map(len, pieces))}}))
            tail += pieces
        elif tensor.name == IMAGE:
            fields["parameters"] = {"content_type": "image/png", "encoding": "base64"}
            head += json_parts("data", result.images, fields)
        else:
            head.append(to_json(fields | {"data": seeds}))
    head.append(b"]}")
    if not tail:
        return head, {}, JSON
    return [*head, *tail], {BINARY_HEADER: str(sum(map(len, head)))}, BINARY


def kserve_router(service: Service) -> APIRouter:
    """The routes, bound to a pool."""
    router = APIRouter(prefix="/v2")
    service.body_schemas["/v2/models/{name}/infer"] = lambda model: INFER_SCHEMA
    missing = documented(404, model=KServeError)
    unready: dict[int | str, dict[str, Any]] = {503: {"description": "send no requests here"}}

    def checked(name: str, version: str = VERSION) -> ModelInfo:
        model = service.model
        if name != model.name or version != VERSION:
            message = f"unknown model; {model.name}, version {VERSION}, is the only one here"
            raise ApiError(404, "model_not_found", message)
        return model

    def health(response: Response, ok: bool, fields: dict[str, Any]) -> dict[str, Any]:
        response.status_code = 200 if ok else 503
        return fields

    @router.get("/", include_in_schema=False)
    @router.get("", responses=documented(model=KServeError))
    async def server_metadata() -> dict[str, Any]:
        """The server's name and version."""
        return {"name": "robuq", "version": robuq_core.__version__, "extensions": ["binary_tensor_data"]}

    @router.get("/health/live", responses=unready)
    async def server_live(response: Response) -> dict[str, Any]:
        """As /health."""
        live = service.status not in ("failed", "stopped")
        return health(response, live, {"live": live})

    @router.get("/health/ready", responses=unready)
    async def server_ready(response: Response) -> dict[str, Any]:
        """As /ready. The protocol's text has `live` here and its implementations `ready`; both say the same."""
        ready = service.status == "ready"
        return health(response, ready, {"ready": ready, "live": ready})

    @router.get("/models/{name}", responses=missing)
    @router.get("/models/{name}/versions/{version}", responses=missing)
    async def model_metadata(name: str, version: str = VERSION) -> dict[str, Any]:
        """Names, datatypes and shapes of the tensors; -1 is the number of images."""
        checked(name, version)
        tensors = {"inputs": list(INPUTS.values()), "outputs": list(OUTPUTS)}
        return {"name": name, "versions": [VERSION], "platform": "robuq", **tensors}

    @router.get("/models/{name}/ready", responses=missing | unready)
    @router.get("/models/{name}/versions/{version}/ready", include_in_schema=False)
    async def model_ready(name: str, response: Response, version: str = VERSION) -> dict[str, Any]:
        """Whether that model takes requests."""
        checked(name, version)
        ready = service.status == "ready"
        return health(response, ready, {"name": name, "ready": ready})

    async def infer(http: HttpRequest) -> Response:
        """Generate one PNG image for each value of the longest input, or `num_images` of them.

        Inputs: the fields of `POST /generate`, such as `class_id` INT64 or `sampler` BYTES, each [n], or [1] for all
        images (one seed counts up from image to image). Outputs: `image` BYTES [n] and `seed` INT64 [n]; in JSON the
        files are base64. Triton's binary tensor data extension is supported both ways.
        """
        model = checked(http.path_params["name"], http.path_params.get("version", VERSION))
        body, raw = _parse(await http.body(), http.headers.get(BINARY_HEADER))
        wanted = _wanted(body)
        request = make_specs(service, model, read_inputs(body, raw), http)
        request.as_base64 = not wanted.get(IMAGE, True)
        request = service.submit(http, request)
        result = await service.result(http, request)
        parts, headers, media_type = answer(body, wanted, request, result)
        return Parts(parts, media_type, headers_of(request, result.timings) | headers)

    responses = documented(400, 404, 413, 429, 500, 503, 504, model=KServeError)
    responses |= {200: {"description": "The images.", "headers": documented_headers()}}
    router.post("/models/{name}/infer", responses=responses)(infer)
    router.post("/models/{name}/versions/{version}/infer", include_in_schema=False)(infer)
    return router
