"""Full-precision DiT weights of other code bases, read and written.

Read: the ``.pt`` of DiT, SiT and REPA (a flat state dict, or one in the file of a training script), the same as
safetensors, a diffusers pipeline folder or its ``transformer`` folder, and ``RUN_DIR/states/teacher`` of a run.
Written: the first and the third. Round trips are exact bit for bit; ``flavour`` records whose numerics weights have.
What cannot be read or written raises :class:`WeightsError`.

Layouts differ: the patch embedder is a convolution elsewhere and a linear here; diffusers keeps q, k and v apart and
stores the embedders of timestep and class once per block.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Unpack

import torch
from pydantic import ValidationError
from torch import Tensor

from robuq_core.config import DiffusionConfig, ModelConfig
from robuq_core.files import read_json, replacing
from robuq_core.models.adapters_diffusers import read_pipeline, write_pipeline
from robuq_core.models.adapters_files import (
    TensorTable,
    WeightsError,
    folder_tensors,
    load_pickle,
    safetensors_of,
    state_dict_in,
    tensors_of,
    without_wrappers,
)
from robuq_core.models.adapters_official import POSITIONS, Hints, check_positions, network_alone, official_shape
from robuq_core.models.dit import DiT, position_table
from robuq_core.models.shapes import parameter_shapes

Layout = Literal["official", "diffusers", "robuq"]
# Module here -> diffusers. "*": stored once per block; parts joined by "|" are stacked along the first dimension.
_DIFFUSERS = {
    "x_embedder": "pos_embed.proj",
    "t_embedder.mlp.0": "transformer_blocks.*.norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "transformer_blocks.*.norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "transformer_blocks.*.norm1.emb.class_embedder.embedding_table",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
    "blocks.attn.qkv": "attn1.to_q|attn1.to_k|attn1.to_v",
    "blocks.attn.proj": "attn1.to_out.0",
    "blocks.mlp.fc1": "ff.net.0.proj",
    "blocks.mlp.fc2": "ff.net.2",
    "blocks.adaLN_modulation.1": "norm1.linear",
}
# Keys that repeat what the configuration says.
_REPEATED = {"official": {POSITIONS}, "diffusers": {POSITIONS, "pos_embed.pos_embed"}, "robuq": set()}


class Place(NamedTuple):
    """Where a parameter lies in a file: in equal copies under ``keys``, or ``stacked``, cut into them along its first
    dimension. ``shape``: of each."""

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    stacked: bool = False


def places(config: ModelConfig, layout: Layout) -> dict[str, Place]:
    """The place of every parameter in ``layout``, by its name here."""
    return {name: _place(name, shape, config, layout) for name, shape in parameter_shapes(config).items()}


def _place(name: str, shape: tuple[int, ...], config: ModelConfig, layout: Layout) -> Place:
    if layout == "robuq":
        return Place((name,), shape)
    module, _, kind = name.rpartition(".")
    if name == "x_embedder.weight":  # a convolution elsewhere
        shape = (shape[0], config.in_channels, config.patch_size, config.patch_size)
    if layout == "official":
        return Place((name.replace("x_embedder.", "x_embedder.proj."),), shape)
    if not module.startswith("blocks."):
        pattern = f"{_DIFFUSERS[module]}.{kind}"
        copies = config.depth if "*" in pattern else 1
        return Place(tuple(pattern.replace("*", str(i)) for i in range(copies)), shape)
    _, index, inner = module.split(".", 2)
    parts = _DIFFUSERS[f"blocks.{inner}"].split("|")
    keys = tuple(f"transformer_blocks.{index}.{part}.{kind}" for part in parts)
    return Place(keys, (shape[0] // len(parts), *shape[1:]), len(parts) > 1)


@dataclass(frozen=True)
class Weights:
    """Full-precision weights in a file, names and shapes checked; a tensor is read when asked for.

    ``positions``: the table that the file holds in full precision, ``[1, L, D]``, or None. ``diffusion``: the process
    it was trained on, None if unknown. ``class_names``: empty if unknown.
    """

    path: Path
    layout: Layout
    config: ModelConfig
    table: TensorTable
    positions: Tensor | None = None
    diffusion: DiffusionConfig | None = None
    class_names: tuple[str, ...] = ()

    @cached_property
    def places(self) -> dict[str, Place]:
        """Where each parameter lies in the file, by its name here."""
        return places(self.config, self.layout)

    def tensor(self, name: str) -> Tensor:
        """Parameter ``name``, float32, memory-mapped where possible: read-only."""
        place = self.places[name]
        first = self.table[place.keys[0]].read()
        if not first.is_floating_point():
            raise WeightsError(f"{self.path}: {place.keys[0]} is {first.dtype}, not floating point")
        if place.stacked:
            return torch.cat([self.table[key].read() for key in place.keys]).float()
        for key in place.keys[1:]:
            if not torch.equal(self.table[key].read(), first):
                raise self._unequal(place.keys[0], key)
        return first.float().reshape(parameter_shapes(self.config)[name])

    def _unequal(self, first: str, key: str) -> WeightsError:
        for name in (first, key):
            if bool(self.table[name].read().isnan().any()):
                return WeightsError(f"{self.path}: {name} holds NaN; use weights from before their training diverged")
        return WeightsError(f"{self.path}: {key} differs from {first}, and this network has one such embedder for all "
                            "blocks; use weights whose embedders are equal")  # fmt: skip

    def model(self, *, mapped: bool = False) -> DiT:
        """The network with these weights; ``mapped``: for inference only, sharing the file's memory where possible."""
        with torch.device("meta"):
            model = DiT(self.config)
        tensors = {name: self.tensor(name) if mapped else self.tensor(name).clone() for name in self.places}
        model.load_state_dict(tensors, assign=True)
        model.pos_embed = position_table(self.config)[None] if self.positions is None else self.positions.clone()
        return model


