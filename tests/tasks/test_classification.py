"""The classification task: what it normalises, measures, trains and replaces, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sophon.domains import MemoryImages
from sophon.losses import SUPPRESSION_LOSSES, distillation
from sophon.models import ModelSpec, build
from sophon.tasks import ClassificationTask
from tests.tiny import CLASSES, assert_same_state, state_of, tiny_batches, tiny_model, tiny_spec, tiny_task

BATCH = tiny_batches(5, 1)[0]


class Constant(nn.Module):
    """Says of each image which class its first pixel names, and counts the sizes of the batches it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.seen.append(len(images))
        return nn.functional.one_hot(images[:, 0, 0, 0].round().long(), len(CLASSES)).double()


def test_prepare_normalises_with_the_models_statistics() -> None:
    spec = ModelSpec("timm", "x", CLASSES, 3, 2, (0.5, 0.25, 0.0), (0.5, 0.25, 2.0))
    images = torch.tensor([0, 51, 102, 255], dtype=torch.uint8).view(1, 1, 2, 2).repeat(2, 3, 1, 1)
    ready = ClassificationTask(spec).prepare(images)
    assert ready.dtype == torch.float32
    assert ready.shape == (2, 3, 2, 2)
    assert ready.is_contiguous(memory_format=torch.channels_last)
    unit = torch.tensor([0.0, 0.2, 0.4, 1.0]).view(2, 2)
    for channel, expected in enumerate([(unit - 0.5) / 0.5, (unit - 0.25) / 0.25, unit / 2]):
        torch.testing.assert_close(ready[:, channel], expected.expand(2, 2, 2))


def test_accuracy_by_hand_counts_the_short_last_batch() -> None:
    spec = ModelSpec("torchvision", "tiny", CLASSES, 1, 1, (0.0,), (1 / 255,))  # pixels come through as they are
    task, model = ClassificationTask(spec, dtype=torch.float64), Constant()
    task.evaluation_batch_size = 3
    said = torch.tensor([0, 1, 2, 0, 1, 2, 0], dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0, 2, 2, 1])  # wrong at 4 and at 6, the only image of the last batch
    images = MemoryImages(said.view(-1, 1, 1, 1), labels, CLASSES)
    assert task.evaluate(model, images) == pytest.approx(100 * 5 / 7)
    assert model.seen == [3, 3, 1]
    assert model.training
    labels[6] = 0
    assert task.measure(model, images) == pytest.approx((100 * 6 / 7, 100 * (8 / 11 * 3 / 11 / 11) ** 0.5, 7))
    labels[:] = said
    assert task.measure(model, images).standard_error > 10  # seven of seven say little
    assert (task.metric.name, task.metric.unit, task.metric.higher_is_better) == ("accuracy", "%", True)


@pytest.mark.parametrize("loss", SUPPRESSION_LOSSES)
def test_losses_are_those_of_the_logits(loss: str) -> None:
    model, task = tiny_model().eval(), tiny_task(loss)
    logits = model((BATCH.images.double() / 255 - 0.5) / 0.25)
    torch.testing.assert_close(task.logits(model, BATCH.images), logits)
    torch.testing.assert_close(task.attacker_loss(model, BATCH), nn.functional.cross_entropy(logits, BATCH.labels))
    torch.testing.assert_close(task.suppression_loss(model, BATCH), SUPPRESSION_LOSSES[loss](logits, BATCH.labels))


def test_train_mode_of_the_head_keeps_the_backbone_in_evaluation() -> None:
    model, task = tiny_model().train(), tiny_task()
    trained = task.train_mode(model, "head")
    assert {name: part.training for name, part in model.named_modules() if name} == {
        **dict.fromkeys(("conv1", "bn1", "conv2", "bn2"), False),
        "fc": True,
    }
    assert trained == {"fc.weight": model.fc.weight, "fc.bias": model.fc.bias}
    assert task.head_names(model) == set(trained)
    before = state_of(model)
    task.attacker_loss(model, BATCH)
    assert_same_state(model, before)


def test_attention_of_a_classifier_that_has_it() -> None:
    spec = ModelSpec("timm", "test_vit", CLASSES, 1, 32, (0.5,), (0.5,))
    model = build(spec)
    names = set(ClassificationTask(spec).train_mode(model, "attention"))
    assert names == {name for name, _ in model.named_parameters() if ".attn." in name or name.startswith("head.")}
    assert len(names) > 6


def test_the_distance_to_a_reference_is_that_of_softened_logits() -> None:
    model, reference = tiny_model(1).eval(), tiny_model(2).eval()
    task = ClassificationTask(tiny_spec(), distillation=0.7, temperature=3.0, dtype=torch.float64)
    logits, teacher = (task.logits(net, BATCH.images) for net in (model, reference))
    distance, plain = distillation(logits, teacher, 3.0), nn.functional.cross_entropy(logits, BATCH.labels)
    torch.testing.assert_close(task.original_loss(model, BATCH, reference), plain + 0.7 * distance)
    torch.testing.assert_close(task.imitation_loss(model, BATCH, reference), distance)


# --- made of a configuration --------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", [False, True])
def test_features_are_what_the_head_sees(amp: bool) -> None:
    model = tiny_model()
    task = ClassificationTask(tiny_spec(), amp=amp, dtype=torch.float64)
    features = task.features(model.eval(), BATCH.images)
    assert features.shape == (len(BATCH.labels), 4)
    assert features.dtype == (torch.float32 if amp else torch.float64)
    torch.testing.assert_close(model.fc(features.double()), model(task.prepare(BATCH.images)), check_dtype=False)
    assert torch.autograd.grad(features.sum(), model.conv1.weight)[0].any()
    with pytest.raises(RuntimeError, match="channels"):
        task.features(model, torch.zeros(2, 2, 5, 3, dtype=torch.uint8))
    assert not model.fc._forward_pre_hooks


def test_the_loss_of_a_guess_is_that_of_equal_logits() -> None:
    task, model = tiny_task(), tiny_model()
    with torch.no_grad():
        for parameter in model.fc.parameters():
            parameter.zero_()
    assert task.chance_loss(model) == pytest.approx(task.attacker_loss(model, BATCH).item())
    task.start_head(model, "fresh", ("a", "b"))
    assert task.chance_loss(model) == pytest.approx(0.6931, abs=1e-4)
