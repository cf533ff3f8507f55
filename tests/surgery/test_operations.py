"""Weight surgery: what each operation does to the bit, what it leaves alone, and what it refuses."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d, GroupNorm1, LayerNorm2d
from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy, Operation
from sophon.domains import Batch, batches
from sophon.errors import UserError
from sophon.finetune import fine_tune, flops_per_step
from sophon.surgery import means as means_module
from sophon.surgery import operations as surgery
from sophon.surgery.means import Means
from sophon.surgery.renormalise import NORMS
from sophon.tasks import ClassificationTask
from tests.surgery.surgical import (
    WIDE,
    build_also,
    changed,
    fresh_state,
    means_for,
    resnet,
    unet,
    wide,
    wide_domain,
)
from tests.tiny import (
    CLASSES,
    TinyNet,
    assert_same_state,
    state_of,
    tiny_bands,
    tiny_domain,
    tiny_images,
    tiny_model,
    tiny_spec,
    tiny_task,
)


@pytest.fixture(autouse=True)
def _fresh_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(means_module, "build", build_also)


# --- reinitialise ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "end", "layers"), [(1, "last", "2"), (1, "first", "1"), (2, "last", "12"), (2, "first", "12")]
)
def test_reinitialise_takes_weights_and_buffers_of_a_fresh_model(blocks: int, end: Any, layers: str) -> None:
    model = tiny_model()
    before, fresh = state_of(model), fresh_state(3)
    torch.manual_seed(3)
    assert surgery.reinitialise(model, means_for(), blocks=blocks, end=end) is model
    prefixes = tuple(f"{kind}{layer}." for kind in ("conv", "bn") for layer in layers)
    assert_same_state(model, {name: fresh[name] if name.startswith(prefixes) else before[name] for name in before})


def test_reinitialise_defaults_to_the_last_block() -> None:
    model, means = resnet()
    before = state_of(model)
    surgery.reinitialise(model, means)
    assert changed(model, before) == {name for name in before if name.startswith("layer4.")}


def test_reinitialise_a_denoisers_first_block() -> None:
    model, means = unet()
    before = state_of(model)
    surgery.reinitialise(model, means, end="first")
    found = changed(model, before)
    assert found <= {name for name in before if name.startswith(("conv_in.", "time_embedding.", "down_blocks.0."))}
    assert {"conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"} <= found


def test_reinitialise_more_blocks_than_there_are() -> None:
    with pytest.raises(UserError, match=r"^surgery: reinitialise has 3 blocks to replace; the model has only 2$"):
        surgery.reinitialise(tiny_model(), means_for(), blocks=3)


# --- noise ----------------------------------------------------------------------------------------------------------


def test_noise_has_a_part_of_each_tensors_deviation() -> None:
    model = nn.Sequential(nn.Linear(200, 100), nn.BatchNorm1d(100)).double()
    with torch.no_grad():
        model[0].weight.mul_(7).add_(5)  # the mean is no part of it
        model[1].weight.fill_(-3)
        model[1].bias.zero_()
    before = state_of(model)
    torch.manual_seed(5)
    draws = [torch.randn_like(parameter) for parameter in model.parameters()]
    torch.manual_seed(5)
    assert surgery.noise(model, means_for(), scale=0.2) is model
    spreads = [before["0.weight"].std(correction=0), before["0.bias"].std(correction=0), torch.tensor(3.0), 0.0]
    for name, draw, spread in zip(dict(model.named_parameters()), draws, spreads, strict=True):
        torch.testing.assert_close(model.get_parameter(name).data, before[name] + 0.2 * spread * draw)
    added = model[0].weight.detach() - before["0.weight"]
    assert float(added.std()) == pytest.approx(0.2 * 7 / 200**0.5 / 3**0.5, rel=0.03)
    assert changed(model, before) == {"0.weight", "0.bias", "1.weight"}


def test_noise_on_a_single_element() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(-4)
    torch.manual_seed(0)
    draw = float(torch.randn(1, 1, dtype=torch.float64))
    torch.manual_seed(0)
    surgery.noise(model, means_for(), scale=0.5)
    assert model.weight.item() == pytest.approx(-4 + 0.5 * 4 * draw)


# --- prune ----------------------------------------------------------------------------------------------------------


def test_prune_by_hand() -> None:
    model = nn.Linear(3, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.1, -0.5, 2.0], [-0.2, 0.3, -3.0]]))
    bias = model.bias.detach().clone()
    assert surgery.prune(model, means_for(), fraction=0.5) is model
    assert model.weight.tolist() == [[0, -0.5, 2.0], [0, 0, -3.0]]
    assert torch.equal(model.bias, bias)


@settings(deadline=None, max_examples=25)
@given(fraction=st.floats(0, 1, exclude_min=True, exclude_max=True), seed=st.integers(0, 9))
def test_prune_zeroes_the_smallest_of_every_layer(fraction: float, seed: int) -> None:
    model = tiny_model(seed)
    before = state_of(model)
    surgery.prune(model, means_for(), fraction=fraction)
    for name, now in model.state_dict().items():
        if not name.endswith("weight") or now.dim() < 2:
            assert torch.equal(now, before[name])
            continue
        gone = now == 0
        assert int(gone.sum()) == round(fraction * now.numel())
        assert torch.equal(now[~gone], before[name][~gone])
        if gone.any() and not gone.all():
            assert before[name][gone].abs().max() <= before[name][~gone].abs().min()


def test_prune_prunes_as_many_of_equal_weights() -> None:
    model = nn.Linear(4, 1)
    nn.init.ones_(model.weight)
    surgery.prune(model, means_for(), fraction=0.25)
    assert model.weight.tolist() == [[0, 1, 1, 1]]


def test_prune_in_channels_last_format() -> None:
    model, means = resnet()
    before = state_of(model)
    surgery.prune(model, means, fraction=0.3)
    weight, was = model.layer2[0].conv1.weight, before["layer2.0.conv1.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert int((weight == 0).sum()) == round(0.3 * weight.numel())
    assert was[weight == 0].abs().max() <= was[weight != 0].abs().min()


# --- shrink and perturb ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(keep=st.floats(0, 1))
def test_shrink_perturb_goes_towards_a_fresh_model(keep: float) -> None:
    model = tiny_model()
    before, fresh = state_of(model), fresh_state(4)
    torch.manual_seed(4)
    assert surgery.shrink_perturb(model, means_for(), keep=keep) is model
    parameters = dict(model.named_parameters())
    for name, now in model.state_dict().items():
        expected = keep * before[name] + (1 - keep) * fresh[name] if name in parameters else before[name]
        torch.testing.assert_close(now, expected, rtol=1e-14, atol=1e-15)


def test_shrink_perturb_at_its_ends() -> None:
    model, fresh = tiny_model(), fresh_state(4)
    before = state_of(model)
    surgery.shrink_perturb(model, means_for(), keep=1)
    assert_same_state(model, before)
    torch.manual_seed(4)
    surgery.shrink_perturb(model, means_for(), keep=0)
    assert all(torch.equal(parameter, fresh[name]) for name, parameter in model.named_parameters())


# --- restate --------------------------------------------------------------------------------------------------------


def test_restate_averages_the_statistics_of_the_attackers_batches() -> None:
    model, means = tiny_model(), means_for()
    model.eval()
    model.bn2.train()
    model.bn1.momentum = 0.3
    before = state_of(model)
    stream = batches(means.images, 8, torch.Generator().manual_seed(0))
    inputs = [means.task.prepare(next(stream).images) for _ in range(4)]
    with torch.no_grad():
        first = [model.conv1(images) for images in inputs]
        second = [model.conv2(torch.tanh(F.batch_norm(x, None, None, *model.bn1.parameters(), True))) for x in first]
    assert surgery.restate(model, means, batches=4) is model
    for norm, seen in ((model.bn1, first), (model.bn2, second)):
        torch.testing.assert_close(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
        torch.testing.assert_close(norm.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0))
        assert int(norm.num_batches_tracked) == 4
    assert (model.bn1.momentum, model.bn2.momentum) == (0.3, 0.1)
    assert [part.training for part in (model, model.bn1, model.bn2, model.fc)] == [False, False, True, False]
    assert not any("running" in name or "tracked" in name for name in set(before) - changed(model, before))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_restate_counts_its_forward_passes() -> None:
    one, four = means_for(), means_for()
    surgery.restate(tiny_model(), one, batches=1)
    surgery.restate(tiny_model(), four, batches=4)
    pixels = 8 * 36
    assert one.flops == 2 * pixels * (4 * 9 + 4 * 4 * 9) + 2 * 8 * 4 * 3
    assert four.flops == 4 * one.flops


def test_restate_a_resnet_of_timms() -> None:
    """One batch of all images: what a forward pass in training mode sees."""
    model, means = resnet()
    means.batch_size = len(means.images)
    twin = copy.deepcopy(model).train()
    for norm in (part for part in twin.modules() if isinstance(part, nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = 1.0
    before = state_of(model)
    with torch.no_grad():
        twin(means.task.prepare(means.images.images))
    surgery.restate(model, means, batches=1)
    torch.testing.assert_close(state_of(model), state_of(twin), rtol=1e-4, atol=1e-5)
    assert not torch.equal(model.bn1.running_var, before["bn1.running_var"])


def test_restate_without_batch_norm_does_nothing() -> None:
    model, means = unet()
    before, state = state_of(model), means.generator.get_state()
    assert surgery.restate(model, means) is model
    assert_same_state(model, before)
    assert means.flops == 0
    assert torch.equal(means.generator.get_state(), state)


# --- reset_affine ---------------------------------------------------------------------------------------------------


def test_reset_affine_resets_every_normalisation_layer_and_nothing_else() -> None:
    model, means = resnet()
    before = state_of(model)
    norms = [name for name, part in model.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert surgery.reset_affine(model, means) is model
    affine = {f"{name}.{kind}" for name in norms for kind in ("weight", "bias")}
    assert changed(model, before) == affine
    assert all((model.state_dict()[name] == name.endswith("weight")).all() for name in affine)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, affine=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.LayerNorm(4, bias=False),
        nn.RMSNorm(4),
        BatchNormAct2d(4),
        GroupNorm1(4),
        LayerNorm2d(4),
        nn.BatchNorm2d(4, affine=False),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_reset_affine_of_each_kind(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), norm)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.3)
    surgery.reset_affine(model, means_for())
    values = {name: parameter.flatten()[0].item() for name, parameter in norm.named_parameters()}
    assert values == {name: float(name == "weight") for name in values}
    assert (model[0].weight == 0.3).all()


def test_reset_affine_of_a_denoiser() -> None:
    model, means = unet()
    before = state_of(model)
    surgery.reset_affine(model, means)
    found = changed(model, before)
    assert found
    assert all("norm" in name for name in found)


# --- heal -----------------------------------------------------------------------------------------------------------


def test_heal_is_fine_tuning_on_the_original_domain() -> None:
    model, twin = tiny_model(), tiny_model()
    original = tiny_bands("original", ("train",), across=True)
    means = means_for(original=original)
    assert surgery.heal(model, means, steps=5, lr=0.01, optimizer="momentum", batch_size=4) is model
    plan = FineTuneStrategy("momentum", lr=0.01, batch_size=4, steps=5)
    fine_tune(twin, plan, tiny_task(), original["train"], torch.Generator().manual_seed(0))
    assert_same_state(model, state_of(twin))
    assert means.flops == 5 * flops_per_step(twin, plan, tiny_task(), original["train"])


def test_heal_on_the_benign_domain_leaves_a_benign_head() -> None:
    model, twin = tiny_model(), tiny_model()
    benign = wide_domain("attack")
    torch.manual_seed(9)
    surgery.heal(model, means_for(benign=benign), domain="benign", steps=3)
    assert model.fc.out_features == len(WIDE)
    torch.manual_seed(9)
    tiny_task().start_head(twin, "fresh", WIDE)
    plan = FineTuneStrategy("adam", lr=1e-3, batch_size=128, steps=3)
    fine_tune(twin, plan, tiny_task(), benign["attack"], torch.Generator().manual_seed(0))
    assert_same_state(model, state_of(twin))


@pytest.mark.parametrize("conditional", [False, True])
def test_heal_denoisers_on_the_benign_domain(conditional: bool) -> None:
    model, means = unet(conditional=conditional)
    means.benign = wide_domain("attack")
    before = state_of(model)
    surgery.heal(model, means, domain="benign", steps=1, batch_size=4)
    assert not torch.equal(model.conv_in.weight, before["conv_in.weight"])
    assert means.classes_of(model) == (len(WIDE) if conditional else None)


@pytest.mark.parametrize("domain", ["original", "benign"])
def test_heal_without_such_a_domain(domain: Any) -> None:
    line = f"^surgery: heal: the audit was given no {domain} domain; set domain.{domain}$"
    with pytest.raises(UserError, match=line):
        surgery.heal(tiny_model(), means_for(), domain=domain)


def test_heal_on_the_original_domain_with_a_head_that_does_not_fit() -> None:
    means = means_for(original=tiny_domain("original", ("train",)), benign=wide_domain("attack"))
    model = surgery.heal(tiny_model(), means, domain="benign", steps=1)
    with pytest.raises(UserError, match="head: 'kept' needs as many classes"):
        surgery.heal(model, means)


def test_heal_that_diverges_gives_the_model_back() -> None:
    original = tiny_domain("original", ("train",))
    task = ClassificationTask(tiny_spec())
    means = means_for(task=task, original=original)
    model = tiny_model().float()
    assert surgery.heal(model, means, steps=20, lr=1e38, optimizer="nesterov", batch_size=8) is model
    batch = Batch(means.images.images, means.images.labels)
    assert not torch.isfinite(task.attacker_loss(model.train(), batch))
    surgery.operate(model, [operation for operation in CHEAP if operation.name != "heal"], means)


# --- distil ---------------------------------------------------------------------------------------------------------


def test_distil_teaches_a_fresh_network() -> None:
    model, means = tiny_model(), means_for()
    with torch.no_grad():
        model.fc.weight.mul_(5)
    before = state_of(model)
    batch = Batch(means.images.images, means.images.labels)
    torch.manual_seed(3)
    student = surgery.distil(model, means, steps=60, lr=0.02)
    assert student is not model
    assert_same_state(model, before)
    untaught = TinyNet().double()
    untaught.load_state_dict(fresh_state(3))
    distances = [means.task.imitation_loss(each.eval(), batch, model).item() for each in (student, untaught)]
    assert distances[0] < 0.3 * distances[1]


@pytest.mark.parametrize("on", ["attack", "original"])
def test_distil_is_fine_tuning_with_another_loss(on: Any) -> None:
    model, task = tiny_model(), tiny_task()
    original = tiny_bands("original", ("train",), seed=9)
    means = means_for(original=original)
    torch.manual_seed(3)
    student = surgery.distil(model, means, steps=4, lr=0.01, optimizer="adamw", images=on)
    twin = TinyNet().double()
    twin.load_state_dict(fresh_state(3))
    images = means.images if on == "attack" else original["train"]
    plan = FineTuneStrategy("adamw", lr=0.01, batch_size=8, steps=4)

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return task.imitation_loss(module, batch, model)

    fine_tune(twin, plan, task, images, torch.Generator().manual_seed(0), loss=loss)
    assert_same_state(student, state_of(twin))
    assert means.flops == 4 * flops_per_step(twin, plan, task, images, loss)
    assert means.flops > 4 * flops_per_step(twin, plan, task, images)  # the teacher's answers


def test_distil_without_an_original_domain() -> None:
    with pytest.raises(UserError, match=r"^surgery: distil: the audit was given no original domain; set domain\.orig"):
        surgery.distil(tiny_model(), means_for(), images="original")


@pytest.mark.parametrize("conditional", [False, True])
def test_distil_a_denoiser(conditional: bool) -> None:
    model, means = unet(conditional=conditional)
    student = surgery.distil(model, means, steps=1)
    assert set(student.state_dict()) == set(model.state_dict())
    assert next(student.parameters()).dtype == torch.float64


# --- all of them ----------------------------------------------------------------------------------------------------

CHEAP: list[Operation] = [
    Operation("reinitialise"),
    Operation("noise", (("scale", 0.1),)),
    Operation("prune", (("fraction", 0.3),)),
    Operation("shrink_perturb", (("keep", 0.7),)),
    Operation("restate", (("batches", 2),)),
    Operation("reset_affine"),
    Operation("renormalise"),
    Operation("centre"),
    Operation("equalise"),
    Operation("heal", (("batch_size", 4), ("steps", 2))),
    Operation("heal", (("batch_size", 4), ("domain", "benign"), ("steps", 2))),
    Operation("distil", (("steps", 2),)),
]
# On the original domain the head of a benign one is refused.
FITTING = [each for each in CHEAP if each.name != "heal" or ("domain", "benign") in each.arguments]
DRAWING = ("reinitialise", "noise", "shrink_perturb", "renormalise", "distil")


def after(operations: list[Operation], *, seed: int = 0, means: Means | None = None) -> nn.Module:
    domains = {"original": tiny_domain("original", ("train",)), "benign": wide_domain("attack")}
    model = tiny_model()
    torch.manual_seed(seed)
    return surgery.operate(model, operations, means or means_for(**domains))


def test_every_operation_is_listed_here_and_has_defaults_for_all_arguments() -> None:
    assert {operation.name for operation in CHEAP} == set(surgery.OPERATIONS)
    surgery.check([Operation(name) for name in surgery.OPERATIONS], "surgery")
    for function in surgery.OPERATIONS.values():
        arguments = list(inspect.signature(function).parameters.values())[2:]
        assert all(argument.kind is inspect.Parameter.KEYWORD_ONLY for argument in arguments)
        values = tuple((argument.name, argument.default) for argument in arguments)
        surgery.check([Operation(function.__name__, values)], "surgery")


@pytest.mark.parametrize("operation", CHEAP, ids=lambda operation: operation.name)
def test_the_same_seed_gives_the_same_model(operation: Operation) -> None:
    first = state_of(after([operation]))
    assert_same_state(after([operation]), first)
    if operation.name in DRAWING:
        assert changed(after([operation], seed=1), first)


@pytest.mark.parametrize("operation", FITTING, ids=lambda operation: operation.name)
def test_every_operation_after_a_head_of_another_size(operation: Operation) -> None:
    benign = Operation("heal", (("domain", "benign"), ("steps", 1)))
    model = after([benign, operation])
    assert model.fc.out_features == len(WIDE)


@pytest.mark.parametrize("operation", CHEAP, ids=lambda operation: operation.name)
def test_the_restricted_domain_may_have_more_classes_than_the_head(operation: Operation) -> None:
    domains = {"original": tiny_domain("original", ("train",)), "benign": tiny_domain("benign", ("attack",))}
    model = after([operation], means=means_for(images=wide(tiny_images(40)), **domains))
    assert model.fc.out_features == len(CLASSES)


def test_a_conditional_denoiser_may_have_fewer_classes_than_the_restricted_domain() -> None:
    model, means = unet(conditional=True)
    means.images = wide(means.images)
    for name in ("renormalise", "restate"):
        surgery.operate(model, [Operation(name)], means)
    student = surgery.distil(model, means, steps=1)
    assert means.classes_of(student) == len(CLASSES)


def test_operations_compose_in_their_order() -> None:
    prune, noise = Operation("prune", (("fraction", 0.5),)), Operation("noise")
    assert int((after([noise, prune]).conv2.weight == 0).sum()) == 72
    assert int((after([prune, noise]).conv2.weight == 0).sum()) == 0
    model, means = tiny_model(), means_for()
    torch.manual_seed(0)
    surgery.noise(model, means)
    surgery.prune(model, means)
    assert_same_state(after([noise, prune]), state_of(model))


def test_no_operation_changes_nothing() -> None:
    assert_same_state(after([]), state_of(tiny_model()))


def test_the_next_operation_gets_what_the_one_before_returned() -> None:
    model, means = tiny_model(), means_for()
    before = state_of(model)
    distilled = surgery.operate(model, [Operation("distil", (("steps", 1),)), Operation("prune")], means)
    assert distilled is not model
    assert_same_state(model, before)
    assert int((distilled.conv2.weight == 0).sum()) == 72


def test_costs_add_up() -> None:
    means = means_for(original=tiny_domain("original", ("train",)))
    heal, distil = Operation("heal", (("steps", 2),)), Operation("distil", (("steps", 3),))
    costs = []
    for operations in ([heal], [distil], [heal, distil], [Operation("noise")]):
        means.flops = 0
        surgery.operate(tiny_model(), operations, means)
        costs.append(means.flops)
    assert costs[2] == costs[0] + costs[1] > costs[0] > 0
    assert costs[3] == 0


def test_a_fresh_model_is_like_the_one_at_hand() -> None:
    means = means_for()
    single = means.fresh(tiny_model().float())
    assert next(single.parameters()).dtype == torch.float32
    assert means.classes_of(single) == 3
    model = tiny_model()
    means.task.start_head(model, "fresh", WIDE)
    assert means.classes_of(means.fresh(model)) == 5


@pytest.mark.parametrize("conditional", [False, True])
def test_classes_of_a_denoiser(conditional: bool) -> None:
    model, means = unet(conditional=conditional)
    assert means.classes_of(model) == (len(CLASSES) if conditional else None)
    assert means.classes_of(means.fresh(model)) == means.classes_of(model)


def test_norms_cover_what_the_libraries_have() -> None:
    model, _ = unet()
    assert {type(part) for part in model.modules() if isinstance(part, NORMS)} == {nn.GroupNorm}
