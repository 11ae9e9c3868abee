"""Shapes of a DiT's parameters, by name, from its configuration: files are checked against them without a model."""

from __future__ import annotations

from robuq_core.config import ModelConfig

FREQUENCY_SIZE = 256
Shapes = dict[str, tuple[int, ...]]


def layer_shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """``(out, in)`` of every linear of the blocks, by name, in the order of the network."""
    d, hidden = model.hidden_size, model.mlp_ratio * model.hidden_size
    block = {
        "attn.qkv": (3 * d, d),
        "attn.proj": (d, d),
        "mlp.fc1": (hidden, d),
        "mlp.fc2": (d, hidden),
        "adaLN_modulation.1": (6 * d, d),
    }
    return {f"blocks.{i}.{name}": shape for i in range(model.depth) for name, shape in block.items()}


def dense_shapes(model: ModelConfig) -> Shapes:
    """The parameters that stay in full precision: embedders and final layer."""
    d, patch = model.hidden_size, model.patch_size**2
    linears = {
        "x_embedder": (d, patch * model.in_channels),
        "t_embedder.mlp.0": (d, FREQUENCY_SIZE),
        "t_embedder.mlp.2": (d, d),
        "final_layer.linear": (patch * model.out_channels, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    return {"y_embedder.embedding_table.weight": (model.class_rows, d), **_with_bias(linears)}


def parameter_shapes(model: ModelConfig) -> Shapes:
    """All parameters of a full-precision DiT."""
    return dense_shapes(model) | _with_bias(layer_shapes(model))


def _with_bias(linears: dict[str, tuple[int, int]]) -> Shapes:
    shapes: Shapes = {}
    for name, (out, into) in linears.items():
        shapes |= {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
    return shapes


def layer_macs(model: ModelConfig) -> dict[str, int]:
    """Multiply-accumulates of every linear of the blocks for one image and forward; adaLN runs once per image."""
    tokens = model.num_tokens
    return {name: out * into * (1 if "adaLN" in name else tokens) for name, (out, into) in layer_shapes(model).items()}
