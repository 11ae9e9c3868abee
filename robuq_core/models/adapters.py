"""Full-precision DiT weights of other code bases, in and out.

Read: the ``.pt`` of DiT, SiT and REPA (a flat state dict, or one in what their training saves), the same as
safetensors, a diffusers pipeline folder or its ``transformer`` folder, and the states of a teacher trained here
(``RUN_DIR/states/teacher``). Written: the first and the third. The same tensors come back, bit for bit; ``flavour`` says whose numerics
they have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from robuq_core.config import DiffusionConfig, Flavour, ModelConfig, PredictionType
from robuq_core.files import read_json, replacing
from robuq_core.models.adapters_diffusers import read_pipeline, write_pipeline
from robuq_core.models.adapters_files import (
    TensorTable,
    WeightsError,
    folder_tensors,
    load_pickle,
    safetensors_of,
    tensors_of,
    unwrapped,
)
from robuq_core.models.adapters_keys import PATCH_WEIGHT, POSITIONS, Layout, foreign_keys
from robuq_core.models.adapters_kind import argument, classes_of, kind_of, network_alone, state_dict_in
from robuq_core.models.adapters_positions import position_scale
from robuq_core.models.dit import DiT, position_table
from robuq_core.models.presets import PRESETS

# Keys that only repeat what the configuration says.
_REPEATED = {"official": {POSITIONS}, "diffusers": {POSITIONS, "pos_embed.pos_embed"}, "robuq": set()}
_HEAD_WIDTHS = (64, 72)


@dataclass(frozen=True)
class Weights:
    """Full-precision weights in a file, checked for names and shapes; a tensor is read when asked for.

    ``positions``: the table that the file holds in full precision, ``[1, L, D]``, or None. ``diffusion``: the process
    that it was trained on, or None if nothing says. ``class_names``: as far as the file tells.
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
        """Parameter ``name``, float32, where possible mapped from the file: not to be written to.

        Raises:
            WeightsError: copies of it in the file differ or hold NaN, or it is no floating-point tensor.
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
        """The network with these weights; ``mapped``: to run only, sharing memory with the file where possible.

        Raises:
            WeightsError: as :meth:`tensor`.
        """
        with torch.device("meta"):
            model = DiT(self.config)
        tensors = {name: self.tensor(name) if mapped else self.tensor(name).clone() for name in self.shapes}
        model.load_state_dict(tensors, assign=True)
        model.pos_embed = position_table(self.config)[None] if self.positions is None else self.positions.clone()
        return model


def read_weights(
    path: Path | str,
    num_heads: int | None = None,
    *,
    prediction: PredictionType | None = None,
    num_classes: int | None = None,
    flavour: Flavour | None = None,
) -> Weights:
    """Find out what ``path`` holds; see the module for what is understood.

    Args:
        num_heads: attention heads, for an official file of a width that leaves them open.
        prediction, num_classes: for an official file that does not say them.
        flavour: whose numerics to run with; default: those of the file's kind.

    Raises:
        WeightsError: nothing usable, or not enough to know what it is; the message names the file, the key and the fix.
    """
    path = Path(path)
    given = Given(num_heads, prediction, num_classes, flavour)
    if path.is_dir():
        state = _newest_state(path)
        return given.compared(_read_diffusers(path, num_heads) if state is None else _read_state(state))
    if path.suffix == ".safetensors" and path.is_file():
        table, metadata = safetensors_of(path)
        if "robuq" in metadata:
            raise WeightsError(
                f"{path}: a packed checkpoint, whose full-precision weights are gone; give what it was made from"
            )
        return _read_official(path, table, None, given)
    tree = load_pickle(path)
    if isinstance(tree, dict) and {"ema", "optimiser", "history"} <= set(tree):
        return given.compared(_read_trained(path, tree))
    arguments = tree.get("args") if isinstance(tree, dict) else None
    return _read_official(path, tensors_of(path, state_dict_in(tree)), arguments, given)


@dataclass(frozen=True)
class Given:
    """What the caller of :func:`read_weights` says about a file."""

    num_heads: int | None
    prediction: PredictionType | None
    num_classes: int | None
    flavour: Flavour | None

    def compared(self, weights: Weights) -> Weights:
        """``weights`` of a file that says what it is, in the flavour asked for.

        Raises:
            WeightsError: it is something else than what is said here.
        """
        found = (weights.diffusion or DiffusionConfig()).prediction_type
        if self.prediction not in (None, found):
            raise WeightsError(f"{weights.path}: prediction is {found} there, not {self.prediction}; leave it out")
        if self.num_classes not in (None, weights.config.num_classes):
            raise WeightsError(f"{weights.path}: num_classes is {weights.config.num_classes} there, not "
                               f"{self.num_classes}; leave it out")  # fmt: skip
        if self.flavour is None:
            return weights
        return replace(weights, config=weights.config.model_copy(update={"flavour": self.flavour}))


def load_dit(path: Path | str, num_heads: int | None = None, **said: Any) -> tuple[ModelConfig, DiT]:
    """The network in ``path`` and its shape, parameters float32. Arguments and errors: as :func:`read_weights`."""
    weights = read_weights(path, num_heads, **said)
    return weights.config, weights.model()


def save_official(model: DiT, path: Path, diffusion: DiffusionConfig | None = None) -> None:
    """Write a full-precision ``model`` as the DiT authors' ``.pt``, positions included.

    It is the form that their training saves, ``{ema, args}``: the arguments say what the tensors do not. ``diffusion``
    defaults to DiT's.

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

    diffusers runs any weights with its own numerics: those of ``flavour="diffusers"``.

    Args:
        vae: a folder of diffusers' ``AutoencoderKL`` to copy in; without one the pipeline must be given its own.

    Raises:
        WeightsError: the model is quantised or has a shape that diffusers cannot express, or ``folder`` is taken.
    """
    tensors = _foreign_tensors(model, "diffusers")
    write_pipeline(folder, model.config, tensors, diffusion or DiffusionConfig(), class_names, vae)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters of a full-precision DiT, by name."""
    with torch.device("meta"):
        skeleton = DiT(config)
    return {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}


