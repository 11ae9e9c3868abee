"""An ablation study that runs in a second: images of a few pixels, a one-block DiT, three steps a run."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from synthetic_run import merged

CLASSES, SIDE = 3, 8


def write_images(folder: Path, count: int = 60) -> Path:
    """Both splits in the layout of MNIST; each class is bright in rows of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for split in ("train", "t10k"):
        labels = np.arange(count, dtype=np.uint8) % CLASSES
        images = random.integers(0, 80, (count, SIDE, SIDE), dtype=np.uint8)
        for label in range(CLASSES):
            images[labels == label, 2 * label : 2 * label + 2] += 150
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return folder


def study_settings(root: Path) -> dict[str, Any]:
    stage = {"steps": 3, "batch_size": 6, "lr": 1e-2, "warmup_steps": 1, "ema_decay": 0.5}
    robust = {"rank": 2}
    return {
        "data": str(write_images(root / "images")),
        "seeds": [0, 1],
        "widths": [4, 2],
        "model": {
            "input_size": SIDE,
            "patch_size": 4,
            "in_channels": 1,
            "hidden_size": 24,
            "depth": 1,
            "num_heads": 2,
            "num_classes": CLASSES,
            "learn_sigma": False,
        },
        "diffusion": {"prediction_type": "v_prediction"},
        "sampler": {"sampler": "ddim", "steps": 2},
        "samples": 24,
        "classifier": {"epochs": 2, "batch_size": 12},
        "teacher": {**stage, "steps": 5},
        "warmup": stage,
        "qat": stage,
        "sensitivity": {"bits": [1, 2, 3, 4], "samples": 12, "batch_size": 6},
        "ladder": [
            {"name": "baseline", "quant": {"activation": "minmax", "rotation": "proj_fc2", "rank": 0}},
            {"name": "RobustQuantizer", "quant": robust},
            {"name": "AMPN", "quant": robust, "allocate": "dynamic_programming"},
        ],
        "extras": [{"name": "no rotation", "quant": {**robust, "rotation": "none"}, "widths": [2]}],
    }


def write_study(root: Path, changes: Mapping[str, Any] | None = None) -> Path:
    path = root / "study.yaml"
    path.write_text(yaml.safe_dump(merged(study_settings(root), changes or {})))
    return path
