"""The packed checkpoint: one safetensors file whose header fully describes the model.

Ternary weights in base 3 (5 per byte), scales fp16, low-rank factors bf16, biases fp32, embedders and final layer fp16.
The header is validated and every tensor's checksum verified before a model is built.
A file or a model that cannot be used raises :class:`CheckpointError`.

One file, since writing and reading share one header, one table of tensors and one set of checks.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import FailFast, Field, StringConstraints, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from robuq_core.classes import MAX_NAME
from robuq_core.config import (
    DecoderKind,
    DiffusionConfig,
    ModelConfig,
    QuantConfig,
    SamplerConfig,
    StrictModel,
    check_fit,
)
from robuq_core.errors import UserError
from robuq_core.files import replacing
from robuq_core.kernels.ops import TernaryLayer
from robuq_core.kernels.pack_layer import layer_of_planes, pack_layer
from robuq_core.kernels.unpack import planar_from_base3
from robuq_core.models.dit import DiT
from robuq_core.models.quant_linear import (
    QuantLinear,
    is_adaln,
    layer_bits,
    layer_rank,
    layer_rotation_block,
    quantizable_linears,
)
from robuq_core.models.shapes import dense_shapes, layer_macs, layer_shapes
from robuq_core.quant.bits import average_bits
from robuq_core.quant.packing import base3_size, pack_base3, unpack_planar
from robuq_core.safetensors_file import MalformedFileError, SafetensorsFile, parse_header
from robuq_core.threads import available_cpus

# 2: several weight planes, and more quantiser options. 3: 8-bit attention codes are those of exp(l - max).
FORMAT_VERSION = 3
_METADATA_KEY = "robuq"
_READERS = 4
_IMAGE_CHANNELS = (1, 3)  # grey, RGB
# Storage types of the parts of a packed layer; all other tensors are fp16.
_DTYPES = {
    "trits": torch.uint8,
    "alpha": torch.float16,
    "bias": torch.float32,
    "signs": torch.uint8,
    "lowrank_a": torch.bfloat16,
    "lowrank_b": torch.bfloat16,
}
ClassName = Annotated[str, StringConstraints(max_length=MAX_NAME)]


class CheckpointError(UserError):
    """A packed checkpoint that cannot be used; the message names the file, the field and the fix."""


class TensorEntry(StrictModel):
    """Type, shape and checksum of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


class Header(StrictModel):
    """The JSON under ``robuq`` in the safetensors metadata."""

    format_version: int
    model: ModelConfig
    quant: QuantConfig
    diffusion: DiffusionConfig
    sampler: SamplerConfig
    class_names: Annotated[tuple[ClassName, ...], FailFast()] = ()
    decoder: DecoderKind = "pixels"
    provenance: dict[str, Any] = Field(default_factory=dict)
    tensors: dict[str, TensorEntry]

    @model_validator(mode="after")
    def _fits(self) -> Header:
        if self.quant.activation != "gaussian":
            raise ValueError(f"quant.activation: {self.quant.activation} exists for comparison in training and cannot "
                             "be packed; use gaussian")  # fmt: skip
        if self.class_names and len(self.class_names) != self.model.num_classes:
            raise ValueError(f"class_names: {len(self.class_names)} names for {self.model.num_classes} classes")
        try:
            check_fit(self.model, self.diffusion.prediction_type, self.sampler.sampler, self.sampler.guidance_scale)
        except ValueError as error:
            raise ValueError(f"sampler.{error}") from error
        return self

    @property
    def bits(self) -> dict[str, int]:
        """Activation bits of every quantised linear, adaLN included, by layer name."""
        return {name: layer_bits(name, self.quant) for name in layer_shapes(self.model)}

    @property
    def average_activation_bits(self) -> float:
        """MAC-weighted over qkv, proj, fc1 and fc2 of all blocks; without adaLN, as in the paper."""
        table = {name: bits for name, bits in self.bits.items() if not is_adaln(name)}
        return average_bits(table, layer_macs(self.model))


@dataclass(frozen=True)
class Checkpoint:
    """A verified file in memory: ``dense`` float32 tensors and packed ``layers``, both by DiT name."""

    header: Header
    dense: dict[str, Tensor]
    layers: dict[str, TernaryLayer]


@dataclass(frozen=True)
class Description:
    """The header without weights and shape; fields as in :class:`Header`.

    ``decoder``: None takes the result of :func:`decoder_kind`.
    """

    quant: QuantConfig
    diffusion: DiffusionConfig
    sampler: SamplerConfig
    class_names: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    decoder: DecoderKind | None = None


def decoder_kind(model: ModelConfig, chosen: DecoderKind | None = None) -> DecoderKind:
    """``chosen``, or by the channels: pixels with one (grey) or three (RGB), latents with more."""
    channels = model.in_channels
    if chosen == "pixels" and channels not in _IMAGE_CHANNELS:
        raise CheckpointError(f"decoder pixels: images have 1 or 3 channels, not {channels}; give latent for the "
                              "latents of an autoencoder, or train a model of in_channels 1 or 3")  # fmt: skip
    if chosen is None and channels == 2:
        raise CheckpointError("in_channels 2: images have 1 or 3; train a model of those, or give --decoder-kind "
                              "latent if an autoencoder decodes them")  # fmt: skip
    return chosen or ("pixels" if channels in _IMAGE_CHANNELS else "latent")


