"""How other code bases name and arrange the tensors of a DiT, as a table of key pairs.

Two layouts: ``official`` (the DiT authors' ``.pt``) and ``diffusers`` (a pipeline's ``transformer`` folder). Some
tensors are arranged otherwise than here: the patch embedder is a convolution there and a linear here, diffusers keeps
q, k and v apart, and it stores the embedders of timestep and class once in every block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Layout = Literal["official", "diffusers", "robuq"]
POSITIONS = "pos_embed"
PATCH_WEIGHT = "x_embedder.weight"

# This project's module -> official, diffusers. "*" stands for every block: one tensor, stored that many times.
_MODULES = {
    "x_embedder": ("x_embedder.proj", "pos_embed.proj"),
    "t_embedder.mlp.0": ("t_embedder.mlp.0", "transformer_blocks.*.norm1.emb.timestep_embedder.linear_1"),
    "t_embedder.mlp.2": ("t_embedder.mlp.2", "transformer_blocks.*.norm1.emb.timestep_embedder.linear_2"),
    "y_embedder.embedding_table": (
        "y_embedder.embedding_table",
        "transformer_blocks.*.norm1.emb.class_embedder.embedding_table",
    ),
    "final_layer.adaLN_modulation.1": ("final_layer.adaLN_modulation.1", "proj_out_1"),
    "final_layer.linear": ("final_layer.linear", "proj_out_2"),
}
# The same within block i; parts joined by "|" are stacked along the first dimension.
_BLOCK_MODULES = {
    "attn.qkv": ("attn.qkv", "attn1.to_q|attn1.to_k|attn1.to_v"),
    "attn.proj": ("attn.proj", "attn1.to_out.0"),
    "mlp.fc1": ("mlp.fc1", "ff.net.0.proj"),
    "mlp.fc2": ("mlp.fc2", "ff.net.2"),
    "adaLN_modulation.1": ("adaLN_modulation.1", "norm1.linear"),
}
_BLOCK_PREFIX = {"official": "blocks.{}.", "diffusers": "transformer_blocks.{}."}
_COLUMN = {"official": 0, "diffusers": 1}


@dataclass(frozen=True)
class Keys:
    """Where one tensor lies in another layout: in equal ``copies``, or in ``parts`` along its first dimension."""

    names: tuple[str, ...]
    how: Literal["copies", "parts"] = "copies"


def foreign_keys(name: str, layout: Layout, depth: int) -> Keys:
    """The keys of this project's parameter ``name`` in ``layout``.

    Raises:
        KeyError: not a parameter of a DiT.
    """
    if layout == "robuq":
        return Keys((name,))
    module, _, kind = name.rpartition(".")
    if module.startswith("blocks."):
        _, index, inner = module.split(".", 2)
        prefix = _BLOCK_PREFIX[layout].format(index)
        parts = _BLOCK_MODULES[inner][_COLUMN[layout]].split("|")
        return Keys(tuple(f"{prefix}{part}.{kind}" for part in parts), "parts" if len(parts) > 1 else "copies")
    pattern = f"{_MODULES[module][_COLUMN[layout]]}.{kind}"
    return Keys(tuple(pattern.replace("*", str(i)) for i in range(depth)) if "*" in pattern else (pattern,))
