"""What there is to call from Python: `sophon.protection`, `audit`, `load` and `adapt`."""

from __future__ import annotations

import os
import random
import signal
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import sophon
from sophon.api.calls import audit, load, protect
from sophon.errors import UserError
from sophon.tracking import Tracker
from tests.models.own import GroupNormNet
from tests.tiny import CLASSES, tiny_images

# nobody has trained the tests' models
pytestmark = pytest.mark.filterwarnings("ignore:.*no better than a guess")

METHOD = {"name": "tiny", "rounds": 4, "ntr_steps": 2, "ntr_batch_size": 8, "query_batch_size": 8}
ATTACKERS = sophon.Attackers(optimizers={"adam": [1e-3, 1e-2]}, batch_sizes=[8], steps=[1, 2], heads=["kept", "fresh"])
GUARD = sophon.Guard(every=1, tolerance=100.0)
ATTACKS = {
    "eval_points": 2,
    "masking": {"heads": []},
    "strategies": {"adam": {"optimizer": "adam", "lr": 0.01, "head": "fresh", "batch_size": 8, "steps": 2}},
}


def arrays(seed: int, per_class: int = 24) -> tuple[np.ndarray, list[str]]:
    """Return images uint8 [N, H, W] and the names of their classes."""
    images = tiny_images(seed, per_class)
    return images.batch(torch.arange(len(images))).images[:, 0].numpy(), [CLASSES[k] for k in images.labels.tolist()]


ORIGINAL = sophon.Domain(arrays(0), arrays(1, 6), name="bands", val_fraction=0.3)
RESTRICTED = sophon.Domain(arrays(2), arrays(3, 6), name="others")


def own_model(seed: int = 0, mean: float = 0.5) -> Any:
    torch.manual_seed(seed)
    net = GroupNormNet(classes=len(CLASSES)).requires_grad_(False)  # as its owner may have frozen it
    return sophon.adapt(net, head="fc", image_size=8, channels=1, mean=[mean], std=[0.5], classes=CLASSES)


run = partial(protect, original=ORIGINAL, restricted=RESTRICTED, method=METHOD, attackers=ATTACKERS, guard=GUARD)


attack = partial(audit, own_model(), own_model(), ORIGINAL, RESTRICTED)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, in which nothing may be left that was not asked for."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_model_in_memory_is_protected_saved_loaded_without_us_and_audited(nowhere: Path) -> None:
    adapted = own_model()
    before = GroupNormNet(classes=len(CLASSES))
    before.load_state_dict(adapted.model.state_dict())
    result = run(adapted)
    assert same(adapted.model, before)
    assert not same(result.model, before)
    assert [row["round"] for row in result.history] == [1, 2, 3, 4]
    assert result.manifest["intactness"]["before"].keys() == {"val", "test"}
    assert not list(nowhere.iterdir())

    assert repr(result).endswith(", 4 rounds)")
    result.save("release")
    alone = GroupNormNet(classes=len(CLASSES))
    alone.load_state_dict(load_file("release/model.safetensors"))
    assert same(alone, result.model)
    loaded = load("release")
    assert loaded.sha256 == loaded.manifest["weights_sha256"]

    report = audit(result, attacks=ATTACKS)
    assert repr(report) == f"Audited({report.verdict})"
    assert sorted(zip(report.table["attack"], report.table["role"], strict=True)) == [
        ("adam", "protected"),
        ("adam", "scratch"),
        ("adam", "unprotected"),
    ]
    report.to_html("report.html")
    assert "<html" in Path("report.html").read_text()
    # what was written and what is in memory are attacked alike, and a part of it is known either way
    more = audit("release", adapted, ORIGINAL, RESTRICTED, attacks=ATTACKS, filtered=own_model(1))
    assert more.report.results.best_filtered == "filtered"
    again = more.table[more.table["role"] != "filtered"]
    assert len(again) < len(more.table)
    assert report.table["test"].tolist() == again["test"].tolist()
    assert report.table["exposure"].tolist() == again["exposure"].tolist()
    assert {path.name for path in nowhere.iterdir()} == {"release", "report.html"}


