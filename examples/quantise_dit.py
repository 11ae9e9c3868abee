"""Quantise a pretrained DiT without a data set: plain rounding against calibration.

    python examples/quantise_dit.py DiT-XL-2-256x256.pt --planes 1 --bits 2

The source may be an official .pt file, a diffusers folder or RUN_DIR/states/teacher of a run.
"""

import argparse
import subprocess
from pathlib import Path

from robuq_core.checkpoint import read_header

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("source", type=Path)
parser.add_argument("--planes", type=int, default=1, help="ternary matrices per weight; 3 are close to the original")
parser.add_argument("--bits", type=int, default=8, help="of the activations")
parser.add_argument("--steps", type=int, default=200, help="end-to-end calibration steps; 0: layer by layer only")
parser.add_argument("--inputs", type=int, help="inputs of the calibration; default: by size")
parser.add_argument("--prediction", help="epsilon, v_prediction, sample or flow, if the file does not say")
parser.add_argument("--out", type=Path, default=Path())
arguments = parser.parse_args()

options = ["--weight-planes", str(arguments.planes), "--activation-bits", str(arguments.bits)]
if arguments.prediction:
    options += ["--prediction", arguments.prediction]
rounded, calibrated = (arguments.out / f"{name}.safetensors" for name in ("rounded", "calibrated"))
subprocess.run(["robuq", "convert", str(arguments.source), str(rounded), "--ptq", *options], check=True)
options += ["--steps", str(arguments.steps)]
if arguments.inputs:
    options += ["--inputs", str(arguments.inputs)]
subprocess.run(["robuq-train", "ptq", str(arguments.source), str(calibrated), *options], check=True)

for path in (rounded, calibrated):
    provenance = read_header(path).provenance
    errors = {name: value for name, value in provenance.items() if name.startswith("relative_error")}
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {errors}")
