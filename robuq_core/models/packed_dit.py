"""A DiT that runs from packed weights on a kernel backend: the same network as :mod:`robuq_core.models.dit`.

Inference only. Weights lie on the backend's device. Timestep embeddings are computed once per timestep and kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robuq_core.config import ModelConfig
from robuq_core.kernels.ops import Backend, Modulation, Prologue, TernaryLayer
from robuq_core.models.dit import norm2_eps, patchify, position_table, timestep_features, unpatchify

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")


@dataclass(frozen=True)
class PackedBlock:
    qkv: TernaryLayer
    proj: TernaryLayer
    fc1: TernaryLayer
    fc2: TernaryLayer
    adaln: TernaryLayer

    def to(self, device: torch.device) -> PackedBlock:
        """The block on ``device``; what lies there already is shared."""
        return PackedBlock(*(layer.to(device) for layer in self.layers))

    @property
    def layers(self) -> tuple[TernaryLayer, ...]:
        return self.qkv, self.proj, self.fc1, self.fc2, self.adaln


class PackedDiT:
    """``forward(x [B, C, H, W], timesteps [B], classes [B]) -> [B, out_channels, H, W]``, float32.

    ``x`` and ``classes`` lie on :attr:`device`, ``timesteps`` on the CPU.

    Args:
        dense: the full-precision tensors under their DiT names (embedders and final layer), float32.
        layers: the packed linears under their DiT names.
        backend: runs the ops; the weights are moved to its device.
    """

    def __init__(
        self,
        config: ModelConfig,
        dense: dict[str, Tensor],
        layers: dict[str, TernaryLayer],
        backend: Backend,
        quantized_attention: bool = True,
    ) -> None:
        blocks = [PackedBlock(*(layers[f"blocks.{i}.{name}"] for name in LAYERS)) for i in range(config.depth)]
        self._build(config, dense, blocks, position_table(config), backend, quantized_attention)

    def _build(
        self,
        config: ModelConfig,
        dense: dict[str, Tensor],
        blocks: list[PackedBlock],
        pos_embed: Tensor,
        backend: Backend,
        quantized_attention: bool,
    ) -> None:
        self.config, self.backend, self.quantized_attention = config, backend, quantized_attention
        self.dense = {name: tensor.to(backend.device) for name, tensor in dense.items()}
        self.blocks = [block.to(backend.device) for block in blocks]
        self.pos_embed = pos_embed.to(backend.device)
        self._timestep_cache: dict[int, Tensor] = {}

    def replica(self, backend: Backend) -> PackedDiT:
        """The same network on another backend; weights are shared where both run on one device."""
        copy = object.__new__(PackedDiT)
        copy._build(self.config, self.dense, self.blocks, self.pos_embed, backend, self.quantized_attention)
        return copy

    @property
    def device(self) -> torch.device:
        return self.backend.device

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as they lie in memory: 2-bit codes, scales, low-rank factors, dense tensors."""
        packed = sum(layer.nbytes for block in self.blocks for layer in block.layers)
        return packed + sum(tensor.nbytes for tensor in self.dense.values())

    def forward(self, x_BCHW: Tensor, timesteps_B: Tensor, classes_B: Tensor) -> Tensor:
        config = self.config
        tokens = patchify(x_BCHW, config.patch_size).flatten(0, 1).contiguous()
        x_MD = self._dense_linear(tokens, "x_embedder")
        x_BLD = x_MD.reshape(len(x_BCHW), config.num_tokens, config.hidden_size) + self.pos_embed
        c_BD = self._timestep_embedding(timesteps_B) + self.dense["y_embedder.embedding_table.weight"][classes_B]
        for block in self.blocks:
            x_BLD = self._block(x_BLD, c_BD, block)
        return unpatchify(self._final(x_BLD, c_BD), config.patch_size, config.out_channels)

    def _timestep_embedding(self, timesteps_B: Tensor) -> Tensor:
        rows = []
        for t in timesteps_B.tolist():
            if t not in self._timestep_cache:
                features = timestep_features(torch.tensor([t]), self.config.flavour).to(self.device)
                hidden = F.silu(self._dense_linear(features, "t_embedder.mlp.0"))
                self._timestep_cache[t] = self._dense_linear(hidden, "t_embedder.mlp.2")[0]
            rows.append(self._timestep_cache[t])
        return torch.stack(rows)

    def _dense_linear(self, x: Tensor, name: str) -> Tensor:
        return self.backend.linear(x, self.dense[f"{name}.weight"], self.dense[f"{name}.bias"])

    def _ternary(self, x: Tensor, layer: TernaryLayer, prologue: Prologue = None) -> Tensor:
        return self.backend.ternary_linear(self.backend.rotate_quantize(x, layer, prologue), layer)

    def _block(self, x_BLD: Tensor, c_BD: Tensor, block: PackedBlock) -> Tensor:
        shape = x_BLD.shape
        modulation = self._ternary(c_BD, block.adaln, "silu")
        shift1, scale1, gate1, shift2, scale2, gate2 = (m.contiguous() for m in modulation.chunk(6, dim=1))
        norm1 = Modulation(shift1, scale1, 1e-6)
        qkv = self._ternary(x_BLD.flatten(0, 1), block.qkv, norm1)
        heads = self.backend.attention(qkv.reshape(*shape[:2], -1), self.config.num_heads, self.quantized_attention)
        x_BLD = x_BLD + gate1[:, None] * self._ternary(heads.flatten(0, 1), block.proj).reshape(shape)
        norm2 = Modulation(shift2, scale2, norm2_eps(self.config))
        hidden = self._ternary(x_BLD.flatten(0, 1), block.fc1, norm2)
        return x_BLD + gate2[:, None] * self._ternary(hidden, block.fc2, "gelu").reshape(shape)

    def _final(self, x_BLD: Tensor, c_BD: Tensor) -> Tensor:
        modulation = self._dense_linear(_row_silu(c_BD), "final_layer.adaLN_modulation.1")
        shift, scale = modulation.chunk(2, dim=1)
        normed = F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=1e-6)
        modulated = (normed * (1 + scale[:, None]) + shift[:, None]).flatten(0, 1)
        out = self._dense_linear(modulated, "final_layer.linear")
        return out.reshape(*x_BLD.shape[:2], -1)


def _row_silu(x_BD: Tensor) -> Tensor:
    """SiLU row by row: torch's vector and scalar code differ in the last bit, and which of them an element meets
    depends on the size of the whole tensor."""
    return torch.stack([F.silu(row) for row in x_BD])
