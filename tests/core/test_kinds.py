"""Every kind of DiT runs packed: its times and signs, samplers, guidance, and no picture that is not finite."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY, tiny_model
from typer.testing import CliRunner

from robuq_core.checkpoint import CheckpointError, Description, read_header, write_checkpoint
from robuq_core.cli import app
from robuq_core.config import FLOW_SAMPLERS, DiffusionConfig, ModelConfig, QuantConfig, SamplerConfig
from robuq_core.diffusers_pipeline import RobuQPipeline
from robuq_core.errors import UserError
from robuq_core.models.adapters import save_official
from robuq_core.models.dit import DiT, timestep_features
from robuq_core.pipeline import RowSpec, Sampler

FLOW = DiffusionConfig(prediction_type="flow")


def written(path: Path, model: ModelConfig, diffusion: DiffusionConfig, sampler: SamplerConfig) -> Sampler:
    quant = QuantConfig(rank=4)
    write_checkpoint(path, tiny_model(model, quant), Description(quant, diffusion, sampler))
    return Sampler.from_checkpoint(path)


@pytest.fixture(scope="module", params=["sit", "repa", "official"])
def flow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sampler:
    model = TINY.model_copy(update={"flavour": request.param})
    path = tmp_path_factory.mktemp("flow") / "flow.safetensors"
    return written(path, model, FLOW, SamplerConfig(sampler="euler", steps=4))


def test_times_run_as_each_code_base_has_them() -> None:
    t = torch.tensor([0.0, 250.0, 1000.0])
    index = timestep_features(t, "official")
    assert torch.equal(timestep_features(1000 * t, "repa"), index)
    torch.testing.assert_close(timestep_features(t, "sit"), timestep_features(1000 - t, "repa"), atol=1e-6, rtol=0)


def test_sits_velocity_runs_from_noise_to_image() -> None:
    """The same weights: at SiT's time t its output is minus what REPA's would be at the same number of its time."""
    one, other = (tiny_model(TINY.model_copy(update={"flavour": flavour})) for flavour in ("sit", "repa"))
    x, classes = torch.randn(3, 3, 16, 16), torch.tensor([1, 2, 10])
    t = torch.tensor([100.0, 500.0, 900.0])
    with torch.no_grad():
        torch.testing.assert_close(one(x, 1000 - t, classes), -other(x, t, classes), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_flow_rows_do_not_depend_on_their_neighbours(flow: Sampler, sampler: Any) -> None:
    specs = [RowSpec(i, i, steps, scale, sampler, interval) for i, (steps, scale, interval) in enumerate(
        [(5, 1.0, (0, 999)), (4, 2.5, (0, 999)), (3, 3.0, (300, 700)), (1, 1.5, (0, 999))])]  # fmt: skip
    alone = []
    for spec in specs:
        rows = [flow.start(spec)]
        flow.finish(rows)
        alone.append(rows[0].x)
    together = [flow.start(spec) for spec in reversed(specs)]
    flow.finish(together)
    for x, row in zip(alone, reversed(together), strict=True):
        assert torch.equal(x, row.x)
        assert bool(x.isfinite().all())


def test_guidance_of_a_flow_begins_at_pure_noise(flow: Sampler) -> None:
    assert flow.start(RowSpec(0, 0, 4, 2.0, "euler")).guided
    row = flow.start(RowSpec(0, 0, 4, 2.0, "euler", (250, 700)))
    guided = []
    while not row.done:
        guided.append(row.guided)
        flow.step([row])
    assert guided == [False, False, True, True]  # at 1000, 750, 500 and 250


def test_samplers_of_the_other_process_are_refused(flow: Sampler, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sampler must be one of euler, heun, sde"):
        flow.start(RowSpec(0, 0, 4, 1.0, "ddim"))
    about = Description(QuantConfig(rank=4), FLOW, SamplerConfig(sampler="ddim"))
    with pytest.raises(CheckpointError, match=r"sampler\.sampler"):
        write_checkpoint(tmp_path / "x.safetensors", tiny_model(), about)
    diffusion = written(tmp_path / "y.safetensors", TINY, DiffusionConfig(), SamplerConfig())
    with pytest.raises(ValueError, match="sampler must be one of ddpm"):
        diffusion.start(RowSpec(0, 0, 4, 1.0, "heun"))


@pytest.mark.parametrize(("classes", "null_class"), [(10, False), (0, True)])
def test_guidance_needs_classes_and_a_null_class(tmp_path: Path, classes: int, null_class: bool) -> None:
    model = TINY.model_copy(update={"num_classes": classes, "null_class": null_class})
    sampler = written(tmp_path / "x.safetensors", model, DiffusionConfig(), SamplerConfig(steps=2, guidance_scale=1))
    with pytest.raises(ValueError, match="guidance_scale must be 1"):
        sampler.start(RowSpec(0, 0, 2, 1.5, "ddim"))
    ids: list[int | None] = [9, 3] if classes else [None, 0]
    first, second = sampler.generate(ids, seed=1)
    assert first.size == second.size == (16, 16)
    with pytest.raises(ValueError, match="class_id must be 0"):
        sampler.generate([10])
    with pytest.raises(ValueError, match="class_id must be 0" if classes else "no classes"):
        sampler.generate([None] if classes else ["tench"])
    with pytest.raises(ValueError, match="null_class"):
        ModelConfig(num_classes=0, null_class=False)
    with pytest.raises(CheckpointError, match="guidance_scale"):
        written(tmp_path / "y.safetensors", model, DiffusionConfig(), SamplerConfig(guidance_scale=2))


@pytest.mark.parametrize(
    ("changes", "diffusion", "default"),
    [
        ({"flavour": "sit"}, FLOW, ("euler", 1.5)),
        ({"flavour": "repa", "learn_sigma": False}, FLOW, ("euler", 1.5)),
        ({"num_classes": 0}, DiffusionConfig(), ("ddim", 1.0)),
        ({"null_class": False}, DiffusionConfig(), ("ddim", 1.0)),
        ({"input_size": 64, "patch_size": 2, "depth": 1}, DiffusionConfig(), ("ddim", 1.5)),
    ],
    ids=["sit", "repa", "unconditional", "no null class", "512 px"],
)
def test_every_kind_packs_and_draws(
    tmp_path: Path, changes: dict[str, Any], diffusion: DiffusionConfig, default: tuple[str, float]
) -> None:
    torch.manual_seed(0)
    model = DiT(ModelConfig.model_validate({**TINY.model_dump(), **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    save_official(model, tmp_path / "x.pt", diffusion)
    packed = tmp_path / "x.safetensors"
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "x.pt"), str(packed), "--ptq", "--heads", "4",
                                      "--rank", "4", "--steps", "2"])  # fmt: skip
    assert result.exit_code == 0, result.output
    header = read_header(packed)
    assert (header.sampler.sampler, header.sampler.guidance_scale) == default
    assert header.model == model.config
    assert header.diffusion == diffusion
    draws = CliRunner().invoke(app, ["sample", "0", "-c", str(packed), "-o", str(tmp_path / "out"), "--seed", "1"])
    assert draws.exit_code == 0, draws.output
    assert len(list((tmp_path / "out").iterdir())) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_picture_that_is_not_finite_is_an_error(tmp_path: Path, bad: float) -> None:
    sampler = written(tmp_path / "x.safetensors", TINY, DiffusionConfig(), SamplerConfig(steps=2))
    row = sampler.start(RowSpec(0, 0, 2, 1.0, "ddim"))
    row.x[0, 3, 3] = bad
    sampler.finish([row])
    with pytest.raises(CheckpointError, match="finite"):
        sampler.decode(row)
    with pytest.raises(CheckpointError, match="finite"):
        sampler.decode_estimate(torch.full((3, 16, 16), bad))


def test_the_calls_of_diffusers_draw_every_kind(flow: Sampler, tmp_path: Path) -> None:
    pipe = RobuQPipeline(flow)
    (image,) = pipe([3], num_inference_steps=3, generator=torch.Generator().manual_seed(1)).images
    assert image.size == (16, 16)
    with pytest.raises(UserError, match="scheduler"):
        _ = pipe.scheduler
    model = TINY.model_copy(update={"num_classes": 0})
    unguided = written(tmp_path / "x.safetensors", model, DiffusionConfig(), SamplerConfig(steps=2, guidance_scale=1))
    assert len(RobuQPipeline(unguided)([0, 0], num_inference_steps=2).images) == 2
    with pytest.raises(ValueError, match="guidance_scale"):
        RobuQPipeline(unguided)([0], num_inference_steps=2, guidance_scale=3.0)
