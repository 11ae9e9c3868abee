"""Full-precision DiT weights of other code bases, read and written.

Read: the ``.pt`` of DiT, SiT and REPA (a flat state dict, or one in the file of a training script), the same as
safetensors, a diffusers pipeline folder or its ``transformer`` folder, and ``RUN_DIR/states/teacher`` of a run.
Written: the first and the third. Round trips are exact bit for bit; ``flavour`` records whose numerics weights have.

Layouts differ: the patch embedder is a convolution elsewhere and a linear here; diffusers keeps q, k and v apart and
stores the embedders of timestep and class once per block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
from robuq_core.models.adapters_official import POSITIONS, Hints, network_alone, official_shape, position_scale
from robuq_core.models.dit import DiT, position_table

Layout = Literal["official", "diffusers", "robuq"]
_PATCH_WEIGHT = "x_embedder.weight"
# Module here -> official, diffusers. "*": stored once per block.
_MODULES = {
    "x_embedder": ("x_embedder.proj", "pos_embed.proj"),
    "t_embedder.mlp.0": ("t_embedder.mlp.0", "transformer_blocks.*.norm1.emb.timestep_embedder.linear_1"),
    "t_embedder.mlp.2": ("t_embedder.mlp.2", "transformer_blocks.*.norm1.emb.timestep_embedder.linear_2"),
    "y_embedder.embedding_table": (
        "y_embedder.embedding_table",
        "transformer_blocks.*.norm1.emb.class_embedder.embedding_table",
    ),
    "final_layer.adaLN_modulation.1": ("final_layer.adaLN_modulation.1", "proj_out_1"),
    "final_layer.linear": ("final_layer.linear", "proj_out_2"),
}
# The same within a block; parts joined by "|" are stacked along the first dimension.
_BLOCK_MODULES = {
    "attn.qkv": ("attn.qkv", "attn1.to_q|attn1.to_k|attn1.to_v"),
    "attn.proj": ("attn.proj", "attn1.to_out.0"),
    "mlp.fc1": ("mlp.fc1", "ff.net.0.proj"),
    "mlp.fc2": ("mlp.fc2", "ff.net.2"),
    "adaLN_modulation.1": ("adaLN_modulation.1", "norm1.linear"),
}
_COLUMN = {"official": 0, "diffusers": 1}
_BLOCKS = {"official": "blocks", "diffusers": "transformer_blocks"}
# Keys that repeat what the configuration says.
_REPEATED = {"official": {POSITIONS}, "diffusers": {POSITIONS, "pos_embed.pos_embed"}, "robuq": set()}


class Keys(NamedTuple):
    """Where a tensor lies in another layout: in equal ``copies``, or in ``parts`` along its first dimension."""

    names: tuple[str, ...]
    how: Literal["copies", "parts"] = "copies"


def foreign_keys(name: str, layout: Layout, depth: int) -> Keys:
    """The keys of this project's parameter ``name`` in ``layout``.

    Raises:
        KeyError: not a parameter of a DiT.
    """
    if layout == "robuq":
        return Keys((name,))
    module, _, kind = name.rpartition(".")
    if module.startswith("blocks."):
        _, index, inner = module.split(".", 2)
        parts = _BLOCK_MODULES[inner][_COLUMN[layout]].split("|")
        names = tuple(f"{_BLOCKS[layout]}.{index}.{part}.{kind}" for part in parts)
        return Keys(names, "parts" if len(parts) > 1 else "copies")
    pattern = f"{_MODULES[module][_COLUMN[layout]]}.{kind}"
    return Keys(tuple(pattern.replace("*", str(i)) for i in range(depth)) if "*" in pattern else (pattern,))


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
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters under this project's names."""
        return parameter_shapes(self.config)

    def tensor(self, name: str) -> Tensor:
        """Parameter ``name``, float32, memory-mapped where possible: read-only.

        Raises:
            WeightsError: copies of it in the file differ or hold NaN, or it is not floating point.
        """
        keys = foreign_keys(name, self.layout, self.config.depth)
        first = self.table[keys.names[0]].read()
        if not first.is_floating_point():
            raise WeightsError(f"{self.path}: {keys.names[0]} is {first.dtype}, not floating point")
        if keys.how == "parts":
            return torch.cat([self.table[key].read() for key in keys.names]).float()
        for key in keys.names[1:]:
            if not torch.equal(self.table[key].read(), first):
                raise self._unequal(keys.names[0], key)
        return first.float().reshape(self.shapes[name])

    def _unequal(self, first: str, key: str) -> WeightsError:
        for name in (first, key):
            if bool(self.table[name].read().isnan().any()):
                return WeightsError(f"{self.path}: {name} holds NaN; use weights from before their training diverged")
        return WeightsError(f"{self.path}: {key} differs from {first}, and this network has one such embedder for all "
                            "blocks; use weights whose embedders are equal")  # fmt: skip

    def model(self, *, mapped: bool = False) -> DiT:
        """The network with these weights; ``mapped``: for inference only, sharing memory with the file where possible.

        Raises:
            WeightsError: as :meth:`tensor`.
        """
        with torch.device("meta"):
            model = DiT(self.config)
        tensors = {name: self.tensor(name) if mapped else self.tensor(name).clone() for name in self.shapes}
        model.load_state_dict(tensors, assign=True)
        model.pos_embed = position_table(self.config)[None] if self.positions is None else self.positions.clone()
        return model


