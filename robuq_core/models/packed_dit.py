"""A DiT that runs from packed weights on a kernel backend: the same network as :mod:`robuq_core.models.dit`.

Inference only. A forward has two parts: the modulations of its rows, looked up or computed
(:mod:`robuq_core.models.conditioning`), and :meth:`PackedDiT.denoise`, which consists of tensor operations only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from robuq_core.config import ModelConfig
from robuq_core.kernels.ops import (
    Backend,
    Block,
    FusedBackend,
    GroupingBackend,
    LayerGroup,
    Modulation,
    NarrowBackend,
    NetworkBackend,
    Prologue,
    TernaryLayer,
    fused_linear,
)
from robuq_core.kernels.reference import ReferenceBackend
from robuq_core.models.conditioning import BLOCK_ENTRIES, ConditioningTable, network_ends
from robuq_core.models.dit import norm2_eps, patchify, position_table, unpatchify
from robuq_core.models.graphs import CudaRecorder, Denoise, DenoiseKeeping, GraphedDenoise, buckets
from robuq_core.staging import taken

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
    """``forward(x [B, C, H, W], timesteps, classes) -> [B, out_channels, H, W]``, float32, on :attr:`device`.

    ``timesteps`` and ``classes`` are B numbers each, by which modulations are looked up. The residual
    stream, and what proj and fc2 add to it, is float32 on every backend; qkv, heads and the MLP's hidden values have
    the type of a :class:`~robuq_core.kernels.ops.NarrowBackend`.

    Args:
        dense: the full-precision tensors (embedders and final layer) by DiT name, float32.
        layers: the packed linears by DiT name.
        backend: runs the ops; the weights are moved to its device.
        group: the adaLN layers of another copy of this network, to share their memory on the same device.
    """

    def __init__(
        self,
        config: ModelConfig,
        dense: dict[str, Tensor],
        layers: dict[str, TernaryLayer],
        backend: Backend,
        quantized_attention: bool = True,
        group: LayerGroup | None = None,
    ) -> None:
        blocks = [PackedBlock(*(layers[f"blocks.{i}.{name}"] for name in LAYERS)) for i in range(config.depth)]
        self.config, self.backend, self.quantized_attention = config, backend, quantized_attention
        self._ternary, self._intermediate = fused_linear(backend), fused_linear(backend, intermediate=True)
        # GELU follows fc1 where that is one kernel, so that fc2 reads rounded values; otherwise fc2 begins with it.
        self._gelu_follows = isinstance(backend, NarrowBackend)
        self._hidden = fused_linear(backend, intermediate=True, gelu=self._gelu_follows)
        self._fused = backend if isinstance(backend, FusedBackend) else None
        self.dense = {name: tensor.to(backend.device) for name, tensor in dense.items()}
        self.blocks = [block.to(backend.device) for block in blocks]
        self.pos_embed = position_table(config).to(backend.device)
        if not isinstance(backend, GroupingBackend):
            group = None
        elif group is None or group.stacked.planar.device != backend.device:
            group = LayerGroup.of([block.adaln for block in self.blocks])
        self._group = group
        if group is not None:  # one copy of the weights: those of the group
            self.blocks = [replace(block, adaln=each) for block, each in zip(self.blocks, group.layers, strict=True)]
        adaln = [block.adaln for block in self.blocks]
        self._network = backend if isinstance(backend, NetworkBackend) else None
        self._ends = network_ends(config, self.dense, self.pos_embed)
        self.conditioning = ConditioningTable(config, self.dense, adaln, backend, self._ends, group=group)
        self._in_one_call = self._blocks_in_one_call()
        # Between native kernels torch has little to do, and its threads would compete with theirs: see Sampler.step.
        self.has_own_threads = self._fused is not None and self.device.type == "cpu"
        self._run: Denoise = self.denoise
        self._run_keeping: DenoiseKeeping = self.denoise_keeping
        # The reference runs as it is written.
        self._is_recorded = self.device.type == "cuda" and not isinstance(backend, ReferenceBackend)
        if self._is_recorded:
            record = CudaRecorder(self.device)
            self._run = GraphedDenoise(self.denoise, record)
            self._run_keeping = GraphedDenoise(self.denoise_keeping, record)

    def _blocks_in_one_call(self) -> dict[int, Block]:
        """By id of a block, its form for a backend that runs whole blocks; blocks with several planes have none."""
        if self._network is None:
            return {}
        heads, eps = self.config.num_heads, (1e-6, norm2_eps(self.config))
        return {
            id(block): Block(block.qkv, block.proj, block.fc1, block.fc2, heads, self.quantized_attention, eps)
            for block in self.blocks
            if not any(layer.extra_planes for layer in block.layers)
        }

    def replica(self, backend: Backend) -> PackedDiT:
        """The same network on another backend; shares the weights if both run on one device."""
        layers = {
            f"blocks.{i}.{name}": layer
            for i, block in enumerate(self.blocks)
            for name, layer in zip(LAYERS, block.layers, strict=True)
        }
        return PackedDiT(self.config, self.dense, layers, backend, self.quantized_attention, self._group)

    @property
    def device(self) -> torch.device:
        return self.backend.device

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in memory: 2-bit codes, scales, low-rank factors, dense tensors."""
        packed = sum(layer.nbytes for block in self.blocks for layer in block.layers)
        return packed + sum(tensor.nbytes for tensor in self.dense.values())

    def forward(self, x_BCHW: Tensor, timesteps: Sequence[float], classes: Sequence[int]) -> Tensor:
        return self._run(x_BCHW, self.conditioning.slots(timesteps, classes), self.conditioning.table)

    def forward_keeping(
        self, x_BCHW: Tensor, timesteps: Sequence[float], classes: Sequence[int], keep: list[int]
    ) -> tuple[Tensor, Tensor]:
        """:meth:`forward`, and beside its output what the blocks added to the tokens of the rows at ``keep`` (one or
        more): float32 ``[len(keep), L, D]``."""
        slots = self.conditioning.slots(timesteps, classes)
        out, tokens_BLD = self._run_keeping(x_BCHW, slots, self.conditioning.table)
        return out, taken(tokens_BLD, keep) - self._embedded(taken(x_BCHW, keep))

    def forward_reusing(
        self, x_BCHW: Tensor, timesteps: Sequence[float], classes: Sequence[int], block_delta_BLD: Tensor
    ) -> Tensor:
        """:meth:`forward` without its blocks: ``block_delta [B, L, D]``, of an earlier timestep, stands for them."""
        tokens_BLD = self._embedded(x_BCHW).add_(block_delta_BLD)
        return self._output(tokens_BLD, self.conditioning.final(timesteps, classes))

    def warm_up_rows(self, max_rows: int) -> tuple[int, ...]:
        """Numbers of rows, ascending up to ``max_rows``, that a forward should have seen before it serves: each size
        that is recorded on a GPU, powers of two on a CPU."""
        if self._is_recorded:
            return tuple(sorted({min(size, max_rows) for size in buckets(max_rows)}))
        return tuple(sorted({1 << i for i in range(max_rows.bit_length())} | {max_rows}))

    def denoise(self, x_BCHW: Tensor, slots_B: Tensor, table: Tensor) -> Tensor:
        """The forward of rows whose modulations lie at ``slots_B`` of ``table`` ``[6 depth + 2, slots, D]``."""
        return self.denoise_keeping(x_BCHW, slots_B, table)[0]

    def denoise_keeping(self, x_BCHW: Tensor, slots_B: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`denoise`, and beside its output the tokens ``[B, L, D]`` that the blocks leave."""
        x_BLD = self._embedded(x_BCHW)
        modulations = table.index_select(1, slots_B)
        for i, block in enumerate(self.blocks):
            x_BLD = self.run_block(x_BLD, modulations[BLOCK_ENTRIES * i : BLOCK_ENTRIES * (i + 1)], block)
        return self._output(x_BLD, modulations[BLOCK_ENTRIES * self.config.depth :]), x_BLD

    def _embedded(self, x_BCHW: Tensor) -> Tensor:
        """Tokens ``[B, L, D]`` before the first block."""
        if self._network is not None:
            return self._network.embed(x_BCHW, self._ends)
        tokens = patchify(x_BCHW, self.config.patch_size).flatten(0, 1).contiguous()
        x_MD = self.backend.linear(tokens, *self._ends.embedder)
        return x_MD.reshape(len(x_BCHW), self.config.num_tokens, self.config.hidden_size).add_(self.pos_embed)

    def _output(self, x_BLD: Tensor, modulation_2BD: Tensor) -> Tensor:
        if self._network is not None:
            return self._network.output(x_BLD, modulation_2BD, self._ends)
        shift, scale = modulation_2BD.unbind()
        normed = F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=1e-6)
        modulated = normed.mul_(1 + scale[:, None]).add_(shift[:, None])
        out = self.backend.linear(modulated.flatten(0, 1), *self._ends.last).reshape(*x_BLD.shape[:2], -1)
        image = unpatchify(out, self.config.patch_size, self.config.out_channels)
        return image.neg_() if self._ends.negated else image

    def _add_ternary(
        self, x_BLD: Tensor, gate_BD: Tensor, inputs: Tensor, layer: TernaryLayer, prologue: Prologue = None
    ) -> None:
        """``x_BLD += gate * layer(inputs)`` in place."""
        if self._fused is not None and x_BLD.is_contiguous() and not layer.extra_planes:
            self._fused.add_ternary(x_BLD.flatten(0, 1), gate_BD, inputs, layer, prologue)
        else:
            x_BLD.add_(self._ternary(inputs, layer, prologue).reshape(x_BLD.shape).mul_(gate_BD[:, None]))

    def run_block(self, x_BLD: Tensor, modulation_6BD: Tensor, block: PackedBlock) -> Tensor:
        """One block, in place on ``x_BLD``."""
        images, length = x_BLD.shape[:2]
        some = images if self._fused is None else max(1, self._fused.rows_at_once // length)
        whole = self._in_one_call.get(id(block)) if x_BLD.is_contiguous() else None
        for i in range(0, images, some):
            part_BLD, modulation = x_BLD[i : i + some], modulation_6BD[:, i : i + some]
            if self._network is not None and whole is not None:
                self._network.add_block(part_BLD, modulation, whole)
            else:
                self._run_images(part_BLD, modulation, block)
        return x_BLD

    def _run_images(self, x_BLD: Tensor, modulation_6BD: Tensor, block: PackedBlock) -> None:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation_6BD.unbind()
        norm1 = Modulation(shift1, scale1, 1e-6)
        qkv = self._intermediate(x_BLD.flatten(0, 1), block.qkv, norm1).reshape(*x_BLD.shape[:2], -1)
        heads = self.backend.attention(qkv, self.config.num_heads, self.quantized_attention)
        self._add_ternary(x_BLD, gate1, heads.flatten(0, 1), block.proj)
        norm2 = Modulation(shift2, scale2, norm2_eps(self.config))
        hidden = self._hidden(x_BLD.flatten(0, 1), block.fc1, norm2)
        self._add_ternary(x_BLD, gate2, hidden, block.fc2, None if self._gelu_follows else "gelu")
