"""A training run small enough for tests: drawn photos of a few classes, a one-block DiT, a YAML file."""

from __future__ import annotations

import gzip
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from torch import Tensor

from robuq_core.shards import read_all
from train.config import TrainConfig, load_config
from train.run import Run
from train.state import State, latest_state

CLASSES, PER_CLASS, SIZE = 4, 2, 8
REPOSITORY = Path(__file__).parents[2]
SIGNALLED = Path(__file__).with_name("signalled_training.py")


def write_photos(folder: Path, classes: int = CLASSES, per_class: int = PER_CLASS, side: int = 12) -> Path:
    """Class folders ``class_0``... of PNG files, ``side`` wide and a little taller, each of its own colours."""
    random = np.random.default_rng(0)
    for c in range(classes):
        (folder / f"class_{c}").mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            pixels = random.integers(0, 256, (side + 2, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class_{c}" / f"{i}.png")
    return folder


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, prefix: str, images: np.ndarray, labels: np.ndarray) -> Path:
    """Grey ``images`` uint8 ``[N, H, W]`` and ``labels`` as the gzipped IDX files of one split."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
        (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array.astype(np.uint8)), 1))
    return folder


def settings(root: Path) -> dict[str, Any]:
    """The tree of a configuration that trains in a second; its photos are written below ``root``."""
    photos = root / "photos"
    if not photos.exists():
        write_photos(photos)
    stage = {"steps": 6, "batch_size": 4, "lr": 1e-2, "warmup_steps": 2, "save_every": 2, "log_every": 1}
    return {
        "run_dir": str(root / "run"),
        "seed": 3,
        "precision": "fp32",
        "compile": False,
        "class_init_std": 0.5,
        "model": {
            "input_size": SIZE,
            "patch_size": 4,
            "in_channels": 3,
            "hidden_size": 24,
            "depth": 1,
            "num_heads": 2,
            "num_classes": CLASSES,
            "learn_sigma": False,
        },
        "quant": {"rank": 2},
        "diffusion": {"prediction_type": "sample", "clip_sample": True},
        "sampler": {"steps": 3},
        "data": {"path": str(photos)},
        "teacher": {**stage, "lr_schedule": "cosine"},
        "warmup": {**stage, "steps": 3},
        "sensitivity": {"samples": 8, "batch_size": 4},
        "qat": dict(stage),
        "evaluation": {"samples": 4, "seeds": [0], "batch_size": 4},
    }


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``tree`` with the sections of ``changes`` laid over its own."""
    result = dict(tree)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def write_config(root: Path, changes: Mapping[str, Any] | None = None, name: str = "run.yaml") -> Path:
    path = root / name
    path.write_text(yaml.safe_dump(merged(settings(root), changes or {})))
    return path


def make_config(root: Path, changes: Mapping[str, Any] | None = None) -> TrainConfig:
    return load_config(write_config(root, changes), [])


def train(config: TrainConfig, *stages: str, redo: bool = False) -> Run:
    """Run ``stages``, each on its own, without a word; by default the teacher."""
    run = Run(config, lambda _: None)
    for stage in stages or ("teacher",):
        run.alone(stage, redo)
    return run


def state_of(config: TrainConfig, stage: str = "teacher") -> State:
    return latest_state(config.run_dir / "states" / stage)


def tensors_of(state: State, part: str = "") -> dict[str, Tensor]:
    """What training continues from, by name; only of ``part``: ``model``, ``ema`` or ``optimiser``."""
    prefix = f"{part}." if part else ""
    return {name.removeprefix(prefix): value for name, value in read_all(state.folder, prefix).items()}


def signalled(stage: str, step: int, number: signal.Signals, rank: int = 0) -> dict[str, str]:
    """Environment that lets ``SIGNALLED`` signal its process ``rank`` in the step after ``step`` of ``stage``."""
    return {"TEST_SIGNAL": f"{stage} {step} {rank} {number.value}"}


def train_signalled(command: str, config: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """``robuq-train COMMAND`` as a process of its own, on one thread, signalled as ``environment`` says."""
    return subprocess.run(
        [sys.executable, SIGNALLED, command, "--config", str(config)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
