"""Schedulers of diffusers: those of DDPM's noise are read as what they are and kept, all others are refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel

from sophon.errors import UserError
from sophon.files import read_json, write_json
from sophon.models import adapter_of, create
from sophon.models.noise import NEUTRAL, SAMPLING, SCHEDULERS, read_flow, read_schedule
from tests.models.unets import CLASSES, INPUT, NETWORK, config_of

# diffusers' own, in its schedulers' constructors
pytestmark = pytest.mark.filterwarnings("ignore:__array_")
NOISE: dict[str, dict[str, Any]] = {
    "its own defaults": {},
    "linear": {"num_train_timesteps": 20, "beta_start": 0.001, "beta_end": 0.3},
    "scaled": {"num_train_timesteps": 30, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"},
    "cosine": {"num_train_timesteps": 10, "beta_schedule": "squaredcos_cap_v2"},
    "given": {"num_train_timesteps": 3, "trained_betas": [0.1, 0.2, 0.3]},
}


def others() -> Iterator[str]:
    for name in dir(diffusers):
        if name.endswith("Scheduler") and not name.startswith("Flax") and name not in SCHEDULERS:
            yield name


@pytest.mark.parametrize(
    ("name", "noise"), [*((name, "scaled") for name in SCHEDULERS), *(("DDIMScheduler", noise) for noise in NOISE)]
)
def test_a_listed_scheduler_is_read_with_its_own_noise(name: str, noise: str) -> None:
    scheduler = getattr(diffusers, name)(**NOISE[noise])
    schedule = read_schedule("x", name, dict(scheduler.config))
    ours = DDPMScheduler(**schedule)
    torch.testing.assert_close(ours.alphas_cumprod, scheduler.alphas_cumprod)
    assert schedule["prediction_type"] == scheduler.config.prediction_type
    saved = {key: value for key, value in scheduler.config.items() if key in NOISE[noise]}
    assert read_schedule("x", name, saved) == schedule  # what is not saved is the class's default, not DDPM's


def test_any_other_scheduler_is_refused_by_name() -> None:
    for name in [*others(), "MyScheduler", None]:
        with pytest.raises(UserError, match=f"^x has a scheduler {name}, whose noise may not be DDPM's; allowed: DDPM"):
            read_schedule("x", name, {"_class_name": name, "num_train_timesteps": 10})


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas: True makes other noise"),
        ("DEISMultistepScheduler", {"use_dynamic_shifting": True}, "use_dynamic_shifting: True makes other noise"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type: 'continuous' makes other noise"),
        ("DDPMScheduler", {"predict_epsilon": False}, "predict_epsilon: False makes other noise"),
        ("DDPMScheduler", {"sigma_data": 0.5}, "sigma_data: not known, so that the noise is not"),
        ("UniPCMultistepScheduler", {"shift_terminal": 0.1}, "shift_terminal: not known"),
        ("DDIMScheduler", {"snr_shift_scale": 3.0}, "snr_shift_scale: not known"),
        ("DDIMScheduler", {"prediction_type": "flow_prediction"}, "prediction_type: 'flow_prediction' is not known"),
        ("HeunDiscreteScheduler", {"beta_schedule": "exp"}, "beta_schedule: 'exp' is not known"),
        ("DDPMScheduler", {"beta_schedule": "laplace"}, "beta_schedule: 'laplace' is not known"),
        ("DPMSolverMultistepScheduler", {"variance_type": "learned_range"}, "variance_type: 'learned_range'"),
        ("DDPMScheduler", {"rescale_betas_zero_snr": True}, "is no noise schedule"),
        ("DDIMScheduler", {"_class_name": "EDMEulerScheduler"}, "has a scheduler EDMEulerScheduler"),
        ("PNDMScheduler", {"beta_end": "0.02"}, "beta_end: '0.02' is not allowed; give a float"),
        ("PNDMScheduler", {"beta_end": 2.0}, "is no noise schedule"),
    ],
)
def test_settings_that_make_other_noise_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^x.*{message}") as caught:
        read_schedule("x", name, settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("DDPMScheduler", {}, "DDPMScheduler"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas: True makes another flow"),
        ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 0}, "num_train_timesteps 0 and shift 1.0 must be"),
        ("FlowMatchEulerDiscreteScheduler", {"shift": math.inf}, "shift inf must be"),
    ],
)
def test_what_is_no_flow_with_a_fixed_shift_is_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^x.*{message}"):
        read_flow("x", name, settings)


def test_a_schedule_that_ends_in_pure_noise_is_understood_where_the_network_can_say_what_it_hides() -> None:
    settings = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    schedule = read_schedule("x", "DDIMScheduler", settings)
    assert schedule["rescale_betas_zero_snr"]
    assert DDPMScheduler(**schedule).alphas_cumprod[-1] == 0


def test_settings_of_sampling_alone_and_nulls_pass() -> None:
    harmless = {**dict.fromkeys(SAMPLING), **NEUTRAL, "sigma_data": None, "use_karras_sigmas": True, "solver_order": 3}
    assert read_schedule("x", "DDPMScheduler", harmless) == read_schedule("x", "DDPMScheduler", {})


def saved_pipeline(folder: Path, kind: type, name: str, classes: int | None = None) -> None:
    torch.manual_seed(1)
    unet = UNet2DModel(**NETWORK, **INPUT, num_class_embeds=classes)
    kind(unet, DDPMScheduler()).save_pretrained(folder)
    more = {"lower_order_final": True} if "Singlestep" in name else {}
    scheduler = getattr(diffusers, name)(num_train_timesteps=60, **more)
    scheduler.save_pretrained(folder / "scheduler")
    index = read_json(folder / "model_index.json")
    write_json(folder / "model_index.json", {**index, "scheduler": ["diffusers", name]})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [("DPMSolverSinglestepScheduler", DDPMPipeline), ("DDIMScheduler", DDIMPipeline), ("PNDMScheduler", DDIMPipeline)],
)
def test_a_pipelines_own_sampler_is_written_back(tmp_path: Path, name: str, kind: type) -> None:
    saved_pipeline(tmp_path / "theirs", kind, name, 3)
    module, spec = create(config_of(weights=str(tmp_path / "theirs")), CLASSES)
    (tmp_path / "ours" / "unet").mkdir(parents=True)
    (tmp_path / "ours" / "scheduler").mkdir()
    adapter_of(spec).save(module, tmp_path / "ours")
    for file in ("model_index.json", "scheduler/scheduler_config.json"):
        assert (tmp_path / "ours" / file).read_text() == (tmp_path / "theirs" / file).read_text()
    loaded = kind.from_pretrained(tmp_path / "ours")
    assert type(loaded.scheduler).__name__ == ("DDIMScheduler" if kind is DDIMPipeline else name)
    place: dict[str, Any] = {}
    exec(adapter_of(spec).card().loading.replace("PATH", str(tmp_path / "ours")), place)
    assert place["images"].shape == (1, 1, 8, 8)
    assert torch.isfinite(place["images"]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "LDMPipeline"}, "is a LDMPipeline, which is not known; allowed: DDPMPipeline"),
        ({"_class_name": None}, "is a None"),
        ({"vqvae": ["diffusers", "VQModel"]}, "is made of .*vqvae.*; give a pipeline of a unet and a scheduler alone"),
        ({"scheduler": None}, "is made of unet"),
    ],
)
def test_a_pipeline_with_other_parts_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    saved_pipeline(tmp_path, DDPMPipeline, "DDIMScheduler")
    index = read_json(tmp_path / "model_index.json")
    write_json(tmp_path / "model_index.json", {**index, **changes})
    with pytest.raises(UserError, match=f"^model.weights: .*{message}"):
        create(config_of(weights=str(tmp_path)), CLASSES)
