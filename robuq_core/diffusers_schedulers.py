"""diffusers' schedulers and the samplers that they stand for, and what of a scheduler's configuration has to agree.

Timesteps are this project's whatever a scheduler says, so that ``timestep_spacing``, ``steps_offset`` and
``lambda_min_clipped``, which choose them, may be anything.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from robuq_core.checkpoint import Header
from robuq_core.config import NUM_TRAIN_TIMESTEPS, SamplerName
from robuq_core.errors import UserError

# DDIM's eta is 0, as there.
_SAMPLERS: dict[str, SamplerName] = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DPMSolverMultistepScheduler": "dpmsolver++",
}
_SCHEDULERS = {sampler: scheduler for scheduler, sampler in _SAMPLERS.items()}
_BETAS = {"beta_start": 1e-4, "beta_end": 0.02}
_OFF = (False, None)
# What a scheduler may be configured to, and then does what the sampler does.
_SETTINGS: dict[str, tuple[Any, ...]] = {
    "num_train_timesteps": (NUM_TRAIN_TIMESTEPS,),
    "beta_schedule": ("linear",),
    "thresholding": _OFF,
    "rescale_betas_zero_snr": _OFF,
}
# Of one class alone: others carry the keys along from whatever they were made from, and do not look at them.
_OWN_SETTINGS: dict[str, dict[str, tuple[Any, ...]]] = {
    "DDIMScheduler": {"set_alpha_to_one": (True,), "clip_sample_range": (1.0,)},
    "DDPMScheduler": {"variance_type": ("fixed_large",), "clip_sample_range": (1.0,)},
    # euler_at_final and lower_order_final change nothing: onto a clean image the last step is of first order anyway.
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver++",),
        "solver_order": (2,),
        "solver_type": ("midpoint",),
        "final_sigmas_type": ("zero",),
        "use_karras_sigmas": _OFF,
        "use_exponential_sigmas": _OFF,
        "use_beta_sigmas": _OFF,
        "use_lu_lambdas": _OFF,
        "use_flow_sigmas": _OFF,
        "use_dynamic_shifting": _OFF,
    },
}


def scheduler_of(sampler: SamplerName, header: Header) -> Any:
    """diffusers' scheduler that does what ``sampler`` does with the checkpoint of ``header``.

    Raises:
        UserError: diffusers is not installed, or the checkpoint is a flow.
    """
    if sampler not in _SCHEDULERS:
        raise UserError(f"scheduler: {sampler} draws from a flow, for which DiTPipeline has none; use Sampler")
    if importlib.util.find_spec("diffusers") is None:
        raise UserError("a scheduler is an object of diffusers; from a checkout: pip install '.[vae]'")
    diffusion = header.diffusion
    # As of another class, so that one that does not clip hands on whether the next one does.
    config = {**_BETAS, "prediction_type": diffusion.prediction_type, "clip_sample": diffusion.clip_sample,
              "variance_type": "fixed_large", "_class_name": _SCHEDULERS["ddim"]}  # fmt: skip
    return getattr(importlib.import_module("diffusers"), _SCHEDULERS[sampler]).from_config(config)


def sampler_of(scheduler: Any, header: Header) -> SamplerName:
    """The sampler that does what ``scheduler`` of diffusers does with the checkpoint of ``header``.

    Raises:
        ValueError: its class has no counterpart here, or it is configured to another process.
    """
    if header.diffusion.prediction_type == "flow":
        raise ValueError("scheduler: a DiTPipeline's are not for a flow; leave it as it is")
    name = type(scheduler).__name__
    if name not in _SAMPLERS:
        raise ValueError(f"scheduler {name} has no counterpart here; set one of {', '.join(_SAMPLERS)}")
    config = dict(scheduler.config)
    for key, values in _allowed(name, header).items():
        if key in config and config[key] not in values:
            raise ValueError(f"{name}: {key} {config[key]!r} is not supported; set {values[0]!r}")
    if config.get("trained_betas") is not None:
        raise ValueError(f"{name}: trained_betas are not supported; set None")
    for key, value in _BETAS.items():
        if abs(config.get(key, value) - value) > 1e-9:
            raise ValueError(f"{name}: {key} {config[key]!r} is not what the model was trained with; set {value}")
    return _SAMPLERS[name]


def _allowed(name: str, header: Header) -> dict[str, tuple[Any, ...]]:
    allowed = {**_SETTINGS, **_OWN_SETTINGS[name], "prediction_type": (header.diffusion.prediction_type,)}
    if "clip_sample_range" in allowed:  # it clips
        allowed["clip_sample"] = (header.diffusion.clip_sample,)
    if "variance_type" in allowed and header.model.learn_sigma:  # a variance that was learned is used whatever is set
        allowed["variance_type"] += ("learned_range", "fixed_small", "fixed_small_log")
    return allowed
