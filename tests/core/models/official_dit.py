"""DiT's forward straight from its equations, on a state dict in the official layout: no module, no shared code."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def random_state(*, width: int, depth: int, patch: int, channels: int, classes: int, side: int, seed: int = 0) -> State:
    """Random weights under the official names, learned variance included; ``side``: tokens a side."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "x_embedder.proj": (width, channels, patch, patch),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (patch * patch * 2 * channels, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.attn.qkv": (3 * width, width),
            f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (4 * width, width),
            f"blocks.{i}.mlp.fc2": (width, 4 * width),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }
    state = {"pos_embed": positions(width, side)}
    state["y_embedder.embedding_table.weight"] = torch.randn(classes + 1, width, generator=generator)
    for name, shape in shapes.items():
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    return state


def positions(width: int, side: int) -> Tensor:
    """``[1, side^2, width]``: the column's sines and cosines, then the row's."""
    table = np.zeros((side, side, width))
    quarter = width // 4
    for k in range(quarter):
        frequency = 10000.0 ** (-k / quarter)
        for row in range(side):
            for column in range(side):
                table[row, column, k] = math.sin(column * frequency)
                table[row, column, quarter + k] = math.cos(column * frequency)
                table[row, column, 2 * quarter + k] = math.sin(row * frequency)
                table[row, column, 3 * quarter + k] = math.cos(row * frequency)
    return torch.from_numpy(table.reshape(1, side * side, width)).float()


def forward(state: State, x: Tensor, timesteps: Tensor, classes: Tensor, heads: int) -> Tensor:
    """``x [B, C, H, W]``, timesteps and classes ``[B]`` -> ``[B, 2 C, H, W]``."""

    def linear(v: Tensor, name: str) -> Tensor:
        return F.linear(v, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(v: Tensor) -> Tensor:
        centred = v - v.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    kernel = state["x_embedder.proj.weight"]
    width, channels, patch, _ = kernel.shape
    grid = F.conv2d(x, kernel, state["x_embedder.proj.bias"], stride=patch)
    h = grid.flatten(2).transpose(1, 2) + state["pos_embed"]

    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = timesteps[:, None] * frequencies
    embedded = linear(
        F.silu(linear(torch.cat([angles.cos(), angles.sin()], 1), "t_embedder.mlp.0")), "t_embedder.mlp.2"
    )
    c = F.silu(embedded + state["y_embedder.embedding_table.weight"][classes])

    depth = sum(name.endswith("attn.qkv.weight") for name in state)
    for i in range(depth):
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(c, f"blocks.{i}.adaLN_modulation.1")[:, None].split(
            width, 2
        )
        q, k, v = linear(norm(h) * (1 + scale1) + shift1, f"blocks.{i}.attn.qkv").split(width, 2)
        mixed = torch.empty_like(q)
        size = width // heads
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            weights = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / size**0.5, -1)
            mixed[..., part] = weights @ v[..., part]
        h = h + gate1 * linear(mixed, f"blocks.{i}.attn.proj")
        u = linear(norm(h) * (1 + scale2) + shift2, f"blocks.{i}.mlp.fc1")
        u = 0.5 * u * (1 + torch.tanh((2 / math.pi) ** 0.5 * (u + 0.044715 * u**3)))
        h = h + gate2 * linear(u, f"blocks.{i}.mlp.fc2")

    shift, scale = linear(c, "final_layer.adaLN_modulation.1")[:, None].split(width, 2)
    out = linear(norm(h) * (1 + scale) + shift, "final_layer.linear")
    side = grid.shape[-1]
    pixels = out.reshape(len(x), side, side, patch, patch, 2 * channels)
    return torch.einsum("nhwpqc->nchpwq", pixels).reshape(len(x), 2 * channels, side * patch, side * patch)
