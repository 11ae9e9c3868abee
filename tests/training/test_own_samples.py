"""Training on the model's own samples: what such a row sees, and that more steps then spoil nothing."""

from pathlib import Path

import pytest
import torch
from synthetic_run import make_config
from torch import Tensor

from robuq_core.checkpoint import FORMAT_VERSION, Header
from robuq_core.config import NUM_TRAIN_TIMESTEPS
from robuq_core.models.dit import DiT
from robuq_core.pipeline import RowSpec, Sampler
from train.config import ConfigError
from train.data import BatchSource
from train.loss import own_sample
from train.run import Run
from train.trainer import Trainer, autocast, batch_loss

LAST = NUM_TRAIN_TIMESTEPS - 1


class Recorder(torch.nn.Module):
    """Answers what it is given, halved, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, timesteps: Tensor, classes: Tensor) -> Tensor:
        self.seen.append((x, timesteps))
        return x / 2


@pytest.mark.parametrize("clip", [False, True])
def test_an_own_sample_is_the_first_step_of_the_sampler(tmp_path: Path, clip: bool) -> None:
    config = make_config(tmp_path, {"diffusion": {"clip_sample": clip}})
    header = Header(format_version=FORMAT_VERSION, model=config.model, quant=config.quant, diffusion=config.diffusion,
                    sampler=config.sampler, decoder="pixels", tensors={})  # fmt: skip
    sampler = Sampler(Recorder(), header, checkpoint_name="recorder", backend_name="torch", weight_bytes=0)
    row = sampler.start(RowSpec(0, 5, 4, 1.0, "ddim"))
    noise = row.x[None].clone()
    sampler.step([row])
    expected = own_sample(noise, noise / 2, torch.tensor([LAST]), torch.tensor([row.timestep]), config.diffusion)
    torch.testing.assert_close(row.x, expected[0], atol=1e-5, rtol=1e-5)


def test_own_rows_see_the_models_sample_and_the_others_the_noised_image(tmp_path: Path) -> None:
    config = make_config(tmp_path, {"teacher": {"own_samples": 0.5, "batch_size": 32}})
    model = DiT(config.model)
    source = BatchSource(Run(config).photos(), config.data.flip_probability, 32, config.seed)
    trainer = Trainer(config, config.teacher, model, source, tmp_path / "teacher")
    batch = trainer._batch(0)
    again = trainer._batch(0)
    assert batch.own is not None
    assert again.own is not None
    assert torch.equal(batch.own, again.own)
    assert 4 < int(batch.own.sum()) < 28
    plain = Trainer(config, config.teacher.model_copy(update={"own_samples": 0.0}), model, source, tmp_path / "x")
    without = plain._batch(0)
    assert without.own is None
    assert torch.equal(without.noise, batch.noise)

    recorder = Recorder()
    batch_loss(recorder, batch, config.diffusion, autocast("fp32", torch.device("cpu")))
    batch_loss(recorder, without, config.diffusion, autocast("fp32", torch.device("cpu")))
    (first, at), (x_t, timesteps), (noised, _) = recorder.seen
    assert torch.equal(first, batch.noise)
    assert at.unique().tolist() == [LAST]
    assert torch.equal(timesteps, batch.timesteps)
    last = torch.full_like(batch.timesteps, LAST)
    own = own_sample(batch.noise, batch.noise / 2, last, batch.timesteps, config.diffusion)
    assert torch.equal(x_t[batch.own], own[batch.own])
    assert torch.equal(x_t[~batch.own], noised[~batch.own])
    assert not torch.isclose(own[batch.own], noised[batch.own]).all(dim=(1, 2, 3)).any()


def test_the_estimate_is_not_trained_through(tmp_path: Path) -> None:
    """The gradient is that of the second forward alone."""
    config = make_config(tmp_path, {"teacher": {"own_samples": 1.0}})
    source = BatchSource(Run(config).photos(), config.data.flip_probability, 4, config.seed)
    model = DiT(config.model)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    batch = Trainer(config, config.teacher, model, source, tmp_path / "teacher")._batch(0)
    last = torch.full_like(batch.timesteps, LAST)
    with torch.no_grad():
        estimate = model(batch.noise, last, batch.classes)
    x_t = own_sample(batch.noise, estimate, last, batch.timesteps, config.diffusion)
    (model(x_t, batch.timesteps, batch.classes) - batch.x0).square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    batch_loss(model, batch, config.diffusion, autocast("fp32", torch.device("cpu"))).backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("stage", ["teacher", "warmup", "qat"])
def test_only_predicted_images_can_be_mended(tmp_path: Path, stage: str) -> None:
    changes = {stage: {"own_samples": 0.1}, "diffusion": {"prediction_type": "v_prediction"}}
    with pytest.raises(ConfigError, match=rf"{stage}\.own_samples .*diffusion\.prediction_type"):
        make_config(tmp_path, changes)
