"""The JSON of a diffusers DiT pipeline folder, read and written without diffusers.

Its numerics differ from the DiT authors' in three places, recorded as ``flavour="diffusers"``: time frequencies of
k/127, an epsilon of 1e-5 in the second norm, and guidance on all channels. Other models and
processes raise :class:`WeightsError`.
"""

from __future__ import annotations

import json
import reprlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from safetensors.torch import save_file
from torch import Tensor

from robuq_core.config import BETA_END, BETA_START, DiffusionConfig, ModelConfig
from robuq_core.files import publish_folder
from robuq_core.models.adapters_files import WEIGHTS_NAME, WeightsError, read_json

Section = TypeVar("Section", bound=BaseModel)


class _Transformer(BaseModel):
    """The keys of ``transformer/config.json`` that affect the result; the defaults are diffusers' own."""

    model_config = ConfigDict(extra="ignore")

    class_name: Literal["DiTTransformer2DModel", "Transformer2DModel"] = Field(alias="_class_name")
    num_attention_heads: int = Field(16, ge=1)
    attention_head_dim: int = Field(72, ge=1)
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    sample_size: int = 32
    patch_size: int = 2
    num_embeds_ada_norm: int = Field(1000, ge=0)
    activation_fn: Literal["gelu-approximate"] = "gelu-approximate"
    norm_type: Literal["ada_norm_zero"] = "ada_norm_zero"
    attention_bias: Literal[True] = True
    norm_elementwise_affine: Literal[False] = False
    norm_eps: float = Field(1e-5, ge=0.999e-5, le=1.001e-5)


class _Scheduler(BaseModel):
    """The keys of ``scheduler/scheduler_config.json`` that describe the process the network was trained on."""

    model_config = ConfigDict(extra="ignore")

    class_name: str = Field("", alias="_class_name")
    num_train_timesteps: Literal[1000] = 1000
    beta_start: float = Field(BETA_START, ge=0.999 * BETA_START, le=1.001 * BETA_START)
    beta_end: float = Field(BETA_END, ge=0.999 * BETA_END, le=1.001 * BETA_END)
    beta_schedule: Literal["linear"] = "linear"
    trained_betas: None = None
    rescale_betas_zero_snr: Literal[False] = False
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    thresholding: Literal[False] = False
    clip_sample: bool = False
    clip_sample_range: float = 1.0

    @field_validator("class_name")
    @classmethod
    def _diffusion(cls, value: str) -> str:
        if value.startswith("FlowMatch"):
            raise ValueError("a flow; give the original .pt file")
        return value

    @field_validator("clip_sample_range")
    @classmethod
    def _clips_to_one(cls, value: float, info: ValidationInfo) -> float:
        if info.data.get("clip_sample") and value != 1:
            raise ValueError("with clip_sample it must be 1")
        return value


@dataclass(frozen=True)
class Pipeline:
    """Where the weights are, the values of :class:`ModelConfig` in the JSON, and the process."""

    transformer: Path
    shape: dict[str, Any]
    diffusion: DiffusionConfig | None
    class_names: tuple[str, ...]


def read_pipeline(folder: Path) -> Pipeline:
    """Read a pipeline folder, or its ``transformer`` folder alone."""
    transformer = folder / "transformer" if (folder / "transformer").is_dir() else folder
    path = transformer / "config.json"
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; give a diffusers pipeline folder or its transformer folder")
    config = _validated(_Transformer, path)
    channels = config.in_channels
    outputs = channels if config.out_channels is None else config.out_channels
    if outputs not in (channels, 2 * channels):
        raise WeightsError(f"{path}: out_channels {outputs} is neither in_channels {channels} nor twice that")
    shape = {
        "input_size": config.sample_size,
        "patch_size": config.patch_size,
        "in_channels": channels,
        "hidden_size": config.num_attention_heads * config.attention_head_dim,
        "depth": config.num_layers,
        "num_heads": config.num_attention_heads,
        "num_classes": config.num_embeds_ada_norm,
        "learn_sigma": outputs == 2 * channels,
    }
    return Pipeline(transformer, shape, _diffusion(folder), _class_names(folder, config.num_embeds_ada_norm))


def _validated(kind: type[Section], path: Path) -> Section:
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise WeightsError(f"{path}: {'.'.join(map(str, first['loc']))} {reprlib.repr(first['input'])} is not "
                           f"supported: {first['msg'].removeprefix('Value error, ')}") from error  # fmt: skip


def _diffusion(folder: Path) -> DiffusionConfig | None:
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return None
    scheduler = _validated(_Scheduler, path)
    return DiffusionConfig(prediction_type=scheduler.prediction_type, clip_sample=scheduler.clip_sample)


def _class_names(folder: Path, classes: int) -> tuple[str, ...]:
    """The names in ``model_index.json``; empty unless there is one for every class."""
    path = folder / "model_index.json"
    names = read_json(path).get("id2label") if path.is_file() else None
    if not isinstance(names, dict) or len(names) != classes or set(names) != {str(i) for i in range(classes)}:
        return ()
    if not all(isinstance(name, str) for name in names.values()):
        raise WeightsError(f"{path}: id2label has names that are not text; fix or remove it")
    return tuple(names[str(i)] for i in range(classes))


def write_pipeline(
    folder: Path,
    model: ModelConfig,
    tensors: dict[str, Tensor],
    diffusion: DiffusionConfig,
    class_names: tuple[str, ...],
    vae: Path | None,
) -> None:
    """Write a pipeline folder whose transformer has ``tensors``; see ``save_diffusers``."""
    if model.position_scale != 1 or model.mlp_ratio != 4:
        raise WeightsError("diffusers' DiT has a position_scale of 1 and an mlp_ratio of 4, not "
                           f"{model.position_scale:g} and {model.mlp_ratio}; write the official format")  # fmt: skip
    if diffusion.prediction_type == "flow" or not model.null_class:
        reason = "prediction_type flow" if model.null_class else "a class table without a row for no class (null class)"
        raise WeightsError(f"diffusers has no DiT with {reason}; write the official format")
    vae_class = None if vae is None else read_json(vae / "config.json").get("_class_name")
    index: dict[str, Any] = {
        "_class_name": "DiTPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": [None, None] if vae is None else ["diffusers", vae_class],
    }
    if class_names:
        index["id2label"] = {str(i): name for i, name in enumerate(class_names)}
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"{folder}: exists already; choose another folder, or remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
        root = Path(made) / folder.name
        root.mkdir()
        _write_json(root / "model_index.json", index)
        scheduler = _Scheduler.model_validate({"_class_name": "DDIMScheduler", **diffusion.model_dump()})
        _write_json(root / "scheduler" / "scheduler_config.json", scheduler.model_dump(by_alias=True))
        _write_json(root / "transformer" / "config.json", _transformer_config(model))
        save_file(tensors, root / "transformer" / f"{WEIGHTS_NAME}.safetensors", metadata={"format": "pt"})
        if vae is not None:
            shutil.copytree(vae, root / "vae")
        publish_folder(root, folder)


def _transformer_config(model: ModelConfig) -> dict[str, Any]:
    written = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": model.num_heads,
        "attention_head_dim": model.hidden_size // model.num_heads,
        "in_channels": model.in_channels,
        "out_channels": model.out_channels,
        "num_layers": model.depth,
        "sample_size": model.input_size,
        "patch_size": model.patch_size,
        "num_embeds_ada_norm": model.num_classes,
    }
    return _Transformer.model_validate(written).model_dump(by_alias=True)


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