def _foreign_tensors(model: DiT, layout: Layout) -> dict[str, Tensor]:
    """The parameters of ``model`` by their names in ``layout``, each in memory of its own where it has copies."""
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
    return (shape[0], config.in_channels, patch, patch) if name == PATCH_WEIGHT else shape


def _checked(weights: Weights) -> Weights:
    """``weights``, if its file has every tensor that its configuration asks for, in that shape, and no other."""
    config, layout, table = weights.config, weights.layout, weights.table
    needed: dict[str, tuple[int, ...]] = {}
    for name, shape in weights.shapes.items():
        keys = foreign_keys(name, layout, config.depth)
        stored = shape if layout == "robuq" else _foreign_shape(name, shape, config)
        if keys.how == "parts":
            stored = (shape[0] // len(keys.names), *shape[1:])
        needed |= dict.fromkeys(keys.names, stored)
    needed |= dict.fromkeys(_REPEATED[layout] & table.keys(), (1, config.num_tokens, config.hidden_size))
    missing, unknown = sorted(needed.keys() - table.keys()), sorted(table.keys() - needed.keys())
    if missing or unknown:
        lists = [
            f"{len(keys)} {what} ({', '.join(keys[:3])})"
            for what, keys in (("missing", missing), ("unknown", unknown))
            if keys
        ]
        raise WeightsError(f"{weights.path}: not the tensors of a class-conditional DiT: {'; '.join(lists)}")
    for key, shape in needed.items():
        if table[key].shape != shape:
            raise WeightsError(f"{weights.path}: {key} is {table[key].shape}, but the other tensors and the "
                               f"configuration ask for {shape}")  # fmt: skip
    return weights


def _config(path: Path, **values: Any) -> ModelConfig:
    try:
        return ModelConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "shape"
        raise WeightsError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}") from error


def _depth(table: Mapping[str, object], prefix: str) -> int:
    return len({found[1] for key in table if (found := re.match(rf"{prefix}\.(\d+)\.", key))})


