"""RobuQPipeline beside diffusers' DiTPipeline: the same calls, the same initial noise, and schedulers that fit."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from autoencoders import IMAGE_SIZE, save_autoencoder_tiny, write_latent
from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline, DPMSolverMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from tiny import TINY, tiny_model, write_tiny

from robuq_core import RobuQPipeline
from robuq_core.checkpoint import Description, write_checkpoint
from robuq_core.config import DiffusionConfig, QuantConfig, SamplerConfig
from robuq_core.decode import LatentDecoder
from robuq_core.errors import UserError
from robuq_core.pipeline import RowSpec, Sampler

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = TINY.input_size
SCHEDULERS = (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler)


def loaded(path: Path, **options: Any) -> RobuQPipeline:
    pipe = RobuQPipeline.from_pretrained(path, backend="reference", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def written(folder: Path, *, clip_sample: bool = False, learn_sigma: bool = True) -> RobuQPipeline:
    path = folder / "tiny.safetensors"
    write_tiny(path, TINY.model_copy(update={"learn_sigma": learn_sigma}), clip_sample=clip_sample)
    return loaded(path)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("diffusers") / "tiny.safetensors"
    write_tiny(path)
    return path


@pytest.fixture
def pipe(path: Path) -> RobuQPipeline:
    return loaded(path)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_call_takes_what_a_dit_pipelines_takes() -> None:
    ours, theirs = (inspect.signature(kind.__call__).parameters for kind in (RobuQPipeline, DiTPipeline))
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]


def test_a_script_as_it_is_written_for_diffusers(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = RobuQPipeline.from_pretrained(path, torch_dtype=torch.float16, use_safetensors=True, variant="fp16")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe = pipe.to("cpu")
    pipe.enable_attention_slicing("max")
    pipe.enable_model_cpu_offload(gpu_id=0)
    pipe.enable_xformers_memory_efficient_attention()
    pipe.set_progress_bar_config(desc="generating")
    class_ids = pipe.get_label_ids(["class 3", "class 7"])
    output = pipe(class_labels=class_ids, num_inference_steps=3, generator=torch.manual_seed(33))
    assert "generating: 100%" in capsys.readouterr().err
    assert output.images is output[0]
    assert [image.size for image in output.images] == [(SIDE, SIDE)] * 2
    assert all(isinstance(image, Image.Image) for image in output.images)
    pipe.set_progress_bar_config(disable=True)
    (images,) = pipe([1], num_inference_steps=1, return_dict=False)
    assert len(images) == 1
    assert "generating" not in capsys.readouterr().err


def test_output_types_hold_the_same_pictures(pipe: RobuQPipeline) -> None:
    def draw(output_type: str | None) -> Any:
        return pipe([1, 2], generator=seeded(), num_inference_steps=2, output_type=output_type).images

    images, array, tensor = draw("pil"), draw("np"), draw("pt")
    assert np.array_equal(draw(None), array)
    assert (array.shape, array.dtype) == ((2, SIDE, SIDE, 3), np.float32)
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert (array.min() >= 0, array.max() <= 1) == (True, True)
    assert np.abs(np.stack([np.asarray(image) for image in images]) / 255 - array).max() <= 0.51 / 255
    # A tensor that a caller may compute gradients with.
    tensor.clone().requires_grad_().sum().backward()


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
    for generators in (lambda: seeded(5), lambda: [seeded(6), seeded(7)]):
        started.clear()
        pipe([1, 2], generator=generators(), num_inference_steps=1)
        assert torch.equal(torch.stack(started), randn_tensor((2, 3, SIDE, SIDE), generator=generators()))


def test_it_draws_what_the_sampler_draws_from_the_same_noise(pipe: RobuQPipeline) -> None:
    sampler = pipe.sampler
    (image,) = pipe([3], generator=seeded(9), guidance_scale=2.0, num_inference_steps=3).images
    noise = torch.randn(1, 3, SIDE, SIDE, generator=seeded(9))
    row = sampler.start(RowSpec(3, 0, 3, 2.0, sampler.defaults.sampler), noise[0])
    sampler.finish([row])
    assert np.array_equal(np.asarray(image), sampler.decode(row))


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_generator_fixes_the_pictures(pipe: RobuQPipeline, kind: Any) -> None:
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


def test_labels_are_the_synonyms_in_order(tmp_path: Path) -> None:
    quant, names = QuantConfig(rank=4), ("tench, Tinca tinca", "golden retriever")
    model = tiny_model(TINY.model_copy(update={"num_classes": 2}), quant)
    about = Description(quant, DiffusionConfig(), SamplerConfig(), names)
    write_checkpoint(tmp_path / "named.safetensors", model, about)
    pipe = loaded(tmp_path / "named.safetensors")
    assert list(pipe.labels.items()) == [("Tinca tinca", 0), ("golden retriever", 1), ("tench", 0)]
    assert pipe.get_label_ids(["golden retriever", "tench"]) == [1, 0]
    assert pipe.get_label_ids("golden retriever") == [1]
    with pytest.raises(ValueError, match=r"'shark' is no label of this checkpoint; \.labels lists all 3"):
        pipe.get_label_ids(["shark"])


def test_latents_are_decoded(tmp_path: Path) -> None:
    write_latent(tmp_path / "latent.safetensors")
    save_autoencoder_tiny(tmp_path / "vae")
    pipe = loaded(tmp_path, torch_dtype=torch.bfloat16)
    assert isinstance(pipe.sampler.decoder, LatentDecoder)
    assert pipe.vae is pipe.sampler.decoder.autoencoder
    (image,) = pipe.to("cpu", torch.float16)([1], generator=seeded(), num_inference_steps=2, output_type="np").images
    assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda pipe: pipe([10]), r"class_id must be 0\.\.9, not 10"),
        (lambda pipe: pipe([]), "class_labels is empty"),
        (lambda pipe: pipe([1], num_inference_steps=0), "steps must be"),
        (lambda pipe: pipe([1], output_type="latent"), "output_type 'latent' is not supported; choose pil, np or pt"),
        (lambda pipe: pipe([1, 2], generator=[seeded()] * 3), "3 generators for 2 class labels"),
        (
            lambda pipe: setattr(pipe, "scheduler", diffusers.EulerDiscreteScheduler()),
            "scheduler EulerDiscreteScheduler is not supported; set one of DDIMScheduler",
        ),
    ],
)
def test_what_is_not_supported_is_named(
    pipe: RobuQPipeline, mistake: Callable[[RobuQPipeline], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mistake(pipe)


def test_moving_loads_the_file_again(pipe: RobuQPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    before, options = pipe.sampler, []
    assert pipe.to("cpu").sampler is before

    def load(path: Path, **chosen: Any) -> Sampler:
        options.append((path, chosen["backend"], chosen["device"]))
        return before

    monkeypatch.setattr(Sampler, "from_checkpoint", load)
    pipe.to("cuda:1", torch.float16)
    assert options == [(before.path, "reference", "cuda:1")]
    plain = RobuQPipeline(Sampler(tiny_model(), before.header, checkpoint_name="plain"))
    with pytest.raises(ValueError, match="plain: only a sampler of a packed file can move to cuda"):
        plain.to("cuda")


def test_without_diffusers_everything_but_a_scheduler_works(
    pipe: RobuQPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert len(pipe([1], num_inference_steps=1).images) == 1
    with pytest.raises(UserError, match=r"from a checkout: pip install '\.\[vae\]'"):
        _ = pipe.scheduler


# Schedulers.


@pytest.mark.parametrize("clip_sample", [False, True])
def test_each_scheduler_is_made_from_another(tmp_path: Path, clip_sample: bool) -> None:
    pipe = written(tmp_path, clip_sample=clip_sample)
    config = pipe.scheduler.config
    assert (type(pipe.scheduler), config.prediction_type) == (DDIMScheduler, "sample")
    assert (config.beta_start, config.beta_end, config.clip_sample) == (1e-4, 0.02, clip_sample)
    for kind in (*SCHEDULERS, *reversed(SCHEDULERS)):
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    for free in ({"timestep_spacing": "trailing"}, {"steps_offset": 1}):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **free)
    # A key that another class left behind has no effect.
    foreign = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=False)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(foreign.config)
    with pytest.raises(ValueError, match=f"clip_sample {not clip_sample} is not supported; set {clip_sample}"):
        pipe.scheduler = DDIMScheduler.from_config(config, clip_sample=not clip_sample)


@pytest.mark.parametrize(
    ("kind", "settings", "fix"),
    [
        *((kind, {"rescale_betas_zero_snr": True}, "set False") for kind in SCHEDULERS),
        (DDPMScheduler, {"clip_sample": True}, "set False"),
        (DDIMScheduler, {"clip_sample_range": 2.0}, r"set 1\.0"),
        (DDIMScheduler, {"set_alpha_to_one": False}, "set True"),
        (DDIMScheduler, {"thresholding": True}, "set False"),
        (DDIMScheduler, {"num_train_timesteps": 500}, "set 1000"),
        (DDIMScheduler, {"beta_schedule": "scaled_linear"}, "set 'linear'"),
        (DDIMScheduler, {"trained_betas": np.linspace(1e-4, 0.02, 1000)}, "set None"),
        (DDIMScheduler, {"beta_end": 0.012}, r"set 0\.02"),
        (DDIMScheduler, {"prediction_type": "epsilon"}, "set 'sample'"),
        (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, "set False"),
        (DPMSolverMultistepScheduler, {"use_flow_sigmas": True}, "set False"),
        (DPMSolverMultistepScheduler, {"solver_type": "heun"}, "set 'midpoint'"),
        (DPMSolverMultistepScheduler, {"solver_order": 3}, "set 2"),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, r"set 'dpmsolver\+\+'"),
        (DPMSolverMultistepScheduler, {"final_sigmas_type": "sigma_min"}, "set 'zero'"),
    ],
)
def test_schedulers_of_another_process_are_refused(
    pipe: RobuQPipeline, kind: Any, settings: dict[str, Any], fix: str
) -> None:
    (key,) = settings
    with pytest.raises(ValueError, match=f"Scheduler: {key} .*{fix}$"):
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **settings)


def test_a_variance_is_learned_where_the_model_has_one(tmp_path: Path, pipe: RobuQPipeline) -> None:
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, variance_type="learned_range")
    plain = written(tmp_path, learn_sigma=False)
    for variance in ("learned_range", "fixed_small"):
        with pytest.raises(ValueError, match=f"variance_type '{variance}' is not supported; set 'fixed_large'"):
            plain.scheduler = DDPMScheduler.from_config(plain.scheduler.config, variance_type=variance)
