"""What a user runs: images, the server, training steps."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from gpu_jobs.context import Context
from robuq_core.config import QuantConfig
from robuq_core.models.dit import DiT
from robuq_core.models.quant_linear import quantize_model
from robuq_core.pipeline import Sampler


def image(context: Context) -> None:
    """Images of the bundled checkpoint against the CPU's; one alone equals itself among others to the bit."""
    steps = 2 if context.rehearse else 20
    ours = Sampler.from_checkpoint(device=context.device, backend="reference" if context.rehearse else "triton")
    reference = Sampler.from_checkpoint(backend="reference", device="cpu")
    together, expected = (
        np.stack([np.asarray(each, np.float64) for each in sampler.generate(list(range(8)), seed=5, steps=steps)])
        for sampler in (ours, reference)
    )
    alone = np.asarray(ours.generate([3], seed=8, steps=steps)[0])  # the fourth image has the seed 5 + 3
    errors = np.square(together - expected).mean(axis=(1, 2, 3)) ** 0.5  # of values 0..255
    same = np.array_equal(alone, together[3])
    context.check(same and errors.max() < 25, alone_equals_among_others=same, rms_errors=errors.tolist())


def server(context: Context) -> None:
    """``robuq-serve`` on the device: ready, one image, 64 at once, its metrics."""
    log, began = context.out / "server.log", time.monotonic()
    backend = ["--backend", "reference" if context.rehearse else "triton"]
    command = [sys.executable, "-c", "from server.cli import app; app()", "--port", "0", *backend]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)

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


@torch.inference_mode(False)
@torch.enable_grad()
def training(context: Context) -> None:
    """Steps of quantisation-aware training: seconds per step, memory, and a loss that falls. Low rank starts from zero:
    the decomposition of all weights would take longer than the steps."""
    config, batch, losses = context.sizes.model, 2 if context.rehearse else 8, []
    torch.manual_seed(0)
    with context.device:
        model = quantize_model(DiT(config), QuantConfig(lowrank_init="zero")).to(context.device).train()
        # One batch, again and again: its loss must fall.
        x, noise = torch.randn(2, batch, config.in_channels, config.input_size, config.input_size)
        forward = partial(
            model, 0.7 * x + 0.7 * noise, torch.arange(batch) * 100, torch.zeros(batch, dtype=torch.int64)
        )
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(context.device.type, torch.bfloat16):
            loss = F.mse_loss(forward()[:, : config.in_channels].float(), noise)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(float(loss))

    step_ms = context.wall_ms(step, 20)
    holds = all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    context.check(holds, batch=batch, step_ms=step_ms, losses=losses, peak_bytes=context.peak_bytes())


JOBS = (image, server, training)
