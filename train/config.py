"""The YAML file of a training run, validated; unknown keys, wrong types and impossible values are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from robuq_core.config import (
    DiffusionConfig,
    GuidanceScale,
    ModelConfig,
    QuantConfig,
    SamplerConfig,
    StrictModel,
    check_fit,
    fitting_defaults,
)
from robuq_core.errors import UserError
from robuq_core.files import read_bounded
from robuq_core.quant.hadamard import decompose_order
from train.logs import one_line


class ConfigError(UserError):
    """A configuration that cannot be used; the message names the key and the fix."""


Beta = Annotated[float, Field(ge=0, lt=1)]


class DataConfig(StrictModel):
    """Images, square at the model's size, mirrored at random."""

    path: Path = Field(description="class folders, a zip of them, an npz, Parquet files, or a folder of IDX files")
    split: Literal["train", "val", "test"] = Field(default="train", description="part of a data set that has several")
    fit: Literal["resize", "adm"] = Field(
        default="resize", description="resize and centre-crop; adm: crop as published ImageNet figures do"
    )
    flip_probability: float = Field(default=0.5, ge=0, le=1, description="share of mirrored samples")
    vae: Path | None = Field(
        default=None, description="folder of a diffusers AutoencoderKL: train on its latents instead of on pixels"
    )
    class_names: Path | None = Field(default=None, description="text file, one name per line, in class order")


class StageConfig(StrictModel):
    """One optimisation: AdamW at ``lr`` after a linear warm-up, constant or cosine down to ``final_lr_ratio``."""

    steps: int = Field(default=400_000, ge=1, description="optimiser steps")
    batch_size: int = Field(default=256, ge=1, description="images per step, over all processes")
    lr: float = Field(default=1e-4, gt=0, description="learning rate of AdamW")
    lr_schedule: Literal["constant", "cosine"] = Field(default="constant", description="after the linear warm-up")
    final_lr_ratio: float = Field(default=0.05, ge=0, le=1, description="where the cosine ends, as a share of lr")
    warmup_steps: int = Field(default=1000, ge=0, description="steps over which the learning rate rises")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="of AdamW")
    weight_decay: float = Field(default=0.0, ge=0, description="of AdamW")
    grad_clip: float | None = Field(default=1.0, gt=0, description="largest gradient norm; null: no clipping")
    ema_decay: Beta = Field(default=0.9999, description="of the averaged weights, which are what is used")
    more_ema_decays: tuple[Beta, ...] = Field(
        default=(), description="further averages to keep; evaluate and export them with --ema DECAY"
    )
    distill_weight: float = Field(
        default=0.0, ge=0, description="weight of the MSE to the teacher's output (warmup, qat)"
    )
    own_samples: float = Field(
        default=0.0, ge=0, le=1,
        description="share of inputs that are the model's own noised samples, for models that memorise",
    )  # fmt: skip
    save_every: int = Field(default=1000, ge=1, description="steps between saved states")
    keep_every: int | None = Field(
        default=None, ge=1, description="steps between states that stay when later ones are saved; null: none"
    )
    log_every: int = Field(default=50, ge=1, description="steps between log records")
    eval_every: int | None = Field(
        default=None, ge=1, description="steps between held-out losses and sample sheets; null: none"
    )
    eval_samples: int = Field(default=0, ge=0, description="samples for FD-EffNet at eval_every; 0: not measured")
    accumulate: int = Field(default=1, ge=1, description="split each batch into this many parts: less memory")
    activation_checkpointing: bool = Field(
        default=False, description="recompute each block in the backward pass: less memory"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp", description="under torchrun: each process holds the whole model, or a shard of it (FSDP2)"
    )
    gradients: Literal["fp32", "bf16"] = Field(
        default="fp32", description="gradients between processes; bf16 halves the traffic"
    )

    @model_validator(mode="after")
    def _counts_agree(self) -> StageConfig:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}")
        if self.keep_every is not None and self.keep_every % self.save_every:
            raise ValueError(f"keep_every {self.keep_every} must be a multiple of save_every {self.save_every}")
        return self


class TeacherConfig(StageConfig):
    """The full-precision model: trained, or taken as it is from elsewhere."""

    pretrained: Path | None = Field(
        default=None,
        description="weights to import in place of training: the authors' .pt, a diffusers folder, or "
        "RUN_DIR/states/teacher of another run",
    )


class QATConfig(StageConfig):
    """The quantised model; it starts from the teacher by default."""

    steps: int = Field(default=350_000, ge=1, description="optimiser steps")
    batch_size: int = Field(default=32, ge=1, description="images per step, over all processes")
    warm_start: Literal["warmup"] | Path | None = Field(
        default=None,
        description="start from this run's warm-up, or from RUN_DIR/states/qat of another run, say at 4 bits",
    )


