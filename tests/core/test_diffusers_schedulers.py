"""Which of diffusers' schedulers do what a sampler here does, and what tells the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from tiny import TINY, write_tiny

from robuq_core.checkpoint import Header, read_header
from robuq_core.config import SamplerName
from robuq_core.diffusers_schedulers import sampler_of, scheduler_of

SAMPLERS: tuple[SamplerName, ...] = ("ddim", "ddpm", "dpmsolver++")


def header_of(folder: Path, *, clip_sample: bool = False, learn_sigma: bool = True) -> Header:
    model = TINY.model_copy(update={"learn_sigma": learn_sigma})
    write_tiny(folder / "tiny.safetensors", model, clip_sample=clip_sample)
    return read_header(folder / "tiny.safetensors")


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Header:
    return header_of(tmp_path_factory.mktemp("schedulers"))


def configured(header: Header, sampler: SamplerName, **settings: Any) -> Any:
    own = scheduler_of(sampler, header)
    return type(own).from_config(own.config, **settings)


@pytest.mark.parametrize("first", SAMPLERS)
@pytest.mark.parametrize("second", SAMPLERS)
@pytest.mark.parametrize("clip_sample", [False, True])
def test_each_is_made_from_another(tmp_path: Path, first: SamplerName, second: SamplerName, clip_sample: bool) -> None:
    header = header_of(tmp_path, clip_sample=clip_sample)
    own = scheduler_of(first, header)
    assert sampler_of(own, header) == first
    kind = type(scheduler_of(second, header))
    assert sampler_of(kind.from_config(own.config), header) == second


@pytest.mark.parametrize(
    ("sampler", "settings", "fix"),
    [
        ("ddim", {"rescale_betas_zero_snr": True}, "set False"),
        ("ddpm", {"rescale_betas_zero_snr": True}, "set False"),
        ("dpmsolver++", {"rescale_betas_zero_snr": True}, "set False"),
        ("ddim", {"clip_sample": True}, "set False"),
        ("ddpm", {"clip_sample": True}, "set False"),
        ("ddim", {"clip_sample_range": 2.0}, r"set 1\.0"),
        ("ddim", {"set_alpha_to_one": False}, "set True"),
        ("ddim", {"thresholding": True}, "set False"),
        ("ddim", {"num_train_timesteps": 500}, "set 1000"),
        ("ddim", {"beta_schedule": "scaled_linear"}, "set 'linear'"),
        ("ddim", {"trained_betas": np.linspace(1e-4, 0.02, 1000)}, "set None"),
        ("ddim", {"beta_end": 0.012}, r"not what the model was trained with; set 0\.02"),
        ("ddim", {"prediction_type": "epsilon"}, "set 'sample'"),
        ("ddpm", {"variance_type": "learned"}, "set 'fixed_large'"),
        ("dpmsolver++", {"use_karras_sigmas": True}, "set False"),
        ("dpmsolver++", {"use_exponential_sigmas": True}, "set False"),
        ("dpmsolver++", {"use_lu_lambdas": True}, "set False"),
        ("dpmsolver++", {"use_flow_sigmas": True}, "set False"),
        ("dpmsolver++", {"solver_type": "heun"}, "set 'midpoint'"),
        ("dpmsolver++", {"solver_order": 3}, "set 2"),
        ("dpmsolver++", {"algorithm_type": "sde-dpmsolver++"}, r"set 'dpmsolver\+\+'"),
        ("dpmsolver++", {"final_sigmas_type": "sigma_min"}, "set 'zero'"),
    ],
)
def test_another_process_is_refused(header: Header, sampler: SamplerName, settings: dict[str, Any], fix: str) -> None:
    (key,) = settings
    with pytest.raises(ValueError, match=f"Scheduler: {key} .*{fix}$"):
        sampler_of(configured(header, sampler, **settings), header)


def test_clipping_is_compared_with_the_checkpoint(tmp_path: Path) -> None:
    header = header_of(tmp_path, clip_sample=True)
    with pytest.raises(ValueError, match="clip_sample False is not supported; set True"):
        sampler_of(configured(header, "ddim", clip_sample=False), header)


def test_a_variance_is_learned_where_the_model_has_one(tmp_path: Path, header: Header) -> None:
    assert sampler_of(configured(header, "ddpm", variance_type="learned_range"), header) == "ddpm"
    plain = header_of(tmp_path, learn_sigma=False)
    with pytest.raises(ValueError, match="variance_type 'learned_range' is not supported"):
        sampler_of(configured(plain, "ddpm", variance_type="learned_range"), plain)
    with pytest.raises(ValueError, match="variance_type 'fixed_small' is not supported; set 'fixed_large'"):
        sampler_of(configured(plain, "ddpm", variance_type="fixed_small"), plain)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("settings", [{"timestep_spacing": "trailing"}, {"steps_offset": 1}])
def test_what_chooses_timesteps_may_be_anything(header: Header, sampler: SamplerName, settings: dict[str, Any]) -> None:
    assert sampler_of(configured(header, sampler, **settings), header) == sampler


def test_a_key_that_another_class_left_behind_is_not_looked_at(header: Header) -> None:
    ddim = configured(header, "ddim", set_alpha_to_one=False)
    solver = diffusers.DPMSolverMultistepScheduler.from_config(ddim.config)
    assert sampler_of(solver, header) == "dpmsolver++"
