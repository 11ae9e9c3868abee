"""Model shapes by their published names, and a small one."""

from __future__ import annotations

from robuq_core.config import ModelConfig

# depth, hidden size, heads
_SIZES = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6), "Ti": (6, 192, 3)}
_PATCHES = (2, 4, 8)

PRESETS: dict[str, ModelConfig] = {
    f"DiT-{size}/{patch}": ModelConfig(patch_size=patch, depth=depth, hidden_size=width, num_heads=heads)
    for size, (depth, width, heads) in _SIZES.items()
    for patch in _PATCHES
}


def preset(name: str) -> ModelConfig:
    """The shape ``name``, such as ``DiT-XL/2``: 32x32 latents of 4 channels, learned variance."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