class SensitivityConfig(StrictModel):
    """What each layer loses at each activation width, all others at the width nearest to ``allocate.average_bits``."""

    bits: tuple[Annotated[int, Field(ge=1, le=8)], ...] = Field(default=(1, 2, 3, 4), description="widths to try")
    samples: int = Field(default=256, ge=1, description="fixed points that every width is measured on")
    batch_size: int = Field(default=16, ge=1, description="points per batch; intervals resample batches")
    guidance_scale: GuidanceScale = Field(default=1.0, description="guidance of the compared predictions; 1: none")
    metric: Literal["teacher_mse", "diffusion_loss"] = Field(
        default="teacher_mse", description="what the allocation uses; both are measured"
    )
    after: Literal["warmup", "teacher"] = Field(
        default="warmup", description="measure the warmed-up student, or the teacher quantised without training"
    )


class AllocateConfig(StrictModel):
    """Which width each layer gets, eq. (6); ``average_bits`` null leaves ``quant.activation_bits`` everywhere."""

    average_bits: float | None = Field(
        default=None, ge=1, le=8, description="average weighted by multiply-accumulates; null: no search"
    )
    method: Literal["dynamic_programming", "greedy", "uniform"] = Field(
        default="dynamic_programming", description="dynamic_programming is exact"
    )


class EvaluationConfig(StrictModel):
    """How samples are drawn to be measured; steps, guidance and sampler are ``sampler``'s."""

    samples: int = Field(default=2000, ge=2, description="samples per seed")
    split: Literal["train", "val", "test"] = Field(
        default="train", description="part of the data that samples are compared with"
    )
    photos: int = Field(default=50_000, ge=2, description="most photos to compare with; at most 10,000 for latents")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(0, 1, 2), min_length=1, description="intervals are over these"
    )
    batch_size: int = Field(default=64, ge=1, description="samples per batch")
    inception: Path | None = Field(
        default=None, description="torch-fidelity's Inception-v3 weights, for FID, sFID, IS, precision and recall"
    )
    dinov2: Path | None = Field(
        default=None, description="the authors' DINOv2 weights (dinov2_vitl14_pretrain.pth), for FD-DINOv2"
    )
    reference: Path | None = Field(default=None, description="ADM's reference npz to compare with instead of data.path")


# Overrides of a run for figures that are compared with published ones.
PROTOCOLS = {
    "ddpm-cfg-1.5": ("sampler.sampler=ddpm", "sampler.steps=250", "sampler.guidance_scale=1.5",
                     "evaluation.samples=50000", "evaluation.seeds=[0]"),
    "ddpm-cfg-4.0": ("sampler.sampler=ddpm", "sampler.steps=250", "sampler.guidance_scale=4.0",
                     "evaluation.samples=50000", "evaluation.seeds=[0]"),
    "quick": ("sampler.steps=50", "evaluation.samples=10000", "evaluation.seeds=[0]"),
}  # fmt: skip


