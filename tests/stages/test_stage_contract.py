"""What every stage has to hold, alone and in a row: going on equals never having stopped, and nothing leaks."""

from __future__ import annotations

import copy
import json
import random
import signal
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sophon.config import MethodConfig
from sophon.domains import ImageSet, LoadedDomain
from sophon.protection.runner import Runner
from sophon.tasks import ClassificationTask, DenoisingTask
from tests.protection.staged import METHOD, ORIGINAL, RESTRICTED, SAMPLER, runner
from tests.stages.small_resnet import colours, small_resnet
from tests.stages.test_runner import SHRINK
from tests.tiny import slow, state_of, tiny_model, tiny_spec, tiny_unet, tiny_unet_spec


class Swaying:
    """Accepts, repairs and takes back by how many batches BatchNorm saw; the weights leave their trace."""

    def evaluate(self, model: nn.Module, images: ImageSet) -> float:
        counts = [int(value) for name, value in model.named_buffers() if name.endswith("num_batches_tracked")]
        weights = sum(float(parameter.detach().double().sum()) for parameter in model.parameters())
        return 1000 + (10.0 if counts and -counts[0] % 12 >= 5 else 0.0) + 1e-9 * weights


class Classifying(Swaying, ClassificationTask):
    pass


class Denoising(Swaying, DenoisingTask):
    pass


LONG = replace(METHOD, rounds=6, fts_steps=2, attackers=1, fts_max_norm=1.0, distillation=0.5)
POOLED = replace(LONG, pool=3, chunk=2, fts_original_weight=0.5, schedule="cosine", query_every=2)
HARDENED = replace(
    POOLED, fixed_norms="channel", curriculum="bandit", attackers=2,
    objectives={"suppression": {}, "condition": {"weight": 0.1}},
)  # fmt: skip
MIXED = replace(
    SAMPLER, optimizers={"adam": [1e-3, 1e-1], "momentum": [1e-3, 1e-1]}, steps=[1, 9], scopes=["all", "head"]
)
OPERATING = replace(MIXED, surgeries=[[], [{"operation": "reset_affine"}], [{"operation": "prune"}]])
INVERTED = LoadedDomain(
    "inverted",
    RESTRICTED.classes,
    {name: replace(part, images=255 - part.images) for name, part in RESTRICTED.splits.items()},
    {},
)
COORDINATES = replace(METHOD, rounds=5, ntr_augmentation="none", schedule="cosine", distillation=1.0)
UNLEARN = replace(METHOD, rounds=4, distillation=0.5)
FRESH = {"student": "fresh", "labels": 0.5, "features": 0.1, "optimizer": "adamw", "schedule": "warmup_cosine"}
REPARAMETERISE = {"reparameterise": {"gains": [10.0], "spread": 16.0}}


def _tiny(kind: torch.dtype = torch.float64, layout: torch.memory_format | None = None, **rest: Any) -> dict[str, Any]:
    model = tiny_model().to(kind)
    model = model.to(memory_format=layout) if layout else model
    return {
        "model": model,
        "task": Classifying(tiny_spec(), suppression_loss="klu", dtype=kind, distillation=0.5),
        "method": LONG,
        "tolerance": 4.0,
    } | rest


def _unet(conditional: bool, **rest: Any) -> dict[str, Any]:
    """Its losses draw noise and timesteps from torch's global generator, which another process finds elsewhere."""
    spec, heads = tiny_unet_spec(conditional=conditional), ["kept", "fresh", "probed"] if conditional else ["kept"]
    task = Denoising(spec, suppression_loss="dos", distillation=0.5, suppression_timesteps=0.4, dtype=torch.float64)
    method = replace(LONG, rounds=4, fts_steps=1, probe_steps=1)
    sampler = replace(SAMPLER, steps=[2, 3], heads=heads)
    return {"model": tiny_unet(conditional=conditional), "task": task, "method": method, "sampler": sampler} | rest


