"""What the stages of removal do to the weights, whose answers they learn, and how the guard lets them."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sophon.api.manifests import information_path
from sophon.domains import Batch, LoadedDomain
from sophon.errors import GuardError, UserError
from sophon.protection.stage import Information
from sophon.protection.training import fresh
from sophon.stages import plan_of
from sophon.stages.distil import Distil, DistilConfig
from sophon.stages.noise import Noise, NoiseConfig
from sophon.stages.reinitialise import Reinitialise, ReinitialiseConfig
from sophon.stages.unlearn import Unlearn, UnlearnConfig
from sophon.tasks import ClassificationTask
from tests.protection.staged import METHOD, ORIGINAL, RESTRICTED, Scripted, context, rows, runner
from tests.tiny import assert_same_state, state_of, tiny_denoising, tiny_model, tiny_spec, tiny_task, tiny_unet

BATCH = Batch(RESTRICTED["query"].in_memory().images, RESTRICTED["query"].in_memory().labels)


def run_of(folder: Path, stages: dict[str, Any], values: list[float] | None = None, **rest: Any) -> Any:
    method = replace(METHOD, rounds=2, distillation=0.5, stages=stages)
    return runner(folder, Scripted(values or [], distillation=0.5), method=method, **rest)


@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.5), (1.0, 1.0)])
def test_noise_goes_towards_the_initialisers_draw(alpha: float, beta: float) -> None:
    model, at = tiny_model(), context(tiny_model())
    drawn = fresh(at)
    Noise(NoiseConfig(alpha=alpha, beta=beta)).step(at, 0)
    for name, value in at.model.named_parameters():
        part = alpha * (beta if value.dim() > 1 else 1.0)
        expected = (1 - alpha) * model.get_parameter(name) + part * drawn.get_parameter(name)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    assert Noise(NoiseConfig(alpha=alpha)).information(at).start == ("fresh" if alpha == 1 else "given")


@pytest.mark.parametrize("which", ["first_blocks", "last_blocks", "smallest", "agreeing"])
def test_reinitialise_replaces_what_it_names_and_nothing_else(which: str) -> None:
    model, at = tiny_model(), context(tiny_model())
    drawn, blocks = fresh(at), at.task.blocks(at.model)
    row = Reinitialise(ReinitialiseConfig(which=which, fraction=0.25)).step(at, 0)
    assert 0 < row["replaced"] < 1
    for name, value in at.model.named_parameters():
        old, new = model.get_parameter(name), drawn.get_parameter(name)
        if which.endswith("blocks"):
            chosen = blocks[0 if which == "first_blocks" else -1]
            inside = any(name == part or name.startswith(f"{part}.") for part in chosen)
            assert torch.equal(value, new if inside else old)
            continue
        changed = value != old
        assert torch.equal(value, torch.where(changed, new, old))
        assert int(changed.sum()) == (round(0.25 * value.numel()) if value.dim() > 1 else 0)
        if which == "smallest" and changed.any():
            assert old[changed].abs().max() <= old[~changed].abs().min()


@pytest.mark.parametrize("by", ["suppression_loss", "random_labels"])
def test_unlearn_takes_the_answers_on_the_restricted_domain_towards_a_guess(by: str) -> None:
    task = ClassificationTask(tiny_spec(), suppression_loss="klu", dtype=torch.float64)
    at = context(tiny_model(), task, replace(METHOD, ntr_lr=1e-2, rounds=5))
    at = replace(at, ntr_steps=10)
    stage = Unlearn(UnlearnConfig(by=by, weight=3.0))
    stage.prepare(at)

    def asked(model: nn.Module) -> float:
        return task.suppression_loss(copy.deepcopy(model).eval(), BATCH).item()

    with torch.no_grad():
        at.model.get_parameter("fc.weight").mul_(20)  # so that there are answers to lose

    before = asked(at.model)
    for number in range(5):
        stage.step(at, number)
    assert asked(at.model) < 0.5 * before


@pytest.mark.slow
def test_negative_guidance_erases_the_restricted_classes_of_a_conditional_denoiser() -> None:
    def part(domain: LoadedDomain, classes: tuple[str, ...]) -> LoadedDomain:
        sets = {
            name: images.relabelled(images.labels % len(classes), classes) for name, images in domain.splits.items()
        }
        return replace(domain, classes=classes, splits=sets)

    model, method = tiny_unet(conditional=True), replace(METHOD, ntr_lr=3e-3, ntr_steps=20, query_batch_size=24)
    at = context(
        copy.deepcopy(model), tiny_denoising(conditional=True), method, reference=model,
        original=part(ORIGINAL, ("a",)), restricted=(part(RESTRICTED, ("b", "c")),),
    )  # fmt: skip
    stage = Unlearn(UnlearnConfig(by="negative_guidance", weight=10.0))
    stage.check(at)
    stage.prepare(at)
    _, term, _ = stage.terms(at)
    batch = term.images.first(12)
    assert set(batch.labels.tolist()) == {1, 2}

    def missed() -> float:
        torch.manual_seed(0)
        return term.loss(at.model, batch).item()

    before = missed()
    stage.step(at, 0)
    assert missed() < 0.7 * before


def test_a_fresh_student_has_nothing_of_the_weights_that_it_replaces() -> None:
    students = []
    for seed in (0, 1):
        at = context(tiny_model(seed), Scripted(distillation=1.0))
        Distil(DistilConfig(student="fresh")).prepare(at)
        students.append(state_of(at.model))
    assert all(torch.equal(value, students[1][name]) for name, value in students[0].items())


def test_the_teacher_is_what_the_last_whole_stage_released(tmp_path: Path) -> None:
    """Across a kill, too: in the noise's tracks the teacher is a model of its own."""
    stages = {"unlearn": {}, "noise": {"alpha": 1.0}, "distil": {}}
    run, states = run_of(tmp_path, stages), {}

    def told(number: int) -> None:
        states[number] = state_of(run.context.model)
        if number == 4:
            raise KeyboardInterrupt

    run.tracker.told = told
    with pytest.raises(KeyboardInterrupt):
        run.run()
    for each in (run, run_of(tmp_path, stages)):
        assert_same_state(each.context.teacher, states[2])
        assert rows(each, "round")[2:3] == [(3,)]
    run.tracker.told = lambda number: None
    run_of(tmp_path, stages).run()