class TrainConfig(StrictModel):
    """A whole run: every stage reads the same file and writes below ``run_dir``."""

    run_dir: Path = Field(description="folder for everything that the run writes")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of weights, batches and noise")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="auto: bf16 where the hardware supports it"
    )
    compile: bool = Field(default=True, description="use torch.compile")
    wandb: str | None = Field(
        default=None, description="project of Weights & Biases that curves also go to; needs the package wandb"
    )
    class_dropout: float = Field(
        default=0.1, ge=0, lt=1, description="share of labels dropped, for guidance; 0: no null class, no guidance"
    )
    class_init: Literal["normal", "pca"] = Field(
        default="normal", description="class table: random, or principal components of the class means"
    )
    class_init_std: float = Field(default=0.02, gt=0, description="initial spread of the class table")
    model: ModelConfig
    quant: QuantConfig = QuantConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    sampler: SamplerConfig = SamplerConfig()
    data: DataConfig
    teacher: TeacherConfig = TeacherConfig()
    warmup: StageConfig = StageConfig(steps=1000, batch_size=32)
    sensitivity: SensitivityConfig = SensitivityConfig()
    allocate: AllocateConfig = AllocateConfig()
    qat: QATConfig = QATConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="before")
    @classmethod
    def _chosen_by_others(cls, tree: Any) -> Any:
        """Fill in what follows from other keys where it is not given: ``class_dropout`` 0 and no null class belong
        together, and the sampler's defaults are those of the network."""
        if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
            return tree
        model = tree["model"]
        if tree.get("class_dropout") == 0 and model.get("num_classes") != 0:
            tree = {**tree, "model": {"null_class": False, **model}}
        elif "class_dropout" not in tree and (model.get("num_classes") == 0 or model.get("null_class") is False):
            tree = {**tree, "class_dropout": 0}
        try:
            diffusion = DiffusionConfig.model_validate(tree.get("diffusion", {}))
            given = SamplerConfig.model_validate(tree.get("sampler", {}))
            shape = ModelConfig.model_validate(tree["model"])
            return {**tree, "sampler": fitting_defaults(given, shape, diffusion.prediction_type)}
        except ValueError:  # said by the fields' own validation, with their names
            return tree

    @model_validator(mode="after")
    def _sizes_fit(self) -> TrainConfig:
        if self.data.vae is None and self.model.in_channels not in (1, 3):
            raise ValueError(f"model.in_channels must be 1 (grey) or 3 (RGB), not {self.model.in_channels}, unless "
                             "data.vae makes latents of images")  # fmt: skip
        # Said before the teacher trains, not after: quantisation rotates the inputs of every block linear.
        for width in (self.model.hidden_size, self.model.hidden_size * self.model.mlp_ratio):
            try:
                decompose_order(width)
            except ValueError as error:
                raise ValueError(f"model.hidden_size {self.model.hidden_size} cannot be quantised: {error}") from error
        return self

    @model_validator(mode="after")
    def _classes_agree(self) -> TrainConfig:
        model, drops = self.model, self.class_dropout > 0
        if drops != model.can_guide:
            if not model.num_classes:
                raise ValueError(f"class_dropout must be 0, not {self.class_dropout}: model.num_classes is 0")
            raise ValueError(f"class_dropout {self.class_dropout} and model.null_class {model.null_class} contradict "
                             "each other: dropped labels are what trains the null class")  # fmt: skip
        try:
            check_fit(model, self.diffusion.prediction_type, self.sampler.sampler, self.sampler.guidance_scale)
        except ValueError as error:
            raise ValueError(f"sampler.{error}") from error
        if self.sensitivity.guidance_scale != 1 and not model.can_guide:
            raise ValueError(f"sensitivity.guidance_scale must be 1, not {self.sensitivity.guidance_scale:g}: without "
                             "classes and a null class there is no guidance")  # fmt: skip
        if self.class_init == "pca" and not model.num_classes:
            raise ValueError("class_init pca needs classes, and model.num_classes is 0; set normal")
        return self

    @model_validator(mode="after")
    def _choices_agree(self) -> TrainConfig:
        for name, stage in (("teacher", self.teacher), ("warmup", self.warmup), ("qat", self.qat)):
            if stage.own_samples and self.diffusion.prediction_type != "sample":
                raise ValueError(f"{name}.own_samples needs diffusion.prediction_type sample, not "
                                 f"{self.diffusion.prediction_type}: what others predict grows without bound as the "
                                 "noise fades")  # fmt: skip
        if self.allocate.average_bits is not None and self.quant.bits:
            raise ValueError("quant.bits and allocate.average_bits both choose the widths of layers: leave one out")
        return self


def annotated_defaults() -> str:
    """Every key with its default, choices and meaning, as YAML; ``warmup`` and ``qat`` have what differs from
    ``teacher``. What has no default is ``REQUIRED``."""
    lines, teacher = [], TrainConfig.model_fields["teacher"].default
    for name, field in TrainConfig.model_fields.items():
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, StrictModel)):
            lines.append(_annotated(name, field.default, field))
            continue
        lines.append(f"{name}:" + ("  # as teacher, except:" if name in ("warmup", "qat") else ""))
        for key, inner in section.model_fields.items():
            default = inner.get_default(call_default_factory=True, validated_data={})
            if field.default is not PydanticUndefined:
                default = getattr(field.default, key)
            if name not in ("warmup", "qat") or default != getattr(teacher, key, PydanticUndefined):
                lines.append("  " + _annotated(key, default, inner))
    return "\n".join(lines) + "\n"


def _annotated(key: str, default: Any, field: FieldInfo) -> str:
    value = "REQUIRED" if default is PydanticUndefined else json.dumps(default).strip('"')
    choices = " | ".join(choice for choice in get_args(field.annotation) if isinstance(choice, str))
    return f"{f'{key}: {value}':<40}  # " + "; ".join(filter(None, (choices, field.description)))


def parse_yaml(text: str | bytes) -> Any:
    """``yaml.safe_load`` of text that a stranger may have written.

    Raises ValueError: malformed, not UTF-8, or nested deeper than the interpreter can follow.
    """
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from error


def load_config(path: Path, overrides: list[str]) -> TrainConfig:
    """Read a YAML file and apply ``section.key=value`` overrides (values are YAML too).

    Raises ConfigError: unreadable file, malformed override, unknown key or value out of range.
    """
    try:
        tree = parse_yaml(read_bounded(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot read the configuration: {one_line(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping at the top level")
    for override in overrides:
        _apply_override(tree, override)
    try:
        return TrainConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(_complaint(e) for e in error.errors())) from error


def _complaint(error: ErrorDetails) -> str:
    unknown = error["type"] == "extra_forbidden"
    message = "unknown key" if unknown else error["msg"].removeprefix("Value error, ")
    return ": ".join([*filter(None, [".".join(map(str, error["loc"]))]), message])


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r} must look like section.key=value")
    *sections, leaf = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {section} is not a section")
    try:
        tree[leaf] = parse_yaml(value)
    except ValueError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {one_line(error)}") from error