def write_checkpoint(path: Path, model: DiT, about: Description) -> Header:
    """Pack a fake-quantised ``model`` into ``path``, atomically; returns the header."""
    layers = {}
    for name, linear in quantizable_linears(model):
        if not isinstance(linear, QuantLinear):
            raise CheckpointError(f"{name} is not quantised: pack the model that quantisation-aware training made")
        layers[name] = pack_layer(linear)
    dense = {name: p.detach() for name, p in model.named_parameters() if not name.startswith("blocks.")}
    return write_packed(path, model.config, dense, layers, about)


def new_header(model: ModelConfig, about: Description) -> Header:
    """The header of a file of ``model``, still without tensors; refuses an ``about`` that does not fit the model."""
    fields = {**vars(about), "model": model, "decoder": decoder_kind(model, about.decoder), "tensors": {}}
    try:
        return Header(format_version=FORMAT_VERSION, **fields)
    except ValidationError as error:
        raise CheckpointError(_first_fault(error)) from error


def write_packed(
    path: Path,
    model: ModelConfig,
    dense: Mapping[str, Tensor],
    layers: Mapping[str, TernaryLayer],
    about: Description,
) -> Header:
    """Write ``dense`` tensors and packed ``layers``, both by DiT name; the inverse of :func:`read_checkpoint`."""
    header = new_header(model, about)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in _stored_parts(layer).items()}
        give_freed_memory_back()
    tensors |= {name: tensor.half() for name, tensor in dense.items()}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not _is_finite(tensor):
            raise CheckpointError(f"{name} does not fit {tensor.dtype}: continue training, or lower the learning rate")
    header = header.model_copy(update={"tensors": {name: _entry(tensor) for name, tensor in tensors.items()}})
    with replacing(path) as temporary:
        _save(temporary, tensors, header.model_dump_json())
        read_header(temporary)  # refuses names or provenance beyond the limits of a header
    return header


def _save(path: Path, tensors: dict[str, Tensor], header: str) -> None:
    try:
        save_file(tensors, path, metadata={_METADATA_KEY: header})
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be written ({error}); is the disk full?") from error


def renew_checkpoint(source: Path, target: Path) -> Header:
    """Rewrite a packed ``source`` of format 1 or 2, whose tensors mean the same, in the current format."""
    with _opened(source) as file:
        version, text = _format_version(source, file)
        if version >= FORMAT_VERSION:
            raise CheckpointError(f"{source}: format_version {version} is not an older one; use the file as it is")
        tensors = {name: file.read(name) for name in file.tensors}
    with replacing(target) as temporary:
        _save(temporary, tensors, json.dumps({**parse_header(text.encode()), "format_version": FORMAT_VERSION}))
        try:
            return read_checkpoint(temporary).header
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(temporary), str(source))) from error


def _stored_parts(layer: TernaryLayer) -> dict[str, Tensor]:
    planes = (layer, *layer.extra_planes)
    parts = {
        "trits": pack_base3(torch.cat([unpack_planar(plane.planar, plane.in_features) for plane in planes])),
        "alpha": torch.cat([plane.alpha for plane in planes]).half(),
        "bias": layer.bias,
        "signs": torch.from_numpy(np.packbits((layer.signs.cpu() > 0).numpy(), bitorder="little")),
    }
    if layer.rank:
        parts |= {"lowrank_a": layer.lowrank_a, "lowrank_b": layer.lowrank_b}
    return parts


def _unpack_signs(packed: Tensor, width: int) -> Tensor:
    bits = np.unpackbits(packed.numpy(), count=width, bitorder="little")
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1)


def _entry(tensor: Tensor) -> TensorEntry:
    sha256 = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
    return TensorEntry(dtype=str(tensor.dtype), shape=tuple(tensor.shape), sha256=sha256)


def give_freed_memory_back() -> None:
    """``malloc_trim``: pages of freed tensors between live ones, gigabytes after the layers of a large network."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}; copy the file again")


def _invalid(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}; export the file again")


def read_header(path: Path) -> Header:
    """The validated header of a packed checkpoint; no tensor is read."""
    with _opened(path) as file:
        return _header_of(path, file)


@contextmanager
def _opened(path: Path) -> Iterator[SafetensorsFile]:
    """The open file at ``path``; turns errors of reading into :class:`CheckpointError`."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; give the path of a packed .safetensors checkpoint")
        with SafetensorsFile(path) as file:
            yield file
    except (MalformedFileError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); copy it again") from error


