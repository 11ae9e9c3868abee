"""Train a small ternary diffusion transformer on a folder of images, in about ten minutes on two CPU cores.

    python examples/train_folder.py PHOTOS

PHOTOS has one sub-folder per class. The result is RUN/model.safetensors; start the command again to continue.
"""

import argparse
import subprocess
from pathlib import Path

import yaml

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("photos", type=Path)
parser.add_argument("--run", type=Path, default=Path("runs/photos"), help="folder for everything the run writes")
parser.add_argument("--steps", type=int, default=1200, help="steps of the teacher, and of quantisation-aware training")
arguments = parser.parse_args()

classes = sorted(path.name for path in arguments.photos.iterdir() if path.is_dir())
names = Path(arguments.run, "classes.txt")
names.parent.mkdir(parents=True, exist_ok=True)
names.write_text("\n".join(classes) + "\n")
stage = {
    "steps": arguments.steps,
    "batch_size": 64,
    "lr": 1e-3,
    "lr_schedule": "cosine",
    "warmup_steps": min(100, arguments.steps),
    "ema_decay": 0.999,
    "save_every": min(250, arguments.steps),
}
config = {
    "run_dir": str(arguments.run),
    "compile": False,  # true is faster after minutes of compilation, and needs a C++ compiler
    "class_init_std": 0.5,
    # 32 x 32 pixels as 16 tokens; position_scale keeps so few tokens apart.
    "model": {
        "input_size": 32,
        "patch_size": 8,
        "in_channels": 3,
        "hidden_size": 128,
        "depth": 4,
        "num_heads": 4,
        "position_scale": 25,
        "num_classes": len(classes),
        "learn_sigma": False,
    },
    "quant": {"activation_bits": 2, "rank": 8},
    "diffusion": {"prediction_type": "sample", "clip_sample": True},
    "sampler": {"sampler": "ddim", "steps": 25, "guidance_scale": 1.0},
    "data": {"path": str(arguments.photos), "class_names": str(names)},
    "teacher": stage,
    "qat": stage,
}
path = arguments.run / "run.yaml"
path.write_text(yaml.safe_dump(config, sort_keys=False))

for command in ("prepare", "teacher", "qat", "export"):
    subprocess.run(["robuq-train", command, "-c", str(path)], check=True)
model, pictures = str(arguments.run / "model.safetensors"), str(arguments.run / "pictures")
ids = map(str, range(min(8, len(classes))))  # a name that is a number would be taken for an id
subprocess.run(["robuq", "sample", *ids, "--checkpoint", model, "--seed", "0", "--out", pictures], check=True)
print(f"serve it: robuq-serve --checkpoint {model}")
