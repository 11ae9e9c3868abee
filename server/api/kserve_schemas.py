"""Bodies of the Open Inference Protocol (KServe v2), with its field names."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.settings import MAX_IMAGES

Scalar = bool | int | float | str
Datatype = Literal["INT64", "FP32", "BYTES"]
Parameters = dict[str, Any]


class InferInput(BaseModel):
    """A tensor; ``data`` in row-major order, flat or nested."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(max_length=64)]
    shape: Annotated[list[Annotated[int, Field(ge=0, le=MAX_IMAGES)]], Field(min_length=1, max_length=2)]
    datatype: Annotated[str, Field(max_length=16)]
    parameters: Parameters | None = None
    data: Annotated[list[Any], Field(max_length=MAX_IMAGES)]


class InferOutput(BaseModel):
    """A tensor that the answer shall have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(max_length=64)]
    parameters: Parameters | None = None


class InferRequest(BaseModel):
    """Inputs ``class_id`` and, if wanted, ``seed``, ``steps``, ``guidance_scale``, each ``[n]`` or ``[1]``."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [{"inputs": [{"name": "class_id", "shape": [1], "datatype": "INT64", "data": [207]}]}]
        },
    )

    id: Annotated[str | None, Field(max_length=128)] = None
    parameters: Parameters | None = None
    inputs: Annotated[list[InferInput], Field(min_length=1, max_length=16)]
    outputs: Annotated[list[InferOutput] | None, Field(max_length=16)] = None


class OutputTensor(BaseModel):
    """``data`` of BYTES is base64 of one file an element, as ``parameters.encoding`` tells."""

    name: str
    shape: list[int]
    datatype: Datatype
    parameters: dict[str, Scalar] | None = None
    data: list[str] | list[int]


class InferResponse(BaseModel):
    """``parameters`` holds the times in seconds."""

    model_name: str
    id: str | None = None
    parameters: dict[str, Scalar]
    outputs: list[OutputTensor]


class TensorMetadata(BaseModel):
    """-1 is the number of images."""

    name: str
    datatype: Datatype
    shape: list[int]


class ModelMetadata(BaseModel):
    """What a model takes and gives."""

    name: str
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServerMetadata(BaseModel):
    """The server; it has no extensions."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(BaseModel):
    live: bool


class ServerReady(BaseModel):
    """The protocol's text has ``live`` here and its implementations ``ready``; both say the same."""

    ready: bool
    live: bool


class ModelReady(BaseModel):
    name: str
    ready: bool


class KServeError(BaseModel):
    """The protocol wants a string under ``error``; ``code`` and ``field`` are as in every other answer."""

    error: str
    code: str
    field: str | None = None