def test_the_guard_lets_noise_pass_but_not_what_comes_of_it(tmp_path: Path) -> None:
    """Measured: the reference, two looks at what is unlearnt, the noise, and the first look at the student."""
    stages = {"unlearn": {}, "noise": {}, "distil": {"rounds": 3}}
    run = run_of(tmp_path / "back", stages, [50, 50, 50, 10, 20, 50, 30])
    run.run()
    assert rows(run, "accepted", "repaired") == [(v, False) for v in (True, True, False, False, True, False)]
    assert (run.at.rollbacks, run.at.good_round, run.at.whole) == (0, 5, False)

    lost = run_of(tmp_path / "lost", stages, [50, 50, 50, 10, 20, 20, 30])
    with pytest.raises(GuardError, match=r"^guard.tolerance: no round kept"):
        lost.run()
    with pytest.raises(GuardError):
        lost.released()


def test_a_student_may_stop_as_soon_as_it_is_within_tolerance(tmp_path: Path) -> None:
    stages = {"distil": {"student": "fresh", "until": "tolerance", "rounds": 9}, "alternate": {}}
    run = run_of(tmp_path, stages, [50, 10, 50])
    run.run()
    assert rows(run, "stage") == [("distil",)] * 2 + [("alternate",)] * 2
    assert run.at.ends == [2, 4]


