"""Processes that train together on loopback, and what they run: a list of stages, from ``python -m`` this file.

Usage: ``python several_processes.py STAGE CONFIG [STAGE CONFIG ...]``, started by :func:`start`. ``TEST_BACKEND`` names
the compiler that ``compile: true`` uses, ``TEST_SPOIL`` the rank whose loss is NaN in step 2 of a stage ``spoiled``.
``samples`` draws those of the teacher and stores their features.
"""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).parent / "evaluation")]

import torch  # noqa: E402
from stand_in import PixelNetwork  # noqa: E402

from robuq_core.errors import UserError  # noqa: E402
from robuq_core.models.dit import DiT  # noqa: E402
from robuq_core.models.quant_linear import quantize_model  # noqa: E402
from train import parallel, trainer  # noqa: E402
from train.config import TrainConfig, load_config  # noqa: E402
from train.data import BatchSource, ImageDataset  # noqa: E402
from train.evaluation.samples import SampleSet, generate_to_disk, load_sampler  # noqa: E402
from train.run import Run  # noqa: E402
from train.state import exclusive, latest_state  # noqa: E402
from train.trainer import Trainer, meaning_of_weights  # noqa: E402


def start(*arguments: str, world: int = 2, **environment: str) -> list[subprocess.Popen[str]]:
    """Start ``python ARGUMENTS`` as each of ``world`` processes that will find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=REPOSITORY,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def finish(processes: list[subprocess.Popen[str]], seconds: float = 600) -> list[tuple[int, str]]:
    """Exit code and standard error of each process, in order of rank; none is left running."""
    try:
        ends = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, end[1]) for process, end in zip(processes, ends, strict=True)]


def train(*stages_and_configs: str | Path, world: int = 2, **environment: str) -> list[tuple[int, str]]:
    """Train stages one after another in ``world`` processes."""
    return finish(start(__file__, *map(str, stages_and_configs), world=world, **environment))


def train_stage(stage: str, config: TrainConfig) -> None:
    """Train ``teacher`` or ``qat`` on drawn images, in as many processes as call this together."""
    generator = torch.Generator().manual_seed(1)
    side, classes = config.model.input_size, config.model.num_classes
    images = torch.randint(0, 256, (40, 3, side, side), generator=generator, dtype=torch.uint8)
    dataset = ImageDataset(images, torch.arange(len(images)) % classes)
    torch.manual_seed(config.seed)
    model, teacher = DiT(config.model), None
    section = config.qat if stage == "qat" else config.teacher
    if stage == "qat":
        latest_state(config.run_dir / "states" / "teacher").load_average(model, meaning_of_weights(config))
        teacher = copy.deepcopy(model)
        quantize_model(model, config.quant)
    states = config.run_dir / "states" / stage
    source = BatchSource(dataset, config.data.flip_probability, section.batch_size, config.seed)
    with exclusive(states):
        Trainer(config, section, model, source, states, teacher=teacher).run()


def draw_samples(config: TrainConfig) -> SampleSet:
    """The samples of the run's teacher that an evaluation measures, and features that name their process."""
    folder = config.run_dir / "samples"
    sampler, digest = load_sampler(Run(config), "teacher")
    samples = generate_to_disk(
        sampler, folder, count=14, seed=0, batch_size=4, identity=digest, settings=config.sampler
    )
    network = PixelNetwork()
    network.identity = f"of-{parallel.rank()}"
    samples.store_features(network)
    return samples


def _main(arguments: list[str]) -> None:
    torch.compile = partial(torch.compile, backend=os.environ.get("TEST_BACKEND", "inductor"))
    compute = trainer.diffusion_loss
    calls = iter(range(1000))

    def spoiled(*arguments: Any) -> torch.Tensor:
        nan = next(calls) == 2 and parallel.rank() == int(os.environ["TEST_SPOIL"])
        return compute(*arguments) * (float("nan") if nan else 1.0)

    code = 0
    try:
        with parallel.processes():
            for stage, path in zip(arguments[::2], arguments[1::2], strict=True):
                if stage == "samples":
                    draw_samples(load_config(Path(path), []))
                    continue
                if stage == "spoiled":
                    trainer.diffusion_loss = spoiled
                train_stage(stage.replace("spoiled", "teacher"), load_config(Path(path), []))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except SystemExit as ended:
        code = int(ended.code or 0)
    parallel.end(code)


if __name__ == "__main__":
    _main(sys.argv[1:])
