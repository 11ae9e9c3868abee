"""What a model is: its shape, its quantisation, its diffusion and its sampling defaults.

These pydantic models are the YAML files of ``train`` and the header of a packed checkpoint alike; an unknown
or ill-typed key is an error that names it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from robuq_core.quant.choices import ActivationRule, Grid, LowRankInit, WeightScale

Flavour = Literal["official", "diffusers"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
SamplerName = Literal["ddpm", "ddim", "dpmsolver++"]
# What a network draws: pictures themselves, or what an autoencoder makes pictures of.
DecoderKind = Literal["pixels", "latent"]
RotatedLinears = Literal["all", "proj_fc2", "none"]
SAMPLERS: tuple[SamplerName, ...] = ("ddpm", "ddim", "dpmsolver++")

NUM_TRAIN_TIMESTEPS = 1000
MAX_SEED = 2**32 - 1
# Bounds of what a file may ask for, well above the largest published DiT: attention grows with the square of the
# tokens, and neither tokens nor pixels take room in a checkpoint.
MAX_TOKENS = 16_384
MAX_VALUES = 2**24


def image_seed(seed: int, index: int) -> int:
    """Seed of image ``index`` of a request with ``seed``: the same as a request of one image with that seed."""
    return (seed + index) % (MAX_SEED + 1)


class StrictModel(BaseModel):
    """Base of every config section: frozen, closed to unknown keys and to numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(StrictModel):
    """Shape of a DiT. Sizes in pixels or latent cells; ``flavour`` picks between the numerics of two code bases.

    ``position_scale`` is the distance between neighbours in the sin-cos table: 1 in DiT. With few tokens a side most
    of its frequencies hardly move from 0 to 1, and the network cannot tell its tokens apart; 100 spreads them.
    """

    input_size: int = Field(32, ge=2, le=4096)
    patch_size: int = Field(2, ge=1, le=256)
    in_channels: int = Field(4, ge=1, le=1024)
    hidden_size: int = Field(1152, ge=4, le=32_768)
    depth: int = Field(28, ge=1, le=256)
    num_heads: int = Field(16, ge=1, le=1024)
    mlp_ratio: int = Field(4, ge=1, le=64)
    num_classes: int = Field(1000, ge=1, le=1_000_000)
    learn_sigma: bool = True
    position_scale: float = Field(1.0, gt=0, le=10_000)
    flavour: Flavour = "official"

    @model_validator(mode="after")
    def _divisible(self) -> ModelConfig:
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} must be a multiple of patch_size {self.patch_size}")
        if self.num_tokens > MAX_TOKENS:
            raise ValueError(
                f"input_size {self.input_size} makes {self.num_tokens} tokens of patch_size {self.patch_size}, "
                f"more than {MAX_TOKENS}; take larger patches or smaller images"
            )
        if self.in_channels * self.input_size**2 > MAX_VALUES:
            raise ValueError(f"in_channels {self.in_channels} x input_size {self.input_size} squared is more than "
                             f"{MAX_VALUES} values an image; take smaller images")  # fmt: skip
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads} and of 4"
            )
        return self

    @property
    def num_tokens(self) -> int:
        return (self.input_size // self.patch_size) ** 2

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def null_class(self) -> int:
        """Row of the class table that stands for "no class" in classifier-free guidance."""
        return self.num_classes


class QuantConfig(StrictModel):
    """How the linears of the blocks are quantised. ``bits`` overrides ``activation_bits`` by layer name.

    The defaults are the method; the other values are the paper's ablations. ``activation``: the Gaussian-optimal
    uniform step, Lloyd-Max levels for the same normal, or each token's own minimum and maximum. ``rotation``: which
    linears see rotated inputs (adaLN counts to ``all``); ``rotation_block``: over blocks of this width, not the whole.
    ``weight_planes``: ternary matrices summed to one weight; one is the method, more serve untrained weights.
    The packed runtime runs ``activation: gaussian`` alone; every other key it honours.
    """

    activation_bits: int = Field(2, ge=1, le=8)
    adaln_bits: int = Field(4, ge=1, le=8)
    attention_bits: Literal[8] | None = 8
    activation: ActivationRule = "gaussian"
    grid: Grid = "midrise"
    weight_scale: WeightScale = "conditional_mean"
    weight_planes: int = Field(1, ge=1, le=3)
    rotation: RotatedLinears = "all"
    rotation_block: Literal[128] | None = None
    rank: int = Field(16, ge=0, le=4096)
    adaln_rank: int = Field(0, ge=0, le=4096)
    lowrank_init: LowRankInit = "svd"
    seed: int = Field(0, ge=-(2**63), lt=2**64)
    bits: dict[str, Annotated[int, Field(ge=1, le=8)]] = Field(default_factory=dict)


class DiffusionConfig(StrictModel):
    """The training-time process: linear betas 1e-4..0.02 over 1,000 timesteps, and what the network predicts."""

    prediction_type: PredictionType = "epsilon"
    clip_sample: bool = False


class SamplerConfig(StrictModel):
    """Defaults of a request that names none."""

    sampler: SamplerName = "ddim"
    steps: int = Field(50, ge=1, le=NUM_TRAIN_TIMESTEPS)
    guidance_scale: float = Field(1.5, ge=0, le=20)
