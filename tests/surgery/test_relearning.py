"""Weight surgery that runs the network: restate, heal and distil against the same steps by hand, and their cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy
from sophon.domains import Batch, batches
from sophon.errors import UserError
from sophon.finetune import fine_tune, flops_per_step
from sophon.surgery import operations as surgery
from sophon.tasks import ClassificationTask
from tests.surgery.surgical import WIDE, changed, fresh_state, means_for, wide_domain
from tests.tiny import TinyNet, assert_same_state, state_of, tiny_bands, tiny_domain, tiny_model, tiny_spec, tiny_task

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


# --- distil ---------------------------------------------------------------------------------------------------------


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
