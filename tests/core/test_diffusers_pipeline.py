"""RobuQPipeline beside diffusers' DiTPipeline: the same call, the same kinds of answers, the same initial noise."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from autoencoders import IMAGE_SIZE, save_autoencoder_tiny, write_latent
from diffusers import DiTPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from tiny import TINY, write_tiny

from robuq_core import RobuQPipeline, diffusers_pipeline
from robuq_core.checkpoint import Description, write_checkpoint
from robuq_core.decode import LatentDecoder
from robuq_core.diffusion.samplers import step_table
from robuq_core.errors import UserError
from robuq_core.pipeline import RowSpec, Sampler

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = TINY.input_size


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("diffusers") / "tiny.safetensors"
    write_tiny(path)
    return path


@pytest.fixture
def pipe(path: Path) -> RobuQPipeline:
    pipe = RobuQPipeline.from_pretrained(path, backend="reference")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_call_takes_what_a_dit_pipelines_takes() -> None:
    ours = inspect.signature(RobuQPipeline.__call__).parameters
    theirs = inspect.signature(DiTPipeline.__call__).parameters
    assert list(ours) == list(theirs)
    assert {name: p.default for name, p in ours.items()} == {name: p.default for name, p in theirs.items()}
    assert {name: p.kind for name, p in ours.items()} == {name: p.kind for name, p in theirs.items()}
    for method in ("from_pretrained", "to", "get_label_ids", "set_progress_bar_config", "progress_bar"):
        assert callable(getattr(DiTPipeline, method))
        assert callable(getattr(RobuQPipeline, method))


def test_a_script_as_it_is_written_for_diffusers(path: Path) -> None:
    pipe = RobuQPipeline.from_pretrained(path, torch_dtype=torch.float16)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe = pipe.to("cpu")
    pipe.set_progress_bar_config(disable=True)
    class_ids = pipe.get_label_ids(["class 3", "class 7"])
    output = pipe(class_labels=class_ids, num_inference_steps=3, generator=torch.manual_seed(33))
    assert isinstance(output, ImagePipelineOutput)
    assert [image.size for image in output.images] == [(SIDE, SIDE)] * 2
    assert all(isinstance(image, Image.Image) for image in output.images)


def test_output_types_hold_the_same_pictures(pipe: RobuQPipeline) -> None:
    def draw(output_type: str | None) -> Any:
        return pipe([1, 2], generator=seeded(), num_inference_steps=2, output_type=output_type).images

    images, array, tensor = draw("pil"), draw("np"), draw("pt")
    assert np.array_equal(draw(None), array)
    assert isinstance(images, list)
    assert isinstance(array, np.ndarray)
    assert isinstance(tensor, torch.Tensor)
    assert (array.shape, array.dtype) == ((2, SIDE, SIDE, 3), np.float32)
    assert tensor.shape == (2, 3, SIDE, SIDE)
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert array.min() >= 0
    assert array.max() <= 1
    assert np.abs(np.stack([np.asarray(image) for image in images]) / 255 - array).max() <= 0.51 / 255
    # A tensor that a caller may compute gradients with.
    tensor.clone().requires_grad_().sum().backward()
    assert not tensor.is_inference()


def test_the_generator_draws_the_noise_that_diffusers_draws(
    pipe: RobuQPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[torch.Tensor] = []
    start = Sampler.start

    def remembered(self: Sampler, spec: RowSpec, noise: torch.Tensor | None = None) -> object:
        row = start(self, spec, noise)
        started.append(row.x)
        return row

    monkeypatch.setattr(Sampler, "start", remembered)
    shape = (2, 3, SIDE, SIDE)
    pipe([1, 2], generator=seeded(5), num_inference_steps=1)
    assert torch.equal(torch.stack(started), randn_tensor(shape, generator=seeded(5)))
    started.clear()
    pipe([1, 2], generator=[seeded(6), seeded(7)], num_inference_steps=1)
    assert torch.equal(torch.stack(started), randn_tensor(shape, generator=[seeded(6), seeded(7)]))


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_a_generator_fixes_the_pictures(pipe: RobuQPipeline, scheduler: str) -> None:
    kind = getattr(diffusers, scheduler)
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    assert type(pipe.scheduler) is kind

    def draw(seed: int, **options: object) -> np.ndarray:
        return pipe([1, 1], generator=seeded(seed), num_inference_steps=3, output_type="np", **options).images  # type: ignore[arg-type]

    assert np.array_equal(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))
    assert not np.array_equal(draw(1)[0], draw(1)[1])
    # At 1 and below there is no guidance, as there.
    assert np.array_equal(draw(1, guidance_scale=1.0), draw(1, guidance_scale=0.0))
    assert not np.array_equal(draw(1, guidance_scale=1.0), draw(1, guidance_scale=1.5))


def test_it_draws_what_the_sampler_draws_from_the_same_noise(pipe: RobuQPipeline) -> None:
    sampler = pipe.sampler
    (image,) = pipe([3], generator=seeded(9), guidance_scale=2.0, num_inference_steps=3).images
    noise = torch.randn(1, 3, SIDE, SIDE, generator=seeded(9))
    row = sampler.start(RowSpec(3, 0, 3, 2.0, sampler.defaults.sampler), noise[0])
    sampler.finish([row])
    assert np.array_equal(np.asarray(image), sampler.decode(row))


def test_labels_are_the_synonyms_in_order(tmp_path: Path) -> None:
    from tiny import tiny_model

    from robuq_core.config import DiffusionConfig, QuantConfig, SamplerConfig

    model = TINY.model_copy(update={"num_classes": 2})
    quant = QuantConfig(rank=4)
    named = tmp_path / "named.safetensors"
    names = ("tench, Tinca tinca", "golden retriever")
    write_checkpoint(named, tiny_model(model, quant), Description(quant, DiffusionConfig(), SamplerConfig(), names))
    pipe = RobuQPipeline.from_pretrained(named, backend="reference")
    assert list(pipe.labels.items()) == [("Tinca tinca", 0), ("golden retriever", 1), ("tench", 0)]
    assert pipe.get_label_ids(["golden retriever", "tench"]) == [1, 0]
    assert pipe.get_label_ids("golden retriever") == [1]
    with pytest.raises(ValueError, match=r"'shark' is no label of this checkpoint; \.labels lists all 3"):
        pipe.get_label_ids(["shark"])


def test_latents_are_decoded_in_the_type_that_was_asked_for(tmp_path: Path) -> None:
    write_latent(tmp_path / "latent.safetensors")
    folder = save_autoencoder_tiny(tmp_path / "vae")
    pipe = RobuQPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, backend="reference")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.dtype == torch.bfloat16
    assert isinstance(pipe.sampler.decoder, LatentDecoder)
    assert pipe.vae is pipe.sampler.decoder.autoencoder
    (half,) = pipe([1], generator=seeded(), num_inference_steps=2, output_type="np").images
    assert pipe.to(torch.float32) is pipe
    assert pipe.dtype == torch.float32
    (full,) = pipe([1], generator=seeded(), num_inference_steps=2, output_type="np").images
    assert half.shape == full.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert 0 < np.abs(half - full).mean() < 0.02
    named = RobuQPipeline.from_pretrained(tmp_path / "latent.safetensors", decoder=folder, backend="reference")
    assert named.sampler.image_size == IMAGE_SIZE


def test_the_scheduler_stands_for_the_sampler(pipe: RobuQPipeline) -> None:
    scheduler = pipe.scheduler
    assert type(scheduler).__name__ == "DDIMScheduler"
    assert pipe.scheduler is scheduler
    assert scheduler.config.prediction_type == pipe.sampler.header.diffusion.prediction_type
    assert pipe.components == {"transformer": pipe.sampler.model, "vae": pipe.vae, "scheduler": scheduler}
    assert (scheduler.config.beta_start, scheduler.config.beta_end) == (1e-4, 0.02)
    # The steps themselves are this project's.
    assert step_table("ddim", 4).timesteps[0] == 999


def test_without_diffusers_everything_but_a_scheduler_works(
    pipe: RobuQPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = diffusers_pipeline.importlib.util.find_spec

    def hidden(name: str) -> object:
        return None if name == "diffusers" else find(name)

    monkeypatch.setattr(diffusers_pipeline.importlib.util, "find_spec", hidden)
    output = pipe([1], num_inference_steps=1)
    assert type(output) is diffusers_pipeline.PipelineOutput
    assert len(output.images) == 1
    with pytest.raises(UserError, match=r"from a checkout: pip install '\.\[vae\]'"):
        _ = pipe.scheduler


def test_calls_of_scripts_that_have_no_use_here_do_nothing(path: Path, pipe: RobuQPipeline) -> None:
    same = RobuQPipeline.from_pretrained(path, use_safetensors=True, variant="fp16", backend="reference")
    same.set_progress_bar_config(disable=True)
    for call in ("enable_attention_slicing", "enable_model_cpu_offload", "enable_xformers_memory_efficient_attention"):
        assert list(inspect.signature(getattr(DiTPipeline, call)).parameters) == list(
            inspect.signature(getattr(RobuQPipeline, call)).parameters
        )
        getattr(same, call)()
    draw = {"class_labels": [1], "num_inference_steps": 1, "output_type": "np"}
    assert np.array_equal(same(generator=seeded(), **draw).images, pipe(generator=seeded(), **draw).images)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda pipe: pipe([10]), r"class_id must be 0\.\.9, not 10"),
        (lambda pipe: pipe([]), "class_labels is empty"),
        (lambda pipe: pipe([1], num_inference_steps=0), "steps must be"),
        (lambda pipe: pipe([1], output_type="latent"), "output_type 'latent' is not supported; choose pil, np or pt"),
        (lambda pipe: pipe([1, 2], generator=[seeded()] * 3), "3 generators for 2 class labels"),
        (lambda pipe: pipe.to(), "needs a device, a dtype or both"),
        (lambda pipe: pipe.to(torch.int8), "floating dtype, not torch.int8"),
        (lambda pipe: pipe.progress_bar(), "an iterable or a total"),
        (
            lambda pipe: setattr(pipe, "scheduler", diffusers.EulerDiscreteScheduler()),
            "scheduler EulerDiscreteScheduler is not supported; set one of DDIMScheduler",
        ),
        (
            lambda pipe: setattr(
                pipe, "scheduler", diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=True)
            ),
            "clip_sample True is not supported; set False",
        ),
    ],
)
def test_what_is_not_supported_is_told(
    pipe: RobuQPipeline, mistake: Callable[[RobuQPipeline], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mistake(pipe)


def test_the_progress_bar(pipe: RobuQPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    for disable in (False, True):
        pipe.set_progress_bar_config(desc="generating", disable=disable)
        assert list(pipe.progress_bar([5, 6])) == [5, 6]
        assert list(pipe.progress_bar(total=2)) == [0, 1]
        with pipe.progress_bar(total=4) as bar:
            bar.update(4)
        assert ("generating: 100%" in capsys.readouterr().err) is not disable
    (images,) = pipe([1], num_inference_steps=1, return_dict=False)
    assert len(images) == 1
