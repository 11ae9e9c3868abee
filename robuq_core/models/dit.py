"""DiT (arXiv 2212.09748): patch tokens, fixed sin-cos positions, adaLN-Zero blocks, optional learned variance.

To train at low bits its linears are swapped for :class:`~robuq_core.models.quant_linear.QuantLinear`. Parameter names
follow the published checkpoints. Shape suffixes: B images, L tokens, D hidden size, H heads, C channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robuq_core.config import NUM_TRAIN_TIMESTEPS, ModelConfig
from robuq_core.models.shapes import FREQUENCY_SIZE
from robuq_core.quant.attention import quantized_attention


def sincos_positions(width: int, grid_size: int, scale: float = 1.0) -> Tensor:
    """Fixed 2-D sin-cos positions ``[grid_size**2, width]``, float32: half the width codes x, half y, [sin|cos].

    Neighbours are ``scale`` apart.
    """
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    steps = torch.arange(grid_size, dtype=torch.float64) * scale

    def encode(position: Tensor) -> Tensor:
        angle = position[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return torch.cat([encode(x.reshape(-1)), encode(y.reshape(-1))], dim=1).float()


def position_table(config: ModelConfig) -> Tensor:
    """The positions of ``config``, ``[L, D]`` float32."""
    return sincos_positions(config.hidden_size, config.input_size // config.patch_size, config.position_scale)


def timestep_features(timesteps: Tensor, flavour: str) -> Tensor:
    """Sinusoids ``[cos|sin]`` of timesteps ``[B]`` -> ``[B, 256]``, float32.

    Frequencies ``exp(-ln(10000) k / 128)``; the ``diffusers`` flavour divides by 127 instead. Encodes the timestep
    itself; in the flavour ``repa`` the time from image to noise, ``t / 1000``, and in ``sit`` the time from noise to
    image, ``1 - t / 1000``.
    """
    half = FREQUENCY_SIZE // 2
    divisor = half - 1 if flavour == "diffusers" else half
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / divisor)
    time = timesteps.float()
    if flavour in ("sit", "repa"):
        time = time / NUM_TRAIN_TIMESTEPS
    if flavour == "sit":
        time = 1 - time
    angle = time[:, None] * frequencies.to(timesteps.device)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def patchify(images_BCHW: Tensor, patch: int) -> Tensor:
    """``[B, C, H, W]`` -> ``[B, L, C * patch**2]``, channel first within a patch (a conv weight, flattened, fits)."""
    b, c, h, w = images_BCHW.shape
    x = images_BCHW.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // patch) * (w // patch), c * patch * patch)


def unpatchify(tokens_BLP: Tensor, patch: int, channels: int) -> Tensor:
    """``[B, L, patch**2 * channels]`` -> ``[B, channels, H, W]``, channel last within a patch as DiT's head has it."""
    b, length, _ = tokens_BLP.shape
    side = math.isqrt(length)
    x = tokens_BLP.reshape(b, side, side, patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, channels, side * patch, side * patch)


def modulate(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    return x_BLD * (1 + scale_BD[:, None]) + shift_BD[:, None]


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int, flavour: str) -> None:
        super().__init__()
        self.flavour = flavour
        self.mlp = nn.Sequential(nn.Linear(FREQUENCY_SIZE, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps_B: Tensor) -> Tensor:
        return self.mlp(timestep_features(timesteps_B, self.flavour))  # type: ignore[no-any-return]


class LabelEmbedder(nn.Module):
    """Class table ``[rows, D]``."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, classes_B: Tensor) -> Tensor:
        return self.embedding_table(classes_B)  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.quantized = False
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        b, length, width = x_BLD.shape
        heads = self.qkv(x_BLD).reshape(b, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        attend = quantized_attention if self.quantized else F.scaled_dot_product_attention
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(b, length, width))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))  # type: ignore[no-any-return]


class DiTBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, config.num_heads)
        self.norm2 = nn.LayerNorm(width, eps=norm2_eps(config), elementwise_affine=False)
        self.mlp = Mlp(width, config.mlp_ratio * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x_BLD: Tensor, c_BD: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c_BD).chunk(6, dim=1)
        x_BLD = x_BLD + gate1[:, None] * self.attn(modulate(self.norm1(x_BLD), shift1, scale1))
        x_BLD = x_BLD + gate2[:, None] * self.mlp(modulate(self.norm2(x_BLD), shift2, scale2))
        return x_BLD


def norm2_eps(config: ModelConfig) -> float:
    """Epsilon of the second norm of a block: 1e-6, or diffusers' class default of 1e-5."""
    return 1e-5 if config.flavour == "diffusers" else 1e-6


def negates_output(config: ModelConfig) -> bool:
    """Whether the final layer predicts the velocity from noise to image; here it points from image to noise."""
    return config.flavour == "sit"


class FinalLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BLD: Tensor, c_BD: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c_BD).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x_BLD), shift, scale))  # type: ignore[no-any-return]


class DiT(nn.Module):
    """``forward(x [B, C, H, W], timesteps [B], classes [B]) -> [B, out_channels, H, W]``.

    Timesteps are the original 0..999 indices; class ``num_classes`` is the null class.
    """

    pos_embed: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.x_embedder = nn.Linear(config.in_channels * config.patch_size**2, width)
        self.t_embedder = TimestepEmbedder(width, config.flavour)
        self.y_embedder = LabelEmbedder(config.class_rows, width)
        self.register_buffer("pos_embed", position_table(config)[None], persistent=False)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.startswith("t_embedder.mlp.") and name.endswith(".weight"):
                nn.init.normal_(parameter, std=0.02)
            # adaLN-Zero: every block starts as the identity and the output as zero.
            if name.endswith("adaLN_modulation.1.weight"):
                nn.init.zeros_(parameter)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x_BCHW: Tensor, timesteps_B: Tensor, classes_B: Tensor) -> Tensor:
        config = self.config
        x_BLD = self.x_embedder(patchify(x_BCHW, config.patch_size)) + self.pos_embed
        device = x_BCHW.device
        c_BD = self.t_embedder(timesteps_B.to(device)) + self.y_embedder(classes_B.to(device))
        for block in self.blocks:
            x_BLD = block(x_BLD, c_BD)
        out = unpatchify(self.final_layer(x_BLD, c_BD), config.patch_size, config.out_channels)
        return -out if negates_output(config) else out
