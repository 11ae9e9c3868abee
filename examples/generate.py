"""Generate images from Python.

python examples/generate.py goldfish "tiger shark" --out images
"""

import argparse
from pathlib import Path

from robuq_core import Sampler

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("classes", nargs="*", default=["goldfish"], help="class ids or names")
parser.add_argument("--checkpoint", help="packed file, folder, bundled name or hub id; default: the bundled model")
parser.add_argument("--steps", type=int, help="denoising steps; default: the checkpoint's")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("images"))
arguments = parser.parse_args()

sampler = Sampler.from_checkpoint(arguments.checkpoint)
classes = [int(name) if name.isdigit() else name for name in arguments.classes]
images = sampler.generate(classes, seed=arguments.seed, steps=arguments.steps)

arguments.out.mkdir(parents=True, exist_ok=True)
for index, (name, image) in enumerate(zip(arguments.classes, images, strict=True)):
    path = arguments.out / f"{index}_{name.replace(' ', '_')}.png"
    image.save(path)
    print(f"{path}: {image.width} x {image.height} pixels")
if sampler.timings is not None:
    print(f"{sampler.timings.sampling_s:.3f} s of denoising with the backend {sampler.backend_name}")