def read_weights(path: Path | str, **hints: Unpack[Hints]) -> Weights:
    """Find out what ``path`` holds; the module lists the formats.

    Args:
        hints: see :class:`~robuq_core.models.adapters_official.Hints`.

    Raises:
        WeightsError: nothing usable, ambiguous, or not what ``hints`` say; the message names file, key and fix.
    """
    if unknown := hints.keys() - Hints.__annotations__:
        raise TypeError(f"weights have no hint {sorted(unknown)[0]!r}; give {', '.join(Hints.__annotations__)}")
    path = Path(path)
    if path.is_dir():
        if (state := _newest_state(path)) is not None:
            return _matching(_read_state(state), hints)
        return _matching(_read_diffusers(path, hints.get("num_heads")), hints)
    if path.suffix == ".safetensors" and path.is_file():
        table, metadata = safetensors_of(path)
        if "robuq" in metadata:
            raise WeightsError(f"{path}: a packed checkpoint, which has no full-precision weights; give the file it "
                               "was made from")  # fmt: skip
        return _read_official(path, table, None, hints)
    tree = load_pickle(path)
    if isinstance(tree, dict) and {"ema", "optimiser", "history"} <= set(tree):
        return _matching(_read_trained(path, tree), hints)
    arguments = tree.get("args") if isinstance(tree, dict) else None
    return _read_official(path, tensors_of(path, state_dict_in(tree)), arguments, hints)


