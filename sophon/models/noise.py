"""Noise: which schedulers of diffusers have DDPM's forward process or a flow, and which of their settings say it.

DDPM's is x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise with a_t the cumulative product of 1 - beta_t. What is not
listed here by name is refused: a model would otherwise be measured, and protected, at another noise than its own.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler

from sophon.errors import UserError, choose, one_line

SCHEDULERS = (
    *("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DEISMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"),
)
# settings of those that say how images are drawn, not what noise the network was trained on
SAMPLING = (
    *("clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value"),
    *("timestep_spacing", "steps_offset", "set_alpha_to_one", "skip_prk_steps", "interpolation_type"),
    *("solver_order", "solver_type", "solver_p", "algorithm_type", "lower_order_final", "euler_at_final"),
    *("predict_x0", "disable_corrector", "final_sigmas_type", "lambda_min_clipped", "sigma_min", "sigma_max"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
    *("flow_shift", "time_shift_type"),  # read only with use_flow_sigmas
    "tensor_format",  # of older diffusers: arrays of numpy or of torch
)
# settings that make the noise, or what the network is told of it, another one, with the value that does not
NEUTRAL = {
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
    "timestep_type": "discrete",
    "predict_epsilon": True,  # of older diffusers
}
# The settings of a noise schedule with their defaults, and those that are a choice among names.
_SETTINGS = {name: part.default for name, part in inspect.signature(DDPMScheduler).parameters.items()}
_CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    # a learned variance would be a second output of the network
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}


def read_flow(where: str, name: str, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flow that a scheduler's saved configuration describes: ``num_train_timesteps`` and ``shift``.

    Args:
        where: what messages begin with.
        name: the scheduler's class in diffusers.
        saved: ``scheduler_config.json``.

    Raises:
        UserError: it is no `FlowMatchEulerDiscreteScheduler` with a fixed shift, or a setting is out of range.
    """
    choose(f"{where}: scheduler", name, ("FlowMatchEulerDiscreteScheduler",))
    own = {key: value for key, value in saved.items() if not key.startswith("_") and value is not None}
    for key in ("use_dynamic_shifting", "invert_sigmas", "shift_terminal"):
        if own.get(key):
            raise UserError(f"{where}: {key}: {own[key]!r} makes another flow; only a fixed shift is known")
    steps, shift = own.get("num_train_timesteps", 1000), own.get("shift", 1.0)
    if type(steps) is not int or steps < 1 or not isinstance(shift, float | int) or not 0 < shift < math.inf:
        raise UserError(f"{where}: num_train_timesteps {steps!r} and shift {shift!r} must be numbers >= 1 and > 0")
    return {"prediction_type": "flow", "num_train_timesteps": steps, "shift": float(shift)}


def read_schedule(where: str, name: str, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the noise schedule that a scheduler's saved configuration describes.

    Args:
        where: what messages begin with.
        name: the scheduler's class in diffusers, whose own defaults stand in for what is not saved.
        saved: ``scheduler_config.json``.

    Returns:
        Every setting of the `DDPMScheduler` with the same forward process.

    Raises:
        UserError: the scheduler or a setting is not known here, or makes other noise than DDPM's.
    """
    for kind in (name, saved.get("_class_name", name)):
        if kind not in SCHEDULERS:
            raise UserError(
                f"{where} has a scheduler {kind}, whose noise may not be DDPM's; allowed: {', '.join(SCHEDULERS)}"
            )
    own = {key: value for key, value in saved.items() if not key.startswith("_") and value is not None}
    for key, value in own.items():
        if key in NEUTRAL:
            if value != NEUTRAL[key]:
                raise UserError(f"{where}: {key}: {value!r} makes other noise than DDPM's; allowed: {NEUTRAL[key]!r}")
        elif key not in SAMPLING and key not in _SETTINGS:
            raise UserError(f"{where}: {key}: not known, so that the noise is not; allowed: DDPM's own settings")
    defaults = inspect.signature(getattr(diffusers, name)).parameters
    settings = {key: parameter.default for key, parameter in defaults.items()} | own
    known = {key: value for key, value in settings.items() if key in _SETTINGS and value is not None}
    return complete_schedule(where, known)


def complete_schedule(key: str, schedule: Mapping[str, Any]) -> dict[str, Any]:
    """Check a noise schedule and add the defaults to it, so that a checkpoint does not depend on them.

    Args:
        key: what messages begin with.
        schedule: keyword arguments of `DDPMScheduler`.

    Raises:
        UserError: a setting is not known or out of range, or together they do not lead from images to noise.
    """
    for name, value in schedule.items():
        _check_setting(key, name, value)
    try:
        with torch.device("cpu"):  # whatever the caller's default is
            scheduler = DDPMScheduler(**schedule)
    except Exception as error:  # whatever the first misused setting leads to
        raise UserError(f"{key}: {dict(schedule)} does not make a noise schedule: {one_line(error)}") from error
    steps, kept = scheduler.config.num_train_timesteps, scheduler.alphas_cumprod
    # where nothing of the image is kept, x_0 does not follow from the noise
    possible = kept > 0 if scheduler.config.prediction_type == "epsilon" else kept >= 0
    if steps < 1 or len(kept) != steps or not (possible & (kept < 1)).all():
        raise UserError(
            f"{key}: {dict(schedule)} is no noise schedule; its betas must be num_train_timesteps numbers between 0 "
            "and 1, and with prediction_type epsilon leave a part of the image to the end"
        )
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_") and value is not None}


def _check_setting(key: str, name: str, value: Any) -> None:
    choose(key, name, _SETTINGS)
    default = _SETTINGS[name]
    if name in _CHOICES:
        choose(f"{key}.{name}", value, _CHOICES[name])
    elif default is not None and type(value) is not type(default) and (type(default), type(value)) != (float, int):
        raise UserError(f"{key}.{name}: {value!r} is not allowed; give a {type(default).__name__} such as {default}")
