"""How well a stage is doing while it trains: held-out loss, a sheet of samples, and a small Fréchet distance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from robuq_core.models.dit import DiT
from robuq_core.pipeline import Sampler
from train import parallel
from train.config import StageConfig, TrainConfig
from train.loss import diffusion_loss

if TYPE_CHECKING:
    from train.evaluation.figures import Moments
    from train.evaluation.networks import FeatureNetwork
    from train.run import Run

_LOSS_IMAGES = 256
_LOSS_BATCH = 32
_SHEET_IMAGES = 16
_SEED = 0


class Watch:
    """Measures the model of stage ``name`` as it trains; every process of a run calls it.

    The loss is the training loss on up to 256 images of ``evaluation.split`` with fixed noise, so it falls
    smoothly. Sheets go to ``run_dir/samples/STAGE-STEP.png``.
    """

    def __init__(self, run: Run, config: TrainConfig, name: str) -> None:
        self.config, self.name, self._held_out = config, name, run.held_out
        self.stage: StageConfig = getattr(config, name)
        images = len(self._held_out.dataset)
        size = min(_LOSS_BATCH, images)
        count = min(_LOSS_IMAGES, images // size * size)
        self._batches = self._held_out.fixed_points(count, size, _SEED, parallel.training_device())
        self._sampler: Sampler | None = None  # with the autoencoder and, on a GPU, the compiled network
        self._network: FeatureNetwork | None = None  # of the first process, which measures
        self._photos: Moments | None = None
        if self.stage.eval_samples:
            parallel.on_first(self._prepare_distance)

    def __call__(self, model: DiT, step: int) -> dict[str, float]:
        """Figures of ``model``, the same one in every call, by name."""
        from train.evaluation.samples import balanced_classes, generate, plain_sampler, small_distance, write_sheet

        training = model.training
        model.eval()
        figures = {"held_out_loss": self._loss(model)}
        if self._sampler is None:
            self._sampler = plain_sampler(model, self.config, self.name)
        classes = balanced_classes(_SHEET_IMAGES, self.config.model.valid_classes, _SEED)
        samples = generate(self._sampler, classes, _SEED, self.config.sampler)
        if parallel.rank() == 0:
            write_sheet(samples, self.config.run_dir / "samples" / f"{self.name}-{step:07d}.png")
        if self.stage.eval_samples:
            figures["fd_effnet"] = small_distance(self._sampler, self.config.sampler, self.stage.eval_samples, _SEED,
                                                  self._network, self._photos)  # fmt: skip
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
        self._photos = reference(self._held_out, self._network).pool
