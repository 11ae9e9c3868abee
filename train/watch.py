"""How well a stage is doing while it trains: held-out loss, a sheet of samples, and a small Fréchet distance."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from robuq_core.models.dit import DiT
from robuq_core.pipeline import Sampler
from train import parallel
from train.config import StageConfig, TrainConfig
from train.data import BatchSource
from train.loss import diffusion_loss

if TYPE_CHECKING:
    from train.run import Run

_LOSS_IMAGES = 256
_LOSS_BATCH = 32
_SHEET_IMAGES = 16
_SAMPLE_BATCH = 64
_SEED = 0


class Watch:
    """Measures the model of stage ``name`` as it trains; every process of a run calls it.

    The loss is the training loss on up to 256 images of ``evaluation.split`` with fixed noise, so it falls
    smoothly. Sheets go to ``run_dir/samples/STAGE-STEP.png``.
    """

    def __init__(self, run: Run, config: TrainConfig, name: str) -> None:
        from train.sensitivity import fixed_set

        self.config, self.name = config, name
        self.stage: StageConfig = getattr(config, name)
        still = config.data.model_copy(update={"flip_probability": 0.0, "colour_jitter": 0.0})
        dataset = run.held_out.dataset
        size = min(_LOSS_BATCH, len(dataset))
        source = BatchSource(dataset, still, config.model.input_size, size, _SEED)
        count = min(_LOSS_IMAGES, len(dataset) // size * size)
        device = parallel.training_device()
        self._batches = fixed_set(source, count, _SEED, device, config.diffusion.prediction_type)
        self._sampler: Sampler | None = None  # with the autoencoder and, on a GPU, the compiled network
        if self.stage.eval_samples:
            parallel.on_first(self._prepare_distance)

    def __call__(self, model: DiT, step: int) -> dict[str, float]:
        """Figures of ``model``, the same one in every call, by name."""
        from train.evaluation.samples import balanced_classes, draw, plain_sampler, write_sheet

        training = model.training
        model.eval()
        figures = {"held_out_loss": self._loss(model)}
        if self._sampler is None:
            self._sampler = plain_sampler(model, self.config, self.name)
        classes = balanced_classes(_SHEET_IMAGES, self.config.model.valid_classes, _SEED)
        samples = draw(self._sampler, classes, _SEED, self.config.sampler)
        if parallel.rank() == 0:
            write_sheet(samples, self.config.run_dir / "samples" / f"{self.name}-{step:07d}.png")
        if self.stage.eval_samples:
            figures["fd_effnet"] = self._distance(self._sampler)
        model.train(training)
        return figures

    @torch.no_grad()
    def _loss(self, model: DiT) -> float:
        """Every process computes all of it: the forwards of a sharded model are everyone's."""
        losses = [
            diffusion_loss(
                model(each.x_t, each.timesteps, each.classes).float(),
                *(each.x0, each.x_t, each.noise, each.timesteps),
                self.config.diffusion,
            )
            for each in self._batches
        ]
        return float(torch.stack(losses).mean())

    def _prepare_distance(self) -> None:
        from train.evaluation.networks import EfficientNetLite0
        from train.evaluation.reference import reference

        self._network = EfficientNetLite0()
        self._photos = reference(self.config, self._network).pool

    def _distance(self, sampler: Sampler) -> float:
        """Of the first process; nan in the others."""
        from train.evaluation.frechet import RunningMoments, frechet_distance_of_moments
        from train.evaluation.samples import balanced_classes, draw

        classes = balanced_classes(self.stage.eval_samples, self.config.model.valid_classes, _SEED)
        moments = RunningMoments()
        for first in range(0, len(classes), _SAMPLE_BATCH):
            samples = draw(sampler, classes[first : first + _SAMPLE_BATCH], _SEED + first, self.config.sampler)
            if parallel.rank() == 0:
                moments.add(self._network(samples).pool)
        if parallel.rank():
            return math.nan
        return frechet_distance_of_moments(moments.result(), self._photos)
