"""Both engines, and erasure, on networks of latents, against diffusers' and transformers' own parts, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophon.attacker import FineTuneStrategy
from sophon.config import ModelConfig
from sophon.domains import Batch
from sophon.models import create, describe
from sophon.protection.fts import ENGINES
from sophon.protection.inner_loop import query_weights
from sophon.tasks import DenoisingTask
from tests.models.pipelines import CLASSES, Reference, batch, folder_of
from tests.tiny import slow

STEPS, SEED, LR = 2, 7, 0.05
GAMMA = query_weights("linear", STEPS, 1)
PLAN = FineTuneStrategy(optimizer="sgd", lr=LR, steps=STEPS, head="kept")


ADAPT, QUERY = [[batch(10 * part + step) for step in range(STEPS)] for part in (1, 2)]


def meta_gradient(kind: str, model: nn.Module, *, exact: bool) -> dict[str, Tensor]:
    """Unroll the attacker; with ``exact`` through its steps, else as if each did not depend on where it began."""
    reference = Reference(kind)
    start = {name: part.detach().clone().requires_grad_() for name, part in model.named_parameters()}
    weights: dict[str, Tensor] = dict(start)
    total = torch.zeros((), dtype=torch.float64)
    torch.manual_seed(SEED)
    with sdpa_kernel(SDPBackend.MATH):
        for step in range(STEPS):
            answer, target, _ = reference.predicted(model, weights, ADAPT[step])
            slopes = torch.autograd.grad((answer - target).square().mean(), list(weights.values()), create_graph=exact)
            weights = {name: part - LR * slope for (name, part), slope in zip(weights.items(), slopes, strict=True)}
            _, _, noise = reference.predicted(model, weights, QUERY[step])
            total = total + GAMMA[step] * noise.square().mean()
        return dict(zip(start, torch.autograd.grad(total, list(start.values())), strict=True))


@pytest.mark.parametrize("engine", slow(ENGINES, ("second_order",)))
@pytest.mark.parametrize("kind", slow(("text", "text-xl", "classes", "flow"), ("text-xl", "flow")))
def test_the_meta_gradient_is_that_of_the_pipelines_own_parts(kind: str, engine: str) -> None:
    model, spec = create(describe(ModelConfig(weights=str(folder_of(kind)))), CLASSES)
    model.double().train()
    expected = meta_gradient(kind, model, exact=engine == "second_order")
    task = DenoisingTask(spec, suppression_loss="dos", dtype=torch.float64)
    torch.manual_seed(SEED)
    found = ENGINES[engine](copy.deepcopy(model), PLAN, task, iter(ADAPT), iter(QUERY), GAMMA).gradients
    assert set(found) == set(expected)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "classes", "flow"])
def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradient(kind: str) -> None:
    model, spec = create(describe(ModelConfig(weights=str(folder_of(kind)))), CLASSES)
    kept, gradients = [0, 0], []
    for checkpointing in (False, True):
        task = DenoisingTask(spec, dtype=torch.float64, gradient_checkpointing=checkpointing)
        parameters = task.train_mode(model.double(), "all")

        def keep(part: Tensor, checkpointing: bool = checkpointing) -> Tensor:
            kept[checkpointing] += part.nbytes
            return part

        torch.manual_seed(SEED)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda part: part):
            loss = task.attacker_loss(model, ADAPT[0])
        gradients.append(torch.autograd.grad(loss, list(parameters.values())))
    assert kept[True] < 0.5 * kept[False]
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-14)


def test_erasure_leads_away_from_the_prompts_from_the_empty_one() -> None:
    model, spec = create(describe(ModelConfig(weights=str(folder_of("text")))), CLASSES)
    student = copy.deepcopy(model.double().eval())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    parts, base = Reference("text"), ADAPT[0]._replace(prompts=("",) * len(ADAPT[0].labels))

    def said(network: nn.Module, batch: Batch) -> Tensor:
        torch.manual_seed(SEED)
        return parts.predicted(network, dict(network.named_parameters()), batch)[0]

    unasked, asked = said(model, base), said(model, ADAPT[0])
    assert not torch.allclose(unasked, asked)
    torch.manual_seed(SEED)
    found = DenoisingTask(spec, dtype=torch.float64).erasure_loss(student, ADAPT[0], model, base, 2.0)
    torch.testing.assert_close(found, (said(student, ADAPT[0]) - (3 * unasked - 2 * asked)).square().mean())


@pytest.mark.parametrize("kind", ["text-xl", "classes", "flow"])
def test_frozen_parts_in_half_precision_give_almost_the_same_inputs_in_float32(kind: str) -> None:
    spec = create(describe(ModelConfig(weights=str(folder_of(kind)))), CLASSES).spec
    plain, half = (DenoisingTask(spec, frozen_dtype=name).inputs for name in ("float32", "bfloat16"))
    pairs = [(part.clean(ADAPT[0].images), *part.conditions(ADAPT[0]).values()) for part in (plain, half)]
    for wanted, found in zip(*pairs, strict=True):
        assert found.dtype == wanted.dtype
        assert (found - wanted).abs().max() <= 0.05 * wanted.abs().max()
    assert not torch.equal(pairs[0][0], pairs[1][0])
