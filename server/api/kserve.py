"""The Open Inference Protocol (KServe v2): metadata, health and inference under ``/v2``."""

from __future__ import annotations

import base64
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import ValidationError
from pydantic_core import to_json

import robuq_core
from server.api.catalog import Model
from server.api.errors import ApiError, from_validation, invalid
from server.api.generation import Generation
from server.api.intake import Intake
from server.api.kserve_schemas import (
    InferRequest,
    InferResponse,
    KServeError,
    ModelMetadata,
    ModelReady,
    ServerLive,
    ServerMetadata,
    ServerReady,
    TensorMetadata,
)
from server.api.order import Order, check_choices, make_order
from server.api.responses import documented, documented_headers, result_headers
from server.api.tensors import INPUTS, read_inputs
from server.engine import Result
from server.engine.model import RowSpec

JSON = "application/json"
IMAGE, SEED = "image", "seed"
OUTPUTS = (
    TensorMetadata(name=IMAGE, datatype="BYTES", shape=[-1]),
    TensorMetadata(name=SEED, datatype="INT64", shape=[-1]),
)
_EXAMPLE = {"inputs": [{"name": "class_id", "shape": [1], "datatype": "INT64", "data": [207]}]}
INFER_SCHEMA = InferRequest.model_json_schema(ref_template="#/components/schemas/{model}")


def _check_name(name: str, model: Model) -> None:
    if name != model.name:
        raise ApiError(404, "model_not_found", f"unknown model; {model.name} is the one that is served")


def _parse(content: bytes) -> InferRequest:
    try:
        return InferRequest.model_validate_json(content)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
        if len(fault["loc"]) > 1:
            path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"])[1:]
            raise invalid(path[:100], f"{path[:100]}: {fault['msg']}") from None
        if fault["loc"] and fault["loc"][0] in INFER_SCHEMA["properties"]:
            raise invalid(str(fault["loc"][0]), f"{fault['loc'][0]}: {fault['msg']}") from None
        raise from_validation(error, INFER_SCHEMA, example=_EXAMPLE) from None


def _order(body: InferRequest, model: Model, intake: Intake) -> Order:
    """Rows of which each may have its own class, seed, steps and guidance."""
    values = read_inputs(body, model.num_classes)
    classes, seeds = values["class_id"], values.get("seed", [None])
    images = len(classes)
    order = make_order(
        model, classes[0], num_images=images, image_format="png", timeout_s=intake.timeout(None), seed=seeds[0]
    )

    def of(name: str, i: int, otherwise: Any) -> Any:
        given = values.get(name, [otherwise])
        return given[i if len(given) > 1 else 0]

    for scale in values.get("guidance_scale", ()):
        check_choices(model, order.specs[0].sampler, scale)
    # One seed for several images counts up from image to image, as in POST /generate.
    order.specs = tuple(
        RowSpec(
            class_id=class_id,
            seed=seeds[i] if len(seeds) == images > 1 else spec.seed,
            steps=of("steps", i, spec.steps),
            guidance_scale=float(of("guidance_scale", i, spec.guidance_scale)),
            sampler=spec.sampler,
        )
        for i, (class_id, spec) in enumerate(zip(classes, order.specs, strict=True))
    )
    return order


def _wanted(body: InferRequest) -> list[str]:
    known = [tensor.name for tensor in OUTPUTS]
    for position, output in enumerate(body.outputs or ()):
        if output.name not in known:
            message = f"unknown output {output.name!r}; this model gives {', '.join(known)}"
            raise invalid(f"outputs[{position}].name", message)
    return [output.name for output in body.outputs] if body.outputs else known


def _answer(body: InferRequest, wanted: list[str], generation: Generation, result: Result) -> dict[str, Any]:
    """The fields of :class:`InferResponse`."""
    shape = [len(result.images)]
    tensors: dict[str, dict[str, Any]] = {
        IMAGE: {
            "name": IMAGE,
            "shape": shape,
            "datatype": "BYTES",
            "parameters": {"content_type": "image/png", "encoding": "base64"},
            "data": [base64.b64encode(image).decode() for image in result.images],
        },
        SEED: {
            "name": SEED,
            "shape": shape,
            "datatype": "INT64",
            "data": [spec.seed for spec in generation.order.specs],
        },
    }
    answer: dict[str, Any] = {"model_name": generation.order.model}
    if body.id is not None:
        answer["id"] = body.id
    return answer | {"parameters": vars(result.timings), "outputs": [tensors[name] for name in wanted]}


def kserve_router(intake: Intake) -> APIRouter:
    """The routes, bound to an engine."""
    router = APIRouter(prefix="/v2")
    engine = intake.engine
    unknown_model = documented(404, model=KServeError)

    @router.get("/", include_in_schema=False)
    @router.get("", responses=documented(model=KServeError))
    async def server_metadata() -> ServerMetadata:
        """The server's name and version."""
        return ServerMetadata(name="robuq", version=robuq_core.__version__, extensions=[])

    @router.get("/health/live", responses={503: {"model": ServerLive, "description": "restart the process"}})
    async def server_live(response: Response) -> ServerLive:
        """As /health."""
        live = engine.status not in ("failed", "stopped")
        response.status_code = 200 if live else 503
        return ServerLive(live=live)

    @router.get("/health/ready", responses={503: {"model": ServerReady, "description": "send no requests here"}})
    async def server_ready(response: Response) -> ServerReady:
        """As /ready."""
        ready = intake.status == "ready"
        response.status_code = 200 if ready else 503
        return ServerReady(ready=ready, live=ready)

    @router.get("/models/{name}", responses=unknown_model)
    async def model_metadata(name: str) -> ModelMetadata:
        """Names, datatypes and shapes of the tensors."""
        _check_name(name, intake.model)
        inputs = [TensorMetadata(name=tensor.name, datatype=tensor.datatype, shape=[-1]) for tensor in INPUTS.values()]
        return ModelMetadata(name=name, platform="robuq", inputs=inputs, outputs=list(OUTPUTS))

    @router.get(
        "/models/{name}/ready",
        responses=unknown_model | {503: {"model": ModelReady, "description": "send no requests here"}},
    )
    async def model_ready(name: str, response: Response) -> ModelReady:
        """Whether that model takes requests."""
        _check_name(name, intake.model)
        ready = intake.status == "ready"
        response.status_code = 200 if ready else 503
        return ModelReady(name=name, ready=ready)

    @router.post(
        "/models/{name}/infer",
        responses=documented(400, 404, 413, 429, 500, 503, 504, model=KServeError)
        | {200: {"model": InferResponse, "description": "The images.", "headers": documented_headers()}},
    )
    async def infer(name: str, request: Request) -> Response:
        """Draw one PNG image for each `class_id`.

        Inputs: `class_id` INT64 [n]; if wanted `seed` INT64, `steps` INT64, `guidance_scale` FP32, each [n], or [1] for
        all images (one seed counts up from image to image). Outputs: `image` BYTES [n], files in base64, and `seed`
        INT64 [n].
        """
        _check_name(name, intake.model)
        if "inference-header-content-length" in request.headers:
            raise invalid("body", "the binary tensor extension is not served; send and ask for JSON data")
        body = _parse(await request.body())
        wanted = _wanted(body)
        generation = intake.take(request, lambda model: _order(body, model, intake))
        result = await generation.wait(request)
        headers = result_headers(generation, result.timings)
        return Response(to_json(_answer(body, wanted, generation, result)), media_type=JSON, headers=headers)

    return router