@pytest.mark.parametrize(
    ("stages", "changes", "words"),
    [
        ({"unlearn": {"labels": 0.0}}, {}, r"^method\.stages\.unlearn\.labels: 0 is not allowed with"),
        ({"unlearn": {"by": "negative_guidance"}}, {}, r"^method\.stages\.unlearn\.by: .* needs head=kept and a"),
        ({"distil": {}}, {"distillation": 0.0}, r"^method\.distillation: 0 is not allowed with the stage distil"),
        ({"distil": {"optimizer": "none"}}, {}, r"^method\.stages\.distil\.optimizer: "),
        ({"distil": {"optimizer": "muon"}}, {}, r"^method\.stages\.distil\.optimizer: 'muon' is not allowed"),
        ({"noise": {"blocks": 9}}, {}, r"^method\.stages\.noise\.blocks: 9 is not allowed; the model has "),
        ({"reinitialise": {"blocks": 9}}, {}, r"^method\.stages\.reinitialise\.blocks: 9 is not allowed"),
    ],
)
def test_refusals(stages: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    method = replace(METHOD, stages=stages, **{"distillation": 0.0 if "unlearn" in stages else 1.0} | changes)
    task = Scripted(distillation=method.distillation)

    def check() -> None:
        [planned] = plan_of(method, lambda _: task)
        planned.stage.check(context(tiny_model(), task, planned.method))

    with pytest.raises(UserError, match=words) as caught:
        check()
    assert "\n" not in str(caught.value)


def test_agreeing_gradients_of_a_loss_that_reads_labels_need_an_output_a_class() -> None:
    domain = replace(RESTRICTED, classes=("a", "b", "c", "d"))
    at = context(tiny_model(), tiny_task("negative_ce"), restricted=[domain])
    with pytest.raises(UserError, match=r"^head: 'kept' needs as many classes as the model has, but the model has 3"):
        Reinitialise(ReinitialiseConfig(which="agreeing")).check(at)


@pytest.mark.parametrize(("loss", "reads"), [("negative_ce", ("images", "labels")), ("klu", ("images",))])
def test_agreeing_gradients_read_what_their_loss_reads(loss: str, reads: tuple[str, ...]) -> None:
    at, stage = context(tiny_model(), tiny_task(loss)), Reinitialise(ReinitialiseConfig(which="agreeing"))
    stage.check(at)
    assert stage.information(at).restricted == reads


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (Unlearn(UnlearnConfig(head="probed")), r"unlearn\.head: 'probed' is not allowed for a model without a head"),
        (Unlearn(UnlearnConfig(by="negative_guidance")), r"unlearn\.by: 'negative_guidance' needs head=kept and a "),
        (Distil(DistilConfig(features=1.0)), r"distil\.features: this model has no features"),
    ],
)
def test_what_a_denoiser_cannot_do(stage: Any, words: str) -> None:
    images = replace(ORIGINAL, splits={"train": ORIGINAL["train"], "val": ORIGINAL["val"]})
    at = context(tiny_unet(), tiny_denoising(), replace(METHOD, distillation=1.0), original=images)
    with pytest.raises(UserError, match=words):
        stage.check(at)


FRESH, READS = Information("fresh", ("images",), (), "stage before"), Information()


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ({"unlearn": READS}, "nothing bounds what they still hold"),
        ({"unlearn": READS, "distil": FRESH}, "trained on original images alone: what they hold"),
        ({"distil": FRESH, "mine": replace(FRESH, start="given", original=("labels",))}, "original images and labels"),
        ({"distil": FRESH, "alternate": READS}, "and on restricted images in the stage alternate"),
        (
            {"distil": FRESH, "distance": replace(FRESH, start="given", teacher="reference, weights alone")},
            "or through the unprotected weights, which the stage distance reads",
        ),
    ],
)
def test_the_information_path_in_words(stages: dict[str, Information], words: str) -> None:
    assert words in information_path({name: asdict(each) for name, each in stages.items()})


def test_what_damages_is_guarded_where_it_comes_last(tmp_path: Path) -> None:
    with pytest.raises(GuardError):
        run_of(tmp_path, {"noise": {}}, [50, 10, 10]).run()
