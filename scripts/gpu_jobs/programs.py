"""What a user runs: the commands, over files and HTTP, and a training step."""

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

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 8


def _backend(context: Context) -> list[str]:
    return ["--backend", "reference"] if context.rehearse else ["--backend", "triton"]


def _sample(context: Context, name: str, classes: list[int], seed: int, backend: list[str]) -> list[Path]:
    """PNG files of the bundled checkpoint."""
    folder = context.out / name
    command = [sys.executable, "-c", "from robuq_core.cli import app; app()", "sample", *map(str, classes),
               "--seed", str(seed), "--out", str(folder), *backend]  # fmt: skip
    subprocess.run([*command, *(["--steps", "2"] if context.rehearse else [])], cwd=ROOT, check=True, timeout=55)
    return sorted(folder.glob("*.png"))


def psnr(first: Path, second: Path) -> float:
    """Decibels between two images of 8 bits; infinite if they are equal."""
    a, b = (np.asarray(Image.open(path), dtype=np.float64) for path in (first, second))
    error = float(((a - b) ** 2).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def image(context: Context) -> None:
    """Images of the bundled checkpoint against the CPU's; one alone equals itself among others to the bit."""
    together = _sample(context, "images-gpu", list(range(CLASSES)), 5, _backend(context))
    alone = _sample(context, "image-alone", [3], 8, _backend(context))
    expected = _sample(context, "images-cpu", list(range(CLASSES)), 5, ["--backend", "reference", "--device", "cpu"])
    figures = [psnr(*pair) for pair in zip(together, expected, strict=True)]
    context.record(psnr_db=figures)
    same = [np.array_equal(*(np.asarray(Image.open(path)) for path in (alone[0], each))) for each in together]
    context.check(sum(same) == 1 and min(figures) > 20, alone_equals_among_others=sum(same) == 1)


def server(context: Context) -> None:
    """``robuq-serve`` on the device: ready, one image, 64 at once, its metrics."""
    command = [sys.executable, "-c", "from server.cli import app; app()", "--port", "0", *_backend(context)]
    log = context.out / "server.log"
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
    try:
        base = _until(lambda: re.search(r"http://[\w.:\[\]]+", log.read_text()), process).group()
        _until(lambda: _status(f"{base}/ready") == 200, process)
        context.record(ready_s=time.monotonic() - began)
        body = {"class_id": 0, "seed": 1, "steps": 2 if context.rehearse else None}
        body = {name: value for name, value in body.items() if value is not None}
        seconds, png = _generate(base, body)
        context.check(png.startswith(b"\x89PNG"), one_image_s=seconds, bytes=len(png))
        count = 4 if context.rehearse else 64
        began = time.monotonic()
        with ThreadPoolExecutor(count) as pool:
            answers = list(pool.map(lambda i: _generate(base, {**body, "seed": i}), range(count)))
        taken = time.monotonic() - began
        holds = all(each.startswith(b"\x89PNG") for _, each in answers) and answers[1][1] == png
        context.check(holds, requests=count, images_per_s=count / taken, slowest_s=max(s for s, _ in answers))
        metrics = urllib.request.urlopen(f"{base}/metrics", timeout=10).read().decode()
        (context.out / "metrics.txt").write_text(metrics)
        context.check("robuq" in metrics, metrics_lines=metrics.count("\n"))
    finally:
        process.terminate()
        try:
            code = process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        context.record(server_ended_with=code)


def _until(holds: Any, process: subprocess.Popen[bytes]) -> Any:
    while not (found := holds()):
        if process.poll() is not None:
            raise AssertionError(f"the server ended with {process.returncode}; see server.log")
        time.sleep(0.1)
    return found


def _status(url: str) -> int:
    try:
        return int(urllib.request.urlopen(url, timeout=5).status)
    except OSError:
        return 0


def _generate(base: str, body: dict[str, Any]) -> tuple[float, bytes]:
    """Seconds, and the PNG."""
    request = urllib.request.Request(
        f"{base}/generate", json.dumps(body).encode(), {"Content-Type": "application/json", "Accept": "image/png"}
    )
    began = time.monotonic()
    with urllib.request.urlopen(request, timeout=50) as answer:
        return time.monotonic() - began, answer.read()


def training(context: Context) -> None:
    """Steps of quantisation-aware training: seconds a step, memory, and a loss that falls. Low rank starts from zero:
    the decomposition of all weights would take longer than the steps."""
    from robuq_core.config import QuantConfig
    from robuq_core.models.dit import DiT
    from robuq_core.models.quant_linear import quantize_model

    config, batch, steps = context.sizes.model, 2 if context.rehearse else 8, 3 if context.rehearse else 20
    with torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        with torch.device(context.device):
            model = DiT(config)
        model = quantize_model(model, QuantConfig(lowrank_init="zero")).to(context.device).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        # One batch, again and again: its loss must fall.
        x, noise = (torch.randn(batch, config.in_channels, config.input_size, config.input_size,
                                device=context.device) for _ in range(2))  # fmt: skip
        timesteps = torch.arange(batch, device=context.device) * 100
        classes = torch.zeros(batch, dtype=torch.int64, device=context.device)
        losses, seconds = [], []
        for _ in range(steps):
            began = time.perf_counter()
            with torch.autocast(context.device.type, torch.bfloat16):
                out = model(0.7 * x + 0.7 * noise, timesteps, classes)[:, : config.in_channels]
                loss = F.mse_loss(out.float(), noise)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            losses.append(float(loss))
            seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if context.device.type == "cuda" else None
    holds = all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    context.check(holds, batch=batch, step_s=sorted(seconds)[steps // 2], losses=losses, peak_bytes=peak)


def tests(context: Context) -> None:
    """The tests that need a GPU."""
    files = ["tests/core/models/test_graphs.py"]
    try:
        import train.trainer  # noqa: F401
    except ImportError as missing:  # TensorBoard and others, which only training needs
        context.record(absent=f"tests/training/test_trainer.py: {missing}")
    else:
        files.append("tests/training/test_trainer.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    command += ["-m", "gpu"] if not context.rehearse else ["-m", "gpu", "--collect-only"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=55)
    context.check(done.returncode == 0, output=(done.stdout + done.stderr)[-1500:])


def bench(context: Context) -> None:
    """``robuq bench`` of a block, its report in ``bench.json``."""
    command = [sys.executable, "-c", "from robuq_core.cli import app; app()", "bench", "--level", "block",
               "--out", str(context.out / "bench.json"), *_backend(context), "--peer", "bf16"]  # fmt: skip
    shape = ["--batch", "1", "--rounds", "3", "--budget-s", "1"] if context.rehearse else ["--preset", "DiT-XL/2",
                                                                                            "--batch", "8"]  # fmt: skip
    done = subprocess.run([*command, *shape], cwd=ROOT, capture_output=True, text=True, timeout=55)
    context.check(done.returncode == 0, output=done.stdout[-1500:] + done.stderr[-800:])


JOBS = (image, server, training, tests, bench)