@pytest.mark.slow
def test_a_run_that_was_interrupted_goes_on_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(own_model())

    def interrupting(self: Tracker, values: Any, step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    genuine = Tracker.log
    monkeypatch.setattr(Tracker, "log", interrupting)
    with pytest.raises(KeyboardInterrupt):
        run(own_model(), run_dir="kept")
    monkeypatch.setattr(Tracker, "log", genuine)
    for _ in range(2):  # going on, and already done
        assert same(run(own_model(), run_dir="kept").model, whole.model)
    assert run(own_model(), run_dir="kept").history == whole.history
    with pytest.raises(UserError, match=r"^run_dir: 'kept' was made with seed=0, now seed=1"):
        run(own_model(), run_dir="kept", seed=1)


def state() -> tuple[Any, ...]:
    signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    python, numpy = random.getstate(), repr(np.random.get_state())
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch_state = torch.get_rng_state().tolist(), torch.get_num_threads(), torch.is_grad_enabled()
    return python, numpy, torch_state, tf32, signals, list(warnings.filters), dict(os.environ)


@pytest.mark.slow
def test_nothing_global_is_changed_by_a_call_or_changes_it() -> None:
    model = own_model()
    before = state()
    result = run(model)
    assert state() == before
    audit(result, attacks=ATTACKS)
    assert state() == before
    with pytest.raises(UserError):
        run(model, method="nobody's")
    assert state() == before
    # nor does anything global matter
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    assert same(run(own_model()).model, result.model)


def test_a_model_that_guesses_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"^model: accuracy on .* no better than a guess"):
        run(own_model())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: run("nowhere"), r"^model: 'nowhere' does not exist"),
        (lambda: run("m" * 300), r"^model: cannot read .*File name too long"),
        (lambda: run(3), r"^model: a int is not allowed; give a torch.nn.Module or a folder"),
        (lambda: run(GroupNormNet()), r"image_size"),
        (lambda: run(own_model(), original="nowhere"), r"nowhere"),
        (lambda: run(own_model(), original=[1, 2]), r"original"),
        (lambda: run(own_model(), restricted=[RESTRICTED, RESTRICTED]), r"^restricted: several .* the same name"),
        (lambda: run(own_model(), original=sophon.Domain(arrays(0, 6), classes=["a", "b"])), "classes"),
        (lambda: run(own_model(), method="sofon_klu"), r"^method: 'sofon_klu' is not known.*sophon_klu"),
        (lambda: run(own_model(), method={"name": "x", "rouns": 3}), r"^method.rouns: .*rounds"),
        (lambda: run(own_model(), settings={"method.rounds": 0}), r"^method.rounds: 0"),
        (lambda: run(own_model(), settings={"method.rounds": "many"}), r"^method.rounds: "),
        (lambda: run(own_model(), settings={"metod.rounds": 1}), r"^settings: 'metod.rounds' is not allowed.*method"),
        (lambda: run(own_model(), settings={"seed": 1}), r"^settings: 'seed' is not allowed"),
        (lambda: attack(settings={"attack.shards": 2}), r"^attack.shards: a call runs the whole audit"),
        (lambda: attack(settings={"workers": 2}), r"^workers: a model or data in memory cannot be handed"),
        (lambda: run(own_model(), guard={"tolerance": -1}), r"^guard.tolerance: -1"),
        (lambda: run(own_model(), attackers=sophon.Attackers(optimizers={"adamm": [1, 2]})), "adamm"),
        (lambda: run(own_model(), device="gpu"), r"^device: 'gpu' is not known"),
        (lambda: audit(own_model()), r"^reference, original, restricted: missing"),
        (lambda: audit(own_model(), own_model(1), ORIGINAL, [RESTRICTED, ORIGINAL]), r"^restricted: .* are several"),
        (
            lambda: audit(own_model(), own_model(mean=0.4), ORIGINAL, RESTRICTED),
            "of mean it has 0.4, ",
        ),
        (lambda: attack(attacks="standart"), r"^attacks: .*standard"),
        (
            lambda: sophon.Guard(tolerence=1),
            r"^tolerence: no such argument \(did you mean tolerance\?\); allowed: every",
        ),
        (lambda: sophon.Domain(arrays(0, 6), clas_names="ab"), r"^clas_names: no such argument \(did you mean class_n"),
        (lambda: load("nowhere"), r"^folder: 'nowhere' is not a folder"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_anything_is_written(
    nowhere: Path, call: Callable[[], object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert not list(nowhere.iterdir())


def test_the_names_are_there_without_importing_anything() -> None:
    assert set(sophon.__all__) >= {"protect", "audit", "load", "adapt", "Domain", "Guard", "Attackers", "UserError"}
    for name in sophon.__all__:
        assert callable(getattr(sophon, name)), name
    with pytest.raises(AttributeError, match="has no attribute 'protekt'"):
        sophon.protekt  # noqa: B018
