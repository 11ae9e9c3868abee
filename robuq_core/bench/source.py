"""What is timed: a checkpoint's weights or random ones of a published shape, and the FP32 network of that shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from robuq_core.checkpoint import FORMAT_VERSION, Checkpoint, Header, decoder_kind, read_checkpoint
from robuq_core.config import DiffusionConfig, ModelConfig, QuantConfig, SamplerConfig
from robuq_core.errors import UserError
from robuq_core.hub import resolve_checkpoint
from robuq_core.kernels.ops import Backend, TernaryLayer
from robuq_core.models.dit import DiT, TimestepEmbedder, position_table
from robuq_core.models.packed_dit import PackedDiT
from robuq_core.models.presets import preset
from robuq_core.models.quant_linear import is_adaln, layer_bits
from robuq_core.models.shapes import dense_shapes, layer_shapes
from robuq_core.pipeline import Denoiser, Sampler
from robuq_core.quant.hadamard import random_signs
from robuq_core.quant.packing import pack_planar

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Source:
    """A named packed network. ``path`` is the file it came from, if any."""

    name: str
    checkpoint: Checkpoint
    path: Path | None = None

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.header.model

    @property
    def draws_pixels(self) -> bool:
        return self.checkpoint.header.decoder == "pixels"

    def packed(self, backend: Backend) -> PackedDiT:
        header = self.checkpoint.header
        attention_is_quantized = header.quant.attention_bits is not None
        return PackedDiT(self.config, self.checkpoint.dense, self.checkpoint.layers, backend, attention_is_quantized)

    def sampler(self, model: PackedDiT | Denoiser, backend_name: str, device: torch.device) -> Sampler:
        return header_sampler(self.checkpoint.header, model, self.name, backend_name, device)


def header_sampler(
    header: Header, model: PackedDiT | Denoiser, name: str, backend_name: str, device: torch.device
) -> Sampler:
    """A sampler of any header: a latent model's rows are stepped like pixels; only their pictures mean nothing."""
    steppable = header.model_copy(update={"decoder": "pixels"})
    return Sampler(model, steppable, checkpoint_name=name, backend_name=backend_name, weight_bytes=0, device=device)


def open_source(preset_name: str | None, path: Path | None) -> Source:
    """Random weights of a preset, or what :func:`robuq_core.hub.resolve_checkpoint` makes of ``path``.

    Raises:
        UserError: both are given. ValueError: unknown preset. CheckpointError: the file cannot be used.
    """
    if preset_name is not None and path is not None:
        raise UserError("--preset and --checkpoint exclude each other: random weights of a shape, or a packed file")
    if preset_name is not None:
        return Source(preset_name, random_checkpoint(preset(preset_name), QuantConfig()))
    chosen = resolve_checkpoint(path)
    return Source(chosen.stem, read_checkpoint(chosen), chosen)


def random_checkpoint(config: ModelConfig, quant: QuantConfig) -> Checkpoint:
    """Random weights of a shape, as reading a file would give them, with a header that lists no tensors.

    One block is drawn and copied to the others: each has memory of its own, which is what time depends on.
    """
    generator = torch.Generator().manual_seed(0)
    dense = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in dense_shapes(config).items()}
    layers: dict[str, TernaryLayer] = {}
    for name, shape in layer_shapes(config).items():
        _, index, part = name.split(".", 2)
        if index == "0":
            rank = quant.adaln_rank if is_adaln(name) else quant.rank
            layers[name] = _random_layer(shape, rank, layer_bits(name, quant), quant, generator)
        else:
            first = layers[f"blocks.0.{part}"]
            copies = [tensor.clone() for tensor in first.tensors()]
            layers[name] = replace(first.with_tensors(copies), bits=layer_bits(name, quant))
    header = Header(
        format_version=FORMAT_VERSION,
        model=config,
        quant=quant,
        diffusion=DiffusionConfig(),
        sampler=SamplerConfig(),
        decoder=decoder_kind(config),
        tensors={},
    )
    return Checkpoint(header, dense, layers)


def _random_layer(
    shape: tuple[int, int], rank: int, bits: int, quant: QuantConfig, generator: torch.Generator
) -> TernaryLayer:
    out, into = shape
    codes = torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)
    return TernaryLayer(
        planar=pack_planar(codes),
        alpha=torch.full((out,), into**-0.5).half().float(),
        bias=torch.zeros(out),
        signs=random_signs(into, generator),
        lowrank_a=(torch.randn(out, rank, generator=generator) * 0.02).bfloat16(),
        lowrank_b=(torch.randn(rank, into, generator=generator) * 0.02).bfloat16(),
        bits=bits,
        grid=quant.grid,
        rotation_block=quant.rotation_block,
    )


@torch.no_grad()
def plain_network(config: ModelConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> DiT:
    """A plain DiT with random weights, no layer zero (a matrix product of zeros may cheat), its blocks alike."""
    with torch.device("meta"):
        skeleton = DiT(config)
    network = cast_network(skeleton, dtype).to_empty(device=device).eval()
    network.pos_embed.copy_(position_table(config))
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        if not name.startswith("blocks.") or name.startswith("blocks.0."):
            parameter.normal_(std=0.02)
    for block in network.blocks[1:]:
        block.load_state_dict(network.blocks[0].state_dict())
    return network


def cast(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """``inputs`` with the floating ones in ``dtype``."""
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def cast_network(network: M, dtype: torch.dtype) -> M:
    """``network`` in ``dtype``, in place, sinusoids of timesteps included, which it makes in float32."""
    for part in network.modules():
        if isinstance(part, TimestepEmbedder):
            part.mlp.register_forward_pre_hook(lambda _, inputs: cast(inputs, dtype))
    return network.to(dtype)
