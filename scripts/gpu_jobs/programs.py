"""What a user runs: the commands, over files and HTTP, and training steps."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from gpu_jobs.context import Context
from robuq_core.config import QuantConfig
from robuq_core.models.dit import DiT
from robuq_core.models.quant_linear import quantize_model

ROOT = Path(__file__).resolve().parents[2]
CLASSES = range(8)


def _command(module: str, *arguments: object) -> list[str]:
    """``robuq`` and ``robuq-serve`` need not be installed."""
    return [sys.executable, "-c", f"from {module}.cli import app; app()", *map(str, arguments)]


def _ends_well(context: Context, command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=55)
    context.check(done.returncode == 0, command=command[2:], output=done.stdout[-1500:] + done.stderr[-800:])


def _backend(context: Context) -> list[str]:
    return ["--backend", "reference" if context.rehearse else "triton"]


def _psnr_db(image: np.ndarray, expected: np.ndarray) -> float:
    error = float(np.square(image.astype(np.float64) - expected).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def image(context: Context) -> None:
    """Images of the bundled checkpoint against the CPU's; one alone equals itself among others to the bit."""

    def sample(name: str, classes: range, seed: int, backend: list[str]) -> list[np.ndarray]:
        folder, few = context.out / name, ["--steps", "2"] if context.rehearse else []
        _ends_well(context, _command("robuq_core", "sample", *classes, "--seed", seed, "--out", folder, *backend, *few))
        return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]

    together = sample("images-gpu", CLASSES, 5, _backend(context))
    alone = sample("image-alone", range(3, 4), 8, _backend(context))
    expected = sample("images-cpu", CLASSES, 5, ["--backend", "reference", "--device", "cpu"])
    figures = [_psnr_db(*pair) for pair in zip(together, expected, strict=True)]
    same = sum(np.array_equal(alone[0], each) for each in together)
    context.check(same == 1 and min(figures) > 20, alone_equals_among_others=same == 1, psnr_db=figures)


def server(context: Context) -> None:
    """``robuq-serve`` on the device: ready, one image, 64 at once, its metrics."""
    log, began = context.out / "server.log", time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            _command("server", "--port", 0, *_backend(context)), cwd=ROOT, stdout=file, stderr=file
        )

    def fetched(path: str, body: Any = None) -> bytes:
        """Of the address that the server has printed; nothing while it does not answer."""
        found = re.search(r"http://[\w.:\[\]]+", log.read_text())
        headers = {"Content-Type": "application/json", "Accept": "image/png"} if body else {}
        try:
            request = urllib.request.Request(found[0] + path, json.dumps(body).encode() if body else None, headers)
            return urllib.request.urlopen(request, timeout=50).read()
        except (TypeError, OSError):
            return b""

    def generate(seed: int) -> tuple[float, bytes]:
        sent = time.monotonic()
        png = fetched("/generate", {"class_id": 0, "seed": seed, **({"steps": 2} if context.rehearse else {})})
        return time.monotonic() - sent, png

    try:
        while not fetched("/ready"):
            if process.poll() is not None:
                raise AssertionError(f"the server ended with {process.returncode}; see server.log")
            time.sleep(0.1)
        context.record(ready_s=time.monotonic() - began)
        seconds, png = generate(1)
        context.check(png.startswith(b"\x89PNG"), one_image_s=seconds, bytes=len(png))
        count, began = 4 if context.rehearse else 64, time.monotonic()
        with ThreadPoolExecutor(count) as pool:
            answers = list(pool.map(generate, range(count)))
        rate = count / (time.monotonic() - began)
        holds = all(each.startswith(b"\x89PNG") for _, each in answers) and answers[1][1] == png
        context.check(holds, requests=count, images_per_s=rate, slowest_s=max(s for s, _ in answers))
        (context.out / "metrics.txt").write_bytes(metrics := fetched("/metrics"))
        context.check(b"robuq" in metrics, metrics_lines=metrics.count(b"\n"))
    finally:
        process.terminate()
        process.wait(20)


def training(context: Context) -> None:
    """Steps of quantisation-aware training: seconds a step, memory, and a loss that falls. Low rank starts from zero:
    the decomposition of all weights would take longer than the steps."""
    config, batch, steps = context.sizes.model, 2 if context.rehearse else 8, 20
    with torch.inference_mode(False), torch.enable_grad(), torch.device(context.device):
        torch.manual_seed(0)
        model = quantize_model(DiT(config), QuantConfig(lowrank_init="zero")).to(context.device).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        # One batch, again and again: its loss must fall.
        x, noise = torch.randn(2, batch, config.in_channels, config.input_size, config.input_size)
        timesteps, classes = torch.arange(batch) * 100, torch.zeros(batch, dtype=torch.int64)
        losses: list[float] = []

        def step() -> None:
            with torch.autocast(context.device.type, torch.bfloat16):
                out = model(0.7 * x + 0.7 * noise, timesteps, classes)[:, : config.in_channels]
                loss = F.mse_loss(out.float(), noise)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            losses.append(float(loss))

        step()
        step_ms = context.wall_ms(step, steps)
    holds = all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    context.check(holds, batch=batch, step_ms=step_ms, losses=losses, peak_bytes=context.peak_bytes())


JOBS = (image, server, training)
