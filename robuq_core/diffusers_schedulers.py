"""Which diffusers scheduler stands for which sampler, and which of its settings must agree.

Timesteps are always this project's, so settings that choose them (``timestep_spacing``, ``steps_offset``,
``lambda_min_clipped``) may have any value.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from robuq_core.checkpoint import Header
from robuq_core.config import BETA_END, BETA_START, NUM_TRAIN_TIMESTEPS, SamplerName
from robuq_core.errors import UserError

# DDIM's eta is 0 in diffusers too.
_SAMPLERS: dict[str, SamplerName] = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DPMSolverMultistepScheduler": "dpmsolver++",
}
_SCHEDULERS = {sampler: scheduler for scheduler, sampler in _SAMPLERS.items()}
_BETAS = {"beta_start": BETA_START, "beta_end": BETA_END}
_OFF = (False, None)
# Allowed values.
_SETTINGS: dict[str, tuple[Any, ...]] = {
    "num_train_timesteps": (NUM_TRAIN_TIMESTEPS,),
    "beta_schedule": ("linear",),
    "thresholding": _OFF,
    "rescale_betas_zero_snr": _OFF,
}
# The same by class: other classes ignore these keys, and may have them left over from a conversion.
_OWN_SETTINGS: dict[str, dict[str, tuple[Any, ...]]] = {
    "DDIMScheduler": {"set_alpha_to_one": (True,), "clip_sample_range": (1.0,)},
    "DDPMScheduler": {"variance_type": ("fixed_large",), "clip_sample_range": (1.0,)},
    # euler_at_final and lower_order_final have no effect: the last step, onto a clean image, is first order anyway.
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver++",),
        "solver_order": (2,),
        "solver_type": ("midpoint",),
        "final_sigmas_type": ("zero",),
        **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"), _OFF),
        **dict.fromkeys(("use_flow_sigmas", "use_dynamic_shifting"), _OFF),
    },
}


def scheduler_of(sampler: SamplerName, header: Header) -> Any:
    """The diffusers scheduler equivalent to ``sampler`` on the checkpoint of ``header``.

    Raises:
        UserError: diffusers is not installed, or the checkpoint is a flow.
    """
    if sampler not in _SCHEDULERS:
        raise UserError(f"scheduler: {sampler} samples a flow, and DiTPipeline has no scheduler for it; use Sampler")
    if importlib.util.find_spec("diffusers") is None:
        raise UserError("a scheduler is an object of diffusers; from a checkout: pip install '.[vae]'")
    diffusion = header.diffusion
    # A foreign _class_name keeps clip_sample in the configuration of classes that do not clip, for conversions.
    config = {**_BETAS, "prediction_type": diffusion.prediction_type, "clip_sample": diffusion.clip_sample,
              "variance_type": "fixed_large", "_class_name": _SCHEDULERS["ddim"]}  # fmt: skip
    return getattr(importlib.import_module("diffusers"), _SCHEDULERS[sampler]).from_config(config)


def sampler_of(scheduler: Any, header: Header) -> SamplerName:
    """The sampler equivalent to a diffusers ``scheduler`` on the checkpoint of ``header``.

    Raises:
        ValueError: its class is not supported, or it is configured for another process.
    """
    if header.diffusion.prediction_type == "flow":
        raise ValueError("scheduler: DiTPipeline's schedulers do not support a flow; do not set one")
    name = type(scheduler).__name__
    if name not in _SAMPLERS:
        raise ValueError(f"scheduler {name} is not supported; set one of {', '.join(_SAMPLERS)}")
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
    if "clip_sample_range" in allowed:  # a class that clips
        allowed["clip_sample"] = (header.diffusion.clip_sample,)
    if "variance_type" in allowed and header.model.learn_sigma:  # a learned variance is always used
        allowed["variance_type"] += ("learned_range", "fixed_small", "fixed_small_log")
    return allowed