def read_weights(path: Path | str, **hints: Unpack[Hints]) -> Weights:
    """Find out what ``path`` holds; the module lists the formats.

    Args:
        hints: see :class:`~robuq_core.models.adapters_official.Hints`.
    """
    if unknown := hints.keys() - Hints.__annotations__:
        raise TypeError(f"weights have no hint {sorted(unknown)[0]!r}; give {', '.join(Hints.__annotations__)}")
    path = Path(path)
    if path.is_dir():
        if (state := _newest_state(path)) is not None:
            return _matching(_read_state(state), hints)
        return _matching(_read_diffusers(path), hints)
    if path.suffix == ".safetensors" and path.is_file():
        table, metadata = safetensors_of(path)
        if "robuq" in metadata:
            raise WeightsError(f"{path}: a packed checkpoint, which has no full-precision weights; give the file it "
                               "was made from")  # fmt: skip
        return _read_official(path, table, None, hints)
    tree = load_pickle(path)
    arguments = tree.get("args") if isinstance(tree, dict) else None
    return _read_official(path, tensors_of(path, state_dict_in(tree)), arguments, hints)


def _matching(weights: Weights, hints: Hints) -> Weights:
    """``weights`` of a self-describing file, in the flavour of ``hints``; the other hints must agree with it."""
    found = {
        "prediction": (weights.diffusion or DiffusionConfig()).prediction_type,
        "num_classes": weights.config.num_classes,
        "num_heads": weights.config.num_heads,
    }
    for name, value in found.items():
        if hints.get(name) not in (None, value):
            raise WeightsError(
                f"{weights.path}: {name} is {value} in the file, not {hints.get(name)}; remove the option"
            )
    flavour = hints.get("flavour") or weights.config.flavour
    return replace(weights, config=weights.config.model_copy(update={"flavour": flavour}))


def load_dit(path: Path | str, **hints: Unpack[Hints]) -> tuple[ModelConfig, DiT]:
    """The network in ``path`` and its shape, parameters float32. Arguments and errors: as :func:`read_weights`."""
    weights = read_weights(path, **hints)
    return weights.config, weights.model()


def save_official(model: DiT, path: Path, diffusion: DiffusionConfig | None = None) -> None:
    """Write a full-precision ``model`` as ``{ema, args}``, the form that DiT's training saves.

    ``args`` records what the tensors do not say; ``diffusion`` defaults to DiT's.
    """
    tensors = {POSITIONS: model.pos_embed.detach(), **_foreign_tensors(model, "official")}
    config = model.config
    arguments = {
        "prediction_type": (diffusion or DiffusionConfig()).prediction_type,
        "flavour": "official" if config.flavour == "diffusers" else config.flavour,
        **config.model_dump(include={"num_classes", "num_heads", "position_scale"}),
    }
    with replacing(path) as temporary:
        torch.save({"ema": tensors, "args": arguments}, temporary)


def save_diffusers(
    model: DiT,
    folder: Path,
    *,
    diffusion: DiffusionConfig | None = None,
    class_names: tuple[str, ...] = (),
    vae: Path | None = None,
) -> None:
    """Write a full-precision ``model`` as a folder that diffusers' ``DiTPipeline`` loads, whole or not at all.

    diffusers runs any weights with its own numerics (``flavour="diffusers"``).

    Args:
        vae: folder of an ``AutoencoderKL`` to copy into it; without one, pass ``vae`` when loading the pipeline.
    """
    tensors = _foreign_tensors(model, "diffusers")
    write_pipeline(folder, model.config, tensors, diffusion or DiffusionConfig(), class_names, vae)