def _header_of(path: Path, file: SafetensorsFile) -> Header:
    version, text = _format_version(path, file)
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version {_printable(version)} is newer than this program reads "
                              f"({FORMAT_VERSION}); upgrade robuq")  # fmt: skip
    if version < FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version {version} is older than this program reads ({FORMAT_VERSION}); "
                              f"convert it: robuq convert {path} NEW.safetensors")  # fmt: skip
    try:
        header = Header.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise _invalid(path, _first_fault(error)) from error
    expected = _expected_tensors(header)
    if names := (file.tensors.keys() ^ header.tensors.keys()) | (header.tensors.keys() ^ expected.keys()):
        raise _invalid(path, f"tensors do not match the model: {_printable(', '.join(sorted(names)[:3]))}")
    for name, (dtype, shape) in expected.items():
        listed, stored = header.tensors[name], file.tensors[name]
        if (listed.dtype, listed.shape) != (str(dtype), shape):
            found = _printable(f"{listed.dtype} {listed.shape}")
            raise _invalid(path, f"{name} is {found} but the model needs {dtype} {shape}")
        if (stored.dtype, stored.shape) != (dtype, shape):
            raise _damaged(path, f"{name} is damaged (type or shape differs from the header)")
    return header


def _format_version(path: Path, file: SafetensorsFile) -> tuple[int, str]:
    """The version, 1 or more, and the header as text."""
    text = file.metadata.get(_METADATA_KEY)
    if text is None:
        raise CheckpointError(f"{path}: a safetensors file without a '{_METADATA_KEY}' header; "
                              "pack a model with robuq-train export")  # fmt: skip
    try:
        version = parse_header(text.encode())["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise _invalid(path, "header field format_version cannot be read") from error
    if type(version) is not int or version < 1:
        raise _invalid(path, f"header field format_version is {_printable(version)}, which is not a version")
    return version, text


def _first_fault(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where, what = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    return "header field " + _printable(f"{where}: {what}" if where else what)


def _printable(value: object, most: int = 120) -> str:
    """Untrusted text for one line of a message."""
    text = "".join(each if each.isprintable() else " " for each in str(value)[: most + 1])
    return text if len(text) <= most else text[:most] + "..."


def _expected_tensors(header: Header) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Storage type and shape of every tensor, by name."""
    quant = header.quant
    expected = {name: (torch.float16, shape) for name, shape in dense_shapes(header.model).items()}
    for name, (out, into) in layer_shapes(header.model).items():
        rank, rows = layer_rank(name, quant), quant.weight_planes * out
        shapes: dict[str, tuple[int, ...]] = {
            "trits": (base3_size(rows * into),),
            "alpha": (rows,),
            "bias": (out,),
            "signs": (-(-into // 8),),
        }
        if rank:
            shapes |= {"lowrank_a": (out, rank), "lowrank_b": (rank, into)}
        expected |= {f"{name}.{part}": (_DTYPES[part], shape) for part, shape in shapes.items()}
    return expected


def read_checkpoint(path: Path) -> Checkpoint:
    """Read, verify and unpack a checkpoint for the runtime: weights stay at 2 bits.

    Every byte is read once, a few layers at a time: the verified bytes are the used ones even if the file changes
    meanwhile, and the file and the result are never in memory together.
    """
    with _opened(path) as file:
        header = _header_of(path, file)
        shapes = layer_shapes(header.model)
        with ThreadPoolExecutor(min(_READERS, available_cpus()), thread_name_prefix="read") as pool:
            layers = dict(zip(shapes, pool.map(partial(_read_layer, path, file, header), shapes.items()), strict=True))
        names = [name for name in header.tensors if not name.startswith("blocks.")]
        dense = {name: tensor.float() for name, tensor in _read_tensors(path, file, header, names).items()}
    give_freed_memory_back()
    return Checkpoint(header, dense, layers)


def _read_tensors(path: Path, file: SafetensorsFile, header: Header, names: Iterable[str]) -> dict[str, Tensor]:
    """The named tensors, verified against the header."""
    tensors = {}
    for name in names:
        tensor = tensors[name] = file.read(name)
        if _entry(tensor) != header.tensors[name]:
            raise _damaged(path, f"{name} is damaged (its checksum differs from the header)")
        if not _is_finite(tensor):
            raise _invalid(path, f"{name} has values that are not finite")
    return tensors


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or not tensor.numel() or bool(tensor.abs().amax().isfinite())


def _read_layer(path: Path, file: SafetensorsFile, header: Header, layer: tuple[str, tuple[int, int]]) -> TernaryLayer:
    name, (out, into) = layer
    stored = [f"{name}.{part}" for part in _DTYPES if f"{name}.{part}" in header.tensors]
    parts = {key.rpartition(".")[2]: tensor for key, tensor in _read_tensors(path, file, header, stored).items()}
    try:
        planar = planar_from_base3(parts["trits"], (header.quant.weight_planes * out, into))
    except ValueError as error:
        raise _invalid(path, f"{name}.trits: {error}") from error
    return layer_of_planes(
        torch.split(planar, out),
        torch.split(parts["alpha"].float(), out),
        bias=parts["bias"].float(),
        signs=_unpack_signs(parts["signs"], into),
        lowrank_a=parts.get("lowrank_a", torch.empty(out, 0)).bfloat16(),
        lowrank_b=parts.get("lowrank_b", torch.empty(0, into)).bfloat16(),
        bits=layer_bits(name, header.quant),
        grid=header.quant.grid,
        rotation_block=layer_rotation_block(name, header.quant),
    )
