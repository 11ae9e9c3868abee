"""Quantise a diffusers DiTPipeline folder and serve it.

    python examples/serve_diffusers.py DiT-XL-2-256

Rounding without training costs quality: see docs/weights.md for calibration and training.
"""

import argparse
import json
import subprocess
import time
import urllib.request
from pathlib import Path
from urllib.error import HTTPError, URLError

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder", type=Path, help="with the folders transformer and, for a latent model, vae")
parser.add_argument("--port", type=int, default=8000)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--once", action="store_true", help="stop after the first image")
arguments = parser.parse_args()

packed = arguments.folder / "packed.safetensors"
if not packed.exists():
    subprocess.run(["robuq", "convert", str(arguments.folder), str(packed), "--ptq"], check=True)

# A folder named vae beside the packed file is found without an option.
server = subprocess.Popen(["robuq-serve", "--checkpoint", str(packed), "--port", str(arguments.port)])
address = f"http://127.0.0.1:{arguments.port}"
try:
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/ready").close()
            break
        except (HTTPError, URLError):
            time.sleep(0.2)
    body = json.dumps({"class_id": 0, "seed": 0, "steps": arguments.steps}).encode()
    request = urllib.request.Request(f"{address}/generate", body, {"Accept": "image/png"})
    with urllib.request.urlopen(request) as response:
        Path("first.png").write_bytes(response.read())
    print(f"wrote first.png; {address} serves until Ctrl+C")
    if not arguments.once:
        server.wait()
except KeyboardInterrupt:
    pass
finally:
    server.terminate()  # drains: running requests finish
    server.wait()