def _foreign_tensors(model: DiT, layout: Layout) -> dict[str, Tensor]:
    """The parameters of ``model`` by their names in ``layout``; copies do not share memory."""
    parameters = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    there = places(model.config, layout)
    if parameters.keys() != there.keys():
        raise WeightsError("a quantised model has no full-precision weights to write: give the model it was made from")
    tensors: dict[str, Tensor] = {}
    for name, place in there.items():
        parts = parameters[name].chunk(len(place.keys)) if place.stacked else [parameters[name]] * len(place.keys)
        for i, (key, part) in enumerate(zip(place.keys, parts, strict=True)):
            tensors[key] = (part.clone() if i or place.stacked else part).reshape(place.shape)
    return tensors


def _checked(weights: Weights) -> Weights:
    """``weights``, if the tensors of the file are exactly those that the configuration needs."""
    config, table = weights.config, weights.table
    needed = {key: place.shape for place in weights.places.values() for key in place.keys}
    positions = (1, config.num_tokens, config.hidden_size)
    needed |= dict.fromkeys(_REPEATED[weights.layout] & table.keys(), positions)
    differences = {"missing": sorted(needed.keys() - table.keys()), "unknown": sorted(table.keys() - needed.keys())}
    lists = [f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in differences.items() if keys]
    if lists:
        raise WeightsError(f"{weights.path}: not the tensors of a class-conditional DiT: {'; '.join(lists)}")
    for key, shape in needed.items():
        if table[key].shape != shape:
            raise WeightsError(f"{weights.path}: {key} is {table[key].shape}, but the other tensors and the "
                               f"configuration need {shape}")  # fmt: skip
    return weights


def _config(path: Path, **values: Any) -> ModelConfig:
    try:
        return ModelConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "shape"
        raise WeightsError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}") from error


def _depth(table: TensorTable, blocks: str) -> int:
    return len({found[1] for key in table if (found := re.match(rf"{blocks}\.(\d+)\.", key))})


def _read_official(path: Path, table: TensorTable, arguments: object, hints: Hints) -> Weights:
    table = without_wrappers(table)
    shape, kind = official_shape(path, table, arguments, hints)
    table = network_alone(table)
    config = _config(path, **shape, depth=_depth(table, "blocks"))
    positions = table[POSITIONS].read()
    check_positions(path, POSITIONS, positions, config)
    # Half precision has blurred the table: position_table has the exact one.
    kept = positions if positions.dtype is torch.float32 else None
    return _checked(Weights(path, "official", config, table, kept, DiffusionConfig(prediction_type=kind.prediction)))


def _read_diffusers(folder: Path) -> Weights:
    pipeline = read_pipeline(folder)
    table = without_wrappers(folder_tensors(pipeline.transformer))
    shape = pipeline.shape
    if shape["depth"] != (depth := _depth(table, "transformer_blocks")):
        raise WeightsError(f"{folder}: config.json says {shape['depth']} layers, the weights have {depth}")
    hidden = table.get("transformer_blocks.0.ff.net.0.proj.weight")
    ratio = hidden.shape[0] // shape["hidden_size"] if hidden is not None else 4
    config = _config(folder, **shape, mlp_ratio=ratio, flavour="diffusers")
    weights = _checked(Weights(folder, "diffusers", config, table, None, pipeline.diffusion, pipeline.class_names))
    for key in sorted(_REPEATED["diffusers"] & table.keys()):
        check_positions(folder, key, table[key].read(), config)
    return weights


def _newest_state(folder: Path) -> Path | None:
    """``folder`` if it is a training state, or the newest state in it, if it holds any."""
    if (folder / "state.json").exists():
        return folder
    states = [path for path in folder.glob("step-*") if (path / "state.json").exists()]
    return max(states, key=lambda path: (len(path.name), path.name), default=None)


def _read_state(folder: Path) -> Weights:
    """A training state of this project: its averaged weights, and the configuration of its latest run."""
    from robuq_core.shards import read_all  # imports torch.distributed, which costs a start of the server

    try:
        settings = read_json(folder / "state.json")["history"][-1]["config"]
        config = ModelConfig.model_validate(settings["model"])
        diffusion = DiffusionConfig.model_validate(settings["diffusion"])
        average = {name.removeprefix("ema."): tensor for name, tensor in read_all(folder, "ema.").items()}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise WeightsError(f"{folder}: not a whole training state of this version ({error}); "
                           "continue its training") from error  # fmt: skip
    table = tensors_of(folder, average)
    if any(".lowrank_" in key for key in table):
        raise WeightsError(f"{folder}: a quantised student, which has no full-precision weights; pack it with "
                           "robuq-train export, or give RUN_DIR/states/teacher")  # fmt: skip
    return _checked(Weights(folder, "robuq", config, table, None, diffusion))