def _resnet(method: MethodConfig, **rest: Any) -> dict[str, Any]:
    model, task = small_resnet(Classifying, suppression_loss="klu", distillation=1.0)
    domains = {"original": colours(ORIGINAL), "restricted": [colours(RESTRICTED)]}
    return {"model": model, "task": task, "method": method, "tolerance": 4.0, "sampler": SAMPLER, **domains} | rest


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "alternate": lambda: _tiny(sampler=replace(SAMPLER, heads=["kept", "fresh", "probed"])),
    "alternate, channels last": lambda: _tiny(torch.float32, torch.channels_last),
    "alternate, pool": lambda: _tiny(torch.float32, method=POOLED, sampler=MIXED, patience=1),
    "alternate, all at once": lambda: _tiny(method=HARDENED, sampler=OPERATING, restricted=[RESTRICTED, INVERTED]),
    "alternate, denoiser": lambda: _unet(False),
    "alternate, conditional denoiser with a pool": lambda: _unet(
        True, method=replace(POOLED, rounds=4, fts_steps=1, probe_steps=1, attackers=2, chunk=1)
    ),
    "reparameterise": lambda: _resnet(replace(COORDINATES, stages=REPARAMETERISE)),
    "unlearn": lambda: _tiny(method=replace(UNLEARN, stages={"unlearn": {"weight": 0.5}})),
    "unlearn, probed": lambda: _tiny(
        restricted=[RESTRICTED, INVERTED],
        method=replace(UNLEARN, stages={"unlearn": {"head": "probed", "labels": 0.0, "schedule": "warmup_cosine"}}),
        task=Classifying(tiny_spec(), suppression_loss="mlac", dtype=torch.float64, distillation=0.5),
    ),
    "unlearn, denoiser": lambda: _unet(True, method=replace(UNLEARN, stages={"unlearn": {}})),
    "undo": lambda: _tiny(method=replace(UNLEARN, rounds=3, stages={"unlearn": {}, "noise": {}, "distil": {}})),
    "undo, denoiser": lambda: _unet(
        False, method=replace(UNLEARN, rounds=2, stages={"unlearn": {}, "noise": {"alpha": 0.3}, "distil": {}})
    ),
    "unlearn, then distil into fresh weights": lambda: _tiny(
        method=replace(UNLEARN, rounds=3, stages={"unlearn": {}, "distil": FRESH}), tolerance=20.0
    ),
    "reinitialise, then distil, then alternate": lambda: _tiny(
        method=replace(
            UNLEARN,
            rounds=2,
            stages={
                "blocks": {"stage": "reinitialise"},
                "smallest": {"stage": "reinitialise", "which": "smallest", "fraction": 0.2},
                "agreeing": {"stage": "reinitialise", "which": "agreeing", "fraction": 0.1},
                "distil": {},
                "alternate": {},
            },
        ),
        tolerance=20.0,
    ),
    "distance": lambda: _tiny(method=replace(UNLEARN, stages={"distance": {"at_most": 0.5}})),
    "a user's own, then alternate": lambda: _tiny(
        method=replace(LONG, rounds=3, stages={"shrink": SHRINK, "alternate": {}}), tolerance=20.0
    ),
    "reparameterise, then alternate": lambda: _resnet(
        replace(COORDINATES, rounds=2, stages=REPARAMETERISE | {"alternate": {"ntr_lr": 1e-4}}), tolerance=20.0
    ),
}
FAST = ("alternate", "alternate, pool", "a user's own, then alternate", "unlearn, probed", "undo", "distance")
every_stage = pytest.mark.parametrize("case", slow(CASES, CASES.keys() - set(FAST)))


def run_of(case: str, folder: Path, told: Callable[[int], object] = lambda number: None) -> Runner:
    folder.mkdir(exist_ok=True)
    return runner(folder, told=told, **{"every": 2, "tolerance": 1e6} | CASES[case]())


def everything(run: Runner) -> dict[str, Any]:
    tensors, data = run.stage.state(run.context)
    return {
        "model": state_of(run.context.model),
        "good": dict(run.guard.good),
        "stage": dict(tensors),
        "data": data,
        "at": asdict(run.at),
    }


def assert_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal(found[key], value)
    else:
        assert found == expected


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Any], nn.Module]]:
    """Return what a case comes to if nobody stops it, and what it releases."""
    done: dict[str, tuple[dict[str, Any], nn.Module]] = {}

    def run(case: str) -> tuple[dict[str, Any], nn.Module]:
        if case not in done:
            torch.set_num_threads(1)
            one = run_of(case, tmp_path_factory.mktemp("whole"))
            released = one.run()
            done[case] = everything(one), released
        return done[case]

    return run