def _read_official(path: Path, table: TensorTable, arguments: object, given: Given) -> Weights:
    table, projectors = network_alone(unwrapped(table))
    if "pos_embed.proj.weight" in table:
        raise WeightsError(f"{path}: tensors of diffusers; give the folder that holds this file and its config.json")
    try:
        width, channels, patch, _ = table["x_embedder.proj.weight"].shape
        if POSITIONS not in table:
            raise WeightsError(f"{path}: {POSITIONS} is missing, which alone tells the size of the pictures; "
                               "save the whole state_dict() of the authors' model")  # fmt: skip
        _, tokens, _ = table[POSITIONS].shape
        rows = table["y_embedder.embedding_table.weight"].shape[0]
        outputs, hidden = table["final_layer.linear.weight"].shape[0], table["blocks.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise WeightsError(f"{path}: not the tensors of a class-conditional DiT: {error.args[0]} is missing") from error
    except ValueError as error:
        raise WeightsError(f"{path}: not the tensors of a class-conditional DiT: {error}") from error
    positions = table[POSITIONS].read()
    kind = kind_of(path, arguments, projectors, given.prediction, given.flavour)
    classes, null_class = classes_of(path, rows, arguments, given.num_classes)
    config = _config(
        path,
        input_size=isqrt(tokens) * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=width,
        depth=_depth(table, "blocks"),
        num_heads=given.num_heads or _official_heads(path, width, arguments),
        mlp_ratio=hidden // width,
        num_classes=classes,
        null_class=null_class,
        flavour=kind.flavour,
        learn_sigma=outputs != channels * patch**2,
        position_scale=position_scale(path, POSITIONS, positions),
    )
    # Half precision has blurred the table: the exact one is known.
    kept = positions if positions.dtype is torch.float32 else None
    return _checked(Weights(path, "official", config, table, kept, DiffusionConfig(prediction_type=kind.prediction)))


def _official_heads(path: Path, width: int, arguments: object) -> int:
    """No tensor tells: the published sizes do, or the one of DiT's head widths that divides ``width``."""
    named = PRESETS.get(str(argument(arguments, "model")).replace("SiT", "DiT"))
    if named is not None and named.hidden_size == width:
        return named.num_heads
    published = {shape.hidden_size: shape.num_heads for shape in PRESETS.values()}
    fits = [width // head for head in _HEAD_WIDTHS if width % head == 0]
    if width not in published and len(fits) != 1:
        raise WeightsError(f"{path}: the tensors leave open how many attention heads a width of {width} has; "
                           "say it with num_heads (--heads)")  # fmt: skip
    return published.get(width) or fits[0]


def _read_diffusers(folder: Path, num_heads: int | None) -> Weights:
    pipeline = read_pipeline(folder)
    table = unwrapped(folder_tensors(pipeline.transformer))
    if num_heads not in (None, pipeline.shape["num_heads"]):
        raise WeightsError(
            f"{folder}: config.json says {pipeline.shape['num_heads']} heads, not {num_heads}; leave num_heads out"
        )
    if pipeline.shape["depth"] != (depth := _depth(table, "transformer_blocks")):
        raise WeightsError(f"{folder}: config.json says {pipeline.shape['depth']} layers, the weights have {depth}")
    hidden = table.get("transformer_blocks.0.ff.net.0.proj.weight")
    width = pipeline.shape["hidden_size"]
    ratio = hidden.shape[0] // width if hidden is not None else 4
    config = _config(folder, **pipeline.shape, mlp_ratio=ratio, flavour="diffusers")
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
        raise WeightsError(f"{path}: a training state that does not say which model it trained; "
                           "train on with this version") from error  # fmt: skip
    table = tensors_of(path, tree["ema"])
    if any(".lowrank_" in key for key in table):
        raise WeightsError(f"{path}: a quantised student, whose full-precision weights are gone; pack it with "
                           "robuq-train export, or give the teacher's")  # fmt: skip
    return _checked(Weights(path, "robuq", config, table, None, diffusion))
