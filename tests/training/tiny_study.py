"""An ablation study that runs in seconds: images of a few pixels, a one-block DiT, three steps a training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from synthetic_run import merged, settings, write_idx

CLASSES, SIDE = 3, 8


def write_study(root: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """The file of a study of two seeds and seven trainings each, with its run and data beside it."""
    images = np.random.default_rng(0).integers(0, 256, (60, SIDE, SIDE), dtype=np.uint8)
    for prefix in ("train", "t10k"):
        write_idx(root / "images", prefix, images, np.arange(60) % CLASSES)
    stage = {"steps": 3, "batch_size": 6, "lr": 1e-2, "warmup_steps": 1, "ema_decay": 0.5, "save_every": 2}
    run = merged(settings(root), {
        "model": {"in_channels": 1, "num_classes": CLASSES, "depth": 2},
        "diffusion": {"prediction_type": "v_prediction", "clip_sample": False},
        "data": {"path": str(root / "images")},
        "teacher": stage, "warmup": stage, "qat": stage, "evaluation": {"split": "test"},
    })  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(run))
    study = {
        "run": "run.yaml",
        "set": {"quant.rank": 2},
        "seeds": [0, 1],
        "points": 40,
        "rows": [
            {"name": "baseline", "set": {"quant.activation": "minmax", "quant.rank": 0}},
            {"name": "RobustQuantizer", "bits": [2, 3], "outliers": [1, 30]},
            {"name": "AMPN", "search": "warmup", "bits": [2, 2.5]},
            {"name": "full precision", "full_precision": True, "seeds": [0]},
        ],
        "contrasts": [{"name": "Gaussian step", "row": "RobustQuantizer", "against": "baseline"}],
    }
    (root / "study.yaml").write_text(yaml.safe_dump({**study, **(changes or {})}))
    return root / "study.yaml"