Whole = Callable[[str], tuple[dict[str, Any], nn.Module]]


@every_stage
def test_stopped_after_every_round(case: str, whole: Whole, tmp_path: Path) -> None:
    expected, released = whole(case)
    rounds = expected["at"]["round"]
    for number in range(1, rounds):
        torch.manual_seed(number)
        torch.rand(number)
        run = run_of(case, tmp_path, lambda _: signal.raise_signal(signal.SIGTERM))
        assert run.at.round == number - 1
        with pytest.raises(KeyboardInterrupt):
            run.run()
    run = run_of(case, tmp_path)
    assert_equal(run.run().state_dict(), released.state_dict())
    assert_equal(everything(run), expected)
    again = run_of(case, tmp_path, lambda _: pytest.fail("a finished run has no rounds left"))
    assert_equal(again.run().state_dict(), released.state_dict())
    assert again.at == run.at


class KilledError(Exception):
    pass


@every_stage
def test_killed_before_a_round_is_saved(case: str, whole: Whole, tmp_path: Path) -> None:
    """In the first round, of which nothing is there yet, or in the fourth."""
    expected, released = whole(case)
    at = 1 if case == "alternate" else 4

    def told(number: int) -> None:
        torch.rand(number)  # whatever a tracker may draw
        if number == at:
            raise KilledError

    with pytest.raises(KilledError):
        run_of(case, tmp_path, told).run()
    run = run_of(case, tmp_path)
    assert run.at.round < at
    assert_equal(run.run().state_dict(), released.state_dict())
    assert_equal(everything(run), expected)


@every_stage
def test_the_release_is_an_ordinary_model_of_the_same_architecture(case: str, whole: Whole) -> None:
    _, released = whole(case)
    settings = CASES[case]()
    reference, task = settings["model"], settings["task"]
    assert [type(part) for part in released.modules()] == [type(part) for part in reference.modules()]
    assert {n: v.shape for n, v in released.state_dict().items()} == {
        n: v.shape for n, v in reference.state_dict().items()
    }
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in released.modules())
    assert all(value.isfinite().all() for value in released.state_dict().values())
    assert any(not torch.equal(value, reference.state_dict()[name]) for name, value in released.state_dict().items())
    loaded = copy.deepcopy(reference)
    loaded.load_state_dict(released.state_dict())
    images = settings.get("original", ORIGINAL)["val"]
    torch.manual_seed(0)
    one = type(task).__mro__[2].evaluate(task, released, images)
    assert one == type(task).__mro__[2].evaluate(task, loaded, images)


@every_stage
def test_a_state_is_tensors_and_plain_data(case: str, whole: Whole) -> None:
    expected, _ = whole(case)
    assert all(isinstance(value, Tensor) and not value.requires_grad for value in expected["stage"].values())
    assert json.loads(json.dumps(expected["data"], allow_nan=False)) == expected["data"]


@every_stage
def test_the_guard_repairs_and_takes_back(case: str, whole: Whole) -> None:
    """Where it is told by BatchNorm; so that what other tests compare has seen both."""
    expected, _ = whole(case)
    looks = [row for row in expected["at"]["history"] if "accepted" in row]
    assert looks[-1]["round"] == expected["at"]["round"]
    assert any(row["accepted"] for row in looks)
    if case in ("alternate", "alternate, pool"):
        assert any(row["repaired"] for row in looks)
        assert expected["at"]["rollbacks"]


@every_stage
def test_nothing_leaks(case: str, tmp_path: Path) -> None:
    def outside() -> list[Any]:
        return [
            random.getstate(), str(np.random.get_state()), torch.get_num_threads(), torch.get_default_dtype(),
            torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), list(warnings.filters),
            signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM),
        ]  # fmt: skip

    torch.set_num_threads(1)
    before = outside()
    run = run_of(case, tmp_path)
    reference = run.context.reference
    weights = state_of(reference)
    run.run()
    assert outside() == before
    assert_equal(dict(reference.state_dict()), weights)
