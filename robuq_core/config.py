"""Configuration of a model: shape, quantisation, diffusion and sampling defaults.

Both the YAML files of ``train`` and the header of a packed checkpoint use these pydantic models; an unknown or
ill-typed key is an error that names it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from robuq_core.quant.choices import ActivationRule, Grid, LowRankInit, WeightScale

Flavour = Literal["official", "diffusers", "sit", "repa"]
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]
SamplerName = Literal["ddpm", "ddim", "dpmsolver++", "euler", "heun", "sde"]
DecoderKind = Literal["pixels", "latent"]
RotatedLinears = Literal["all", "proj_fc2", "none"]
DIFFUSION_SAMPLERS: tuple[SamplerName, ...] = ("ddpm", "ddim", "dpmsolver++")
FLOW_SAMPLERS: tuple[SamplerName, ...] = ("euler", "heun", "sde")

NUM_TRAIN_TIMESTEPS = 1000
BETA_START, BETA_END = 1e-4, 0.02
MAX_SEED = 2**32 - 1
# Limits for untrusted files, well above the largest published DiT: a small file could ask for any number of tokens.
MAX_TOKENS = 16_384
MAX_VALUES = 2**24
MAX_CLASSES = 1_000_000

Steps = Annotated[int, Field(ge=1, le=NUM_TRAIN_TIMESTEPS)]
GuidanceScale = Annotated[float, Field(ge=0, le=20)]


def image_seed(seed: int, index: int) -> int:
    """Seed of image ``index`` of a request with ``seed``: the same as a request of one image with that seed."""
    return (seed + index) % (MAX_SEED + 1)


def rows_of(guidance_scale: float) -> int:
    """Most rows of the model that an image takes in a step: with guidance one more, without a class."""
    return 1 if guidance_scale == 1 else 2


def samplers_of(prediction_type: PredictionType) -> tuple[SamplerName, ...]:
    """The samplers for a network of this prediction type."""
    return FLOW_SAMPLERS if prediction_type == "flow" else DIFFUSION_SAMPLERS


class StrictModel(BaseModel):
    """Base of every config section: frozen; refuses unknown keys and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(StrictModel):
    """Shape of a DiT. Sizes in pixels or latent cells; ``flavour``: which code base's numerics it has.

    ``num_classes`` 0: a network without classes. ``null_class``: the class table ends with a row for no class, which
    guidance needs; with ``num_classes`` 0 it is the only row.

    ``position_scale`` is the distance between neighbours in the sin-cos table, 1 in DiT. With few tokens per side its
    frequencies barely differ between tokens; 100 spreads them.
    """

    input_size: int = Field(32, ge=2, le=4096, description="side of the image, in pixels or latent cells")
    patch_size: int = Field(2, ge=1, le=256, description="side of a token")
    in_channels: int = Field(4, ge=1, le=1024, description="3 for RGB, 1 for grey, 4 for SD-VAE's latents")
    hidden_size: int = Field(1152, ge=4, le=32_768, description="width")
    depth: int = Field(28, ge=1, le=256, description="number of blocks")
    num_heads: int = Field(16, ge=1, le=1024, description="attention heads")
    mlp_ratio: int = Field(4, ge=1, le=64, description="width of the MLP over hidden_size")
    num_classes: int = Field(1000, ge=0, le=MAX_CLASSES, description="0: no classes; labels are ignored")
    null_class: bool = Field(True, description="a class-table row for no class, which guidance needs")
    learn_sigma: bool = Field(True, description="also predict the variance")
    position_scale: float = Field(
        1.0, gt=0, le=10_000, description="distance of neighbours in the sin-cos table; more for few tokens"
    )
    flavour: Flavour = Field("official", description="whose numerics")

    @model_validator(mode="after")
    def _divisible(self) -> ModelConfig:
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} must be a multiple of patch_size {self.patch_size}")
        if self.num_tokens > MAX_TOKENS:
            raise ValueError(f"input_size {self.input_size} makes {self.num_tokens} tokens of patch_size "
                             f"{self.patch_size}, more than {MAX_TOKENS}; use larger patches or smaller "
                             "images")  # fmt: skip
        if self.in_channels * self.input_size**2 > MAX_VALUES:
            raise ValueError(f"in_channels {self.in_channels} x input_size {self.input_size} squared is more than "
                             f"{MAX_VALUES} values per image; use smaller images")  # fmt: skip
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads} and of "
                             "4")  # fmt: skip
        if not self.class_rows:
            raise ValueError("null_class must be true with num_classes 0: it is the only row of the class table")
        return self

    @property
    def num_tokens(self) -> int:
        return (self.input_size // self.patch_size) ** 2

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def class_rows(self) -> int:
        """Rows of the class table, including the null class."""
        return self.num_classes + self.null_class

    @property
    def null_row(self) -> int:
        """Row of the null class; valid only with :attr:`null_class`."""
        return self.num_classes

    @property
    def valid_classes(self) -> int:
        """Number of valid class ids: ``num_classes``, or 1 (the id 0) for a network without classes."""
        return max(1, self.num_classes)

    @property
    def can_guide(self) -> bool:
        """Whether classifier-free guidance is possible: it needs classes and a null class."""
        return self.null_class and self.num_classes > 0


class QuantConfig(StrictModel):
    """How the linears of the blocks are quantised. ``bits`` overrides ``activation_bits`` by layer name.

    The defaults are the method; the other values are the paper's ablations. ``activation``: the Gaussian-optimal
    uniform step, Lloyd-Max levels for the same normal, or each token's minimum and maximum (the packed runtime
    supports only ``gaussian``). ``rotation``: which linears have rotated inputs (adaLN only with ``all``);
    ``rotation_block``: rotate in blocks of this width instead of the whole. ``weight_planes``: number of ternary
    matrices summed to one weight; one is the method, more help untrained weights.
    """

    activation_bits: int = Field(
        2, ge=1, le=8, description="of qkv, proj, fc1 and fc2, unless bits or allocate say otherwise"
    )
    adaln_bits: int = Field(4, ge=1, le=8, description="of adaLN's inputs")
    attention_bits: Literal[8] | None = Field(8, description="8, or null: attention is not quantised")
    activation: ActivationRule = Field("gaussian", description="activation quantiser; only gaussian can be packed")
    grid: Grid = Field("midrise", description="with a code at zero (midtread) or not")
    weight_scale: WeightScale = Field("conditional_mean", description="scale of ternary weights; absmean is BitNet's")
    weight_planes: int = Field(1, ge=1, le=3, description="ternary matrices summed to one weight")
    rotation: RotatedLinears = Field("all", description="linears whose inputs are rotated")
    rotation_block: Literal[128] | None = Field(
        None, description="128: rotate blocks of this width; null: the whole width"
    )
    rank: int = Field(16, ge=0, le=4096, description="of the low-rank branch")
    adaln_rank: int = Field(0, ge=0, le=4096, description="of adaLN's low-rank branch")
    lowrank_init: LowRankInit = Field("svd", description="start of the low-rank branch")
    seed: int = Field(0, ge=-(2**63), lt=2**64, description="of the rotation's signs")
    bits: dict[str, Annotated[int, Field(ge=1, le=8)]] = Field(
        default_factory=dict, description="width by layer name; not with allocate.average_bits"
    )


class DiffusionConfig(StrictModel):
    """The diffusion process of training, and what the network predicts.

    ``flow``: the velocity along ``x = (1 - s) x_0 + s noise``, s from 0 to 1 (arXiv 2209.03003, 2401.08740); timesteps
    are 1000 s. The others: linear betas 1e-4..0.02 over 1,000 timesteps.
    """

    prediction_type: PredictionType = Field(
        "epsilon", description="what the network predicts; flow: the velocity on a straight line"
    )
    clip_sample: bool = Field(False, description="clip predicted images to [-1, 1] while sampling")


class SamplerConfig(StrictModel):
    """Defaults of a request."""

    sampler: SamplerName = Field("ddim", description="euler, heun and sde are for flow models, the others for the rest")
    steps: Steps = Field(50, description="denoising steps")
    guidance_scale: GuidanceScale = Field(1.5, description="classifier-free guidance; 1: none")


def fitting_defaults(sampler: SamplerConfig, model: ModelConfig, prediction_type: PredictionType) -> SamplerConfig:
    """``sampler`` with fields that are not set chosen to fit the network.

    Raises:
        ValueError: a field that is set does not fit; the message names it.
    """
    chosen: dict[str, SamplerName | float] = {}
    if "sampler" not in sampler.model_fields_set and prediction_type == "flow":
        chosen["sampler"] = FLOW_SAMPLERS[0]
    if "guidance_scale" not in sampler.model_fields_set and not model.can_guide:
        chosen["guidance_scale"] = 1.0
    fitting = sampler.model_copy(update=chosen)
    check_fit(model, prediction_type, fitting.sampler, fitting.guidance_scale)
    return fitting


def check_fit(model: ModelConfig, prediction_type: PredictionType, sampler: SamplerName, guidance_scale: float) -> None:
    """Refuse a sampler or a guidance that the network does not support.

    Raises:
        ValueError: the message names the field.
    """
    allowed = samplers_of(prediction_type)
    if sampler not in allowed:
        raise ValueError(f"sampler must be one of {', '.join(allowed)} for a network that predicts {prediction_type}, "
                         f"not {sampler}")  # fmt: skip
    if guidance_scale != 1 and not model.can_guide:
        why = "was trained without dropped labels" if model.num_classes else "has no classes"
        raise ValueError(f"guidance_scale must be 1, not {guidance_scale:g}: the network {why}")