def _matching(weights: Weights, hints: Hints) -> Weights:
    """``weights`` of a self-describing file, in the flavour of ``hints``; the other hints must agree with it."""
    found = {
        "prediction": (weights.diffusion or DiffusionConfig()).prediction_type,
        "num_classes": weights.config.num_classes,
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

    Raises:
        WeightsError: the model is quantised.
    """
    tensors = {POSITIONS: model.pos_embed.detach(), **_foreign_tensors(model, "official")}
    config = model.config
    arguments = {
        "prediction_type": (diffusion or DiffusionConfig()).prediction_type,
        "flavour": "official" if config.flavour == "diffusers" else config.flavour,
        "num_classes": config.num_classes,
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

    Raises:
        WeightsError: the model is quantised, diffusers cannot express it, or ``folder`` exists.
    """
    tensors = _foreign_tensors(model, "diffusers")
    write_pipeline(folder, model.config, tensors, diffusion or DiffusionConfig(), class_names, vae)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters of a full-precision DiT, by name."""
    with torch.device("meta"):
        skeleton = DiT(config)
    return {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}


def _foreign_tensors(model: DiT, layout: Layout) -> dict[str, Tensor]:
    """The parameters of ``model`` by their names in ``layout``; copies do not share memory."""
    config = model.config
    parameters = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    if parameters.keys() != parameter_shapes(config).keys():
        raise WeightsError("a quantised model has no full-precision weights to write: give the model it was made from")
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        keys = foreign_keys(name, layout, config.depth)
        shaped = parameter.reshape(_foreign_shape(name, tuple(parameter.shape), config))
        if keys.how == "parts":
            tensors |= zip(keys.names, (part.clone() for part in shaped.chunk(len(keys.names))), strict=True)
        else:
            tensors |= {key: shaped if i == 0 else shaped.clone() for i, key in enumerate(keys.names)}
    return tensors


def _foreign_shape(name: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    patch = config.patch_size
    return (shape[0], config.in_channels, patch, patch) if name == _PATCH_WEIGHT else shape


def _checked(weights: Weights) -> Weights:
    """``weights``, if the tensors of the file are exactly those that the configuration needs."""
    config, layout, table = weights.config, weights.layout, weights.table
    needed: dict[str, tuple[int, ...]] = {}
    for name, shape in weights.shapes.items():
        keys = foreign_keys(name, layout, config.depth)
        stored = shape if layout == "robuq" else _foreign_shape(name, shape, config)
        if keys.how == "parts":
            stored = (shape[0] // len(keys.names), *shape[1:])
        needed |= dict.fromkeys(keys.names, stored)
    needed |= dict.fromkeys(_REPEATED[layout] & table.keys(), (1, config.num_tokens, config.hidden_size))
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


def _depth(table: Mapping[str, object], layout: Layout) -> int:
    return len({found[1] for key in table if (found := re.match(rf"{_BLOCKS[layout]}\.(\d+)\.", key))})


def _read_official(path: Path, table: TensorTable, arguments: object, hints: Hints) -> Weights:
    table = without_wrappers(table)
    shape, kind = official_shape(path, table, arguments, hints)
    table = network_alone(table)
    config = _config(path, **shape, depth=_depth(table, "official"))
    positions = table[POSITIONS].read()
    # Half precision has blurred the table: position_table has the exact one.
    kept = positions if positions.dtype is torch.float32 else None
    return _checked(Weights(path, "official", config, table, kept, DiffusionConfig(prediction_type=kind.prediction)))


def _read_diffusers(folder: Path, num_heads: int | None) -> Weights:
    pipeline = read_pipeline(folder)
    table = without_wrappers(folder_tensors(pipeline.transformer))
    shape = pipeline.shape
    if num_heads not in (None, shape["num_heads"]):
        raise WeightsError(f"{folder}: config.json says {shape['num_heads']} heads, not {num_heads}; remove "
                           "num_heads")  # fmt: skip
    if shape["depth"] != (depth := _depth(table, "diffusers")):
        raise WeightsError(f"{folder}: config.json says {shape['depth']} layers, the weights have {depth}")
    hidden = table.get("transformer_blocks.0.ff.net.0.proj.weight")
    ratio = hidden.shape[0] // shape["hidden_size"] if hidden is not None else 4
    config = _config(folder, **shape, mlp_ratio=ratio, flavour="diffusers")
    weights = _checked(Weights(folder, "diffusers", config, table, None, pipeline.diffusion, pipeline.class_names))
    for key in sorted(_REPEATED["diffusers"] & table.keys()):
        if (scale := position_scale(folder, key, table[key].read())) != 1:
            raise WeightsError(f"{folder}: {key} has positions {scale:g} apart, where diffusers' DiT has 1; "
                               "give the weights in the official form")  # fmt: skip
    return weights


def _newest_state(folder: Path) -> Path | None:
    """``folder`` if it is a training state, or the newest state in it, if it holds any."""
    if (folder / "state.json").exists():
        return folder
    states = [path for path in folder.glob("step-*") if (path / "state.json").exists()]
    return max(states, key=lambda path: (len(path.name), path.name), default=None)


def _read_state(folder: Path) -> Weights:
    from robuq_core.shards import read_all  # imports torch.distributed, which costs a start of the server

    try:
        history = read_json(folder / "state.json")["history"]
        average = {name.removeprefix("ema."): tensor for name, tensor in read_all(folder, "ema.").items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{folder}: not a whole training state ({error})") from error
    return _read_trained(folder, {"history": history, "ema": average})


def _read_trained(path: Path, tree: dict[str, Any]) -> Weights:
    """A training state of this project: its averaged weights, and the configuration of its latest run."""
    try:
        settings = tree["history"][-1]["config"]
        config = ModelConfig.model_validate(settings["model"])
        diffusion = DiffusionConfig.model_validate(settings["diffusion"])
    except (KeyError, IndexError, TypeError, ValidationError) as error:
        raise WeightsError(f"{path}: a training state without the configuration of its model; "
                           "continue its training with this version") from error  # fmt: skip
    table = tensors_of(path, tree["ema"])
    if any(".lowrank_" in key for key in table):
        raise WeightsError(f"{path}: a quantised student, which has no full-precision weights; pack it with "
                           "robuq-train export, or give RUN_DIR/states/teacher")  # fmt: skip
    return _checked(Weights(path, "robuq", config, table, None, diffusion))
