"""Both engines of the inner loop on diffusers' U-Net with attention, against independent references, in float64.

The denoiser's losses draw timesteps and noise as they go, so whatever is compared starts from the same seed and draws
in the same order: the attacker's step, then the query.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophon.attacker import FineTuneStrategy, learning_rate
from sophon.optimizers import build_optimizer
from sophon.protection.fts import ENGINES
from sophon.protection.inner_loop import Simulation, query_weights
from sophon.protection.meta_gradient import differentiable
from tests.tiny import tiny_batches, tiny_denoising, tiny_unet

STEPS = 3
SEED = 7
RATES = {"sgd": 0.1, "adam": 0.01, "adamw": 0.01, "momentum": 0.05}
ADAPT = tiny_batches(1, STEPS, 4)
QUERY = tiny_batches(2, STEPS, 4)
GAMMA = query_weights("linear", STEPS, 1)
LAST_BLOCKS = ("up_blocks.1.", "conv_norm_out.", "conv_out.")

slow = pytest.mark.slow
# optimizer, scope, class-conditional
CASES = [
    pytest.param("adam", "all", True),
    pytest.param("sgd", "all", False, marks=slow),
    pytest.param("adamw", "all", False, marks=slow),
    pytest.param("sgd", "attention", False, marks=slow),
    pytest.param("adam", "attention", True, marks=slow),
    pytest.param("adam", "last_blocks", False, marks=slow),
    pytest.param("sgd", "last_blocks", True, marks=slow),
    pytest.param("adam", "head", True, marks=slow),
]
over_cases = pytest.mark.parametrize(("optimizer", "scope", "conditional"), CASES)


def strategy(optimizer: str, scope: str = "all") -> FineTuneStrategy:
    return FineTuneStrategy(
        optimizer=optimizer,
        lr=RATES[optimizer],
        steps=STEPS,
        schedule="cosine",
        scope=scope,
        head="kept",
        weight_decay=0.01,
    )


def moves(name: str, scope: str) -> bool:
    """Whether an attacker of that scope trains the parameter, read off its name."""
    if scope == "attention":
        return ".attentions." in name
    return scope == "all" or name.startswith(LAST_BLOCKS if scope == "last_blocks" else "class_embedding.")


def simulated(engine: str, attacker: nn.Module, plan: FineTuneStrategy, conditional: bool) -> Simulation:
    task = tiny_denoising(conditional=conditional)
    torch.manual_seed(SEED)
    return ENGINES[engine](attacker, plan, task, iter(ADAPT), iter(QUERY), GAMMA)


def snapshots(model: nn.Module, plan: FineTuneStrategy, conditional: bool) -> Iterator[nn.Module]:
    """Fine-tune a copy with plain torch.optim; give a copy after every step, before the next one draws."""
    task = tiny_denoising(conditional=conditional)
    attacker = copy.deepcopy(model)
    optimizer = build_optimizer(plan, [p for name, p in attacker.named_parameters() if moves(name, plan.scope)])
    torch.manual_seed(SEED)
    for step, batch in enumerate(ADAPT):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(plan, step)
        optimizer.zero_grad()
        task.attacker_loss(attacker, batch).backward()
        optimizer.step()
        yield copy.deepcopy(attacker)


def objective(model: nn.Module, plan: FineTuneStrategy, conditional: bool) -> float:
    task = tiny_denoising(conditional=conditional)
    losses = []
    for snapshot, batch in zip(snapshots(model, plan, conditional), QUERY, strict=True):
        with torch.no_grad():
            losses.append(task.suppression_loss(snapshot, batch).item())
    return sum(gamma * loss for gamma, loss in zip(GAMMA, losses, strict=True))


@pytest.mark.parametrize("optimizer", [pytest.param("sgd", marks=slow), pytest.param("momentum", marks=slow), "adam"])
@pytest.mark.parametrize(
    ("scope", "conditional"),
    [("all", False), ("all", True), ("attention", False), ("last_blocks", True), ("head", True)],
)
def test_first_order_equals_brute_force(optimizer: str, scope: str, conditional: bool) -> None:
    """The streamed sum equals the sum of gradients taken on full snapshots, for moved and unmoved parameters alike."""
    model, plan = tiny_unet(conditional=conditional), strategy(optimizer, scope)
    task = tiny_denoising(conditional=conditional)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for gamma, snapshot, batch in zip(GAMMA, snapshots(model, plan, conditional), QUERY, strict=True):
        snapshot.zero_grad()
        task.suppression_loss(snapshot, batch).backward()
        for name, parameter in snapshot.named_parameters():
            expected[name] += gamma * parameter.grad
    attacker = copy.deepcopy(model)
    found = simulated("first_order", attacker, plan, conditional).gradients
    assert set(found) == set(expected)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-14)
    for name, parameter in attacker.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)) != moves(name, scope), name
        torch.testing.assert_close(parameter, snapshot.get_parameter(name), rtol=1e-12, atol=1e-14)


@over_cases
def test_second_order_equals_functional_call(optimizer: str, scope: str, conditional: bool) -> None:
    """DDPM's loss and the optimizers written out from their definitions, differentiated without higher."""
    model, plan = tiny_unet(conditional=conditional), strategy(optimizer, scope)
    start = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    weights: dict[str, Tensor] = dict(start)
    state: dict[str, tuple[Tensor, Tensor]] = {}
    trained = [name for name in start if moves(name, scope)]
    total = torch.zeros((), dtype=torch.float64)
    torch.manual_seed(SEED)
    with sdpa_kernel(SDPBackend.MATH):
        for step in range(STEPS):
            predicted, noise = denoise(model, weights, step, conditional)
            loss = (predicted - noise).square().mean()
            gradients = torch.autograd.grad(loss, [weights[name] for name in trained], create_graph=True)
            for name, gradient in zip(trained, gradients, strict=True):
                weights[name] = written_out(plan, step, weights[name], gradient, state, name)
            predicted, _ = denoise(model, weights, step, conditional, query=True)
            total = total + GAMMA[step] * predicted.square().mean()
        expected = dict(zip(start, torch.autograd.grad(total, list(start.values())), strict=True))
    attacker = copy.deepcopy(model)
    found = simulated("second_order", attacker, plan, conditional).gradients
    assert set(found) == set(expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9)
        assert torch.equal(attacker.get_parameter(name), model.get_parameter(name))  # left as it was


def denoise(
    model: nn.Module, weights: dict[str, Tensor], step: int, conditional: bool, *, query: bool = False
) -> tuple[Tensor, Tensor]:
    """Noise a batch with diffusers' own scheduler; return the noise that the weights predict, and the noise."""
    batch = (QUERY if query else ADAPT)[step]
    images = batch.images.double() / 127.5 - 1
    timesteps = torch.randint(20, (len(images),))
    noise = torch.randn_like(images)
    noised = DDPMScheduler(num_train_timesteps=20).add_noise(images, noise, timesteps)
    arguments = (noised, timesteps, batch.labels) if conditional else (noised, timesteps)
    return functional_call(model, weights, arguments, {"return_dict": False})[0], noise


def written_out(
    plan: FineTuneStrategy, step: int, p: Tensor, g: Tensor, state: dict[str, tuple[Tensor, Tensor]], name: str
) -> Tensor:
    """One step of SGD, Adam or AdamW as torch's documentation defines it."""
    lr = learning_rate(plan, step)
    if plan.optimizer == "adamw":
        p = p - lr * plan.weight_decay * p
    else:
        g = g + plan.weight_decay * p
    if plan.optimizer == "sgd":
        return p - lr * g
    m, v = state.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
    m, v = state[name] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    root = (v / (1 - 0.999 ** (step + 1))).sqrt()
    return p - lr * m / (1 - 0.9 ** (step + 1)) / (root + 1e-8)


@pytest.mark.slow
@over_cases
def test_second_order_equals_finite_differences(optimizer: str, scope: str, conditional: bool) -> None:
    """Central differences of attackers run with torch.optim, along random directions."""
    model, plan = tiny_unet(conditional=conditional), strategy(optimizer, scope)
    found = simulated("second_order", copy.deepcopy(model), plan, conditional).gradients
    generator = torch.Generator().manual_seed(3)
    epsilon = 1e-9  # Adam's first step is nearly g / |g|: the differences must not reach where an element changes sign
    for _ in range(3):
        direction = {n: torch.randn(p.shape, generator=generator).double() for n, p in model.named_parameters()}
        ends = []
        for sign in (1, -1):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                for name, parameter in moved.named_parameters():
                    parameter.add_(sign * epsilon * direction[name])
            ends.append(objective(moved, plan, conditional))
        slope = (ends[0] - ends[1]) / (2 * epsilon)
        exact = sum(float((found[name] * direction[name]).sum()) for name in found)
        assert exact == pytest.approx(slope, rel=5e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_parameter_beyond_the_loss_is_left_alone(engine: str) -> None:
    """As torch.optim, neither engine decays a weight that no gradient reaches, and its own gradient is zero."""
    model, plan = tiny_unet(), strategy("adamw")
    model.register_parameter("spare", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    attacker = copy.deepcopy(model)
    found = simulated(engine, attacker, plan, False)
    assert torch.equal(found.gradients["spare"], torch.zeros(2, dtype=torch.float64))
    assert torch.equal(attacker.get_parameter("spare"), model.get_parameter("spare"))
    assert sum(g * loss for g, loss in zip(GAMMA, found.query_losses, strict=True)) == pytest.approx(
        objective(model, plan, False), rel=1e-9
    )


def test_functional_unet_is_used_like_the_plain_one() -> None:
    """Inside the inner loop diffusers' attributes, keywords and slices work; outside, nothing has changed."""
    model = tiny_unet(conditional=True)
    slicing = nn.ModuleList.__getitem__
    images, timesteps, labels = torch.randn(3, 1, 6, 6).double(), torch.tensor([0, 7, 19]), torch.tensor([2, 0, 1])
    expected = model(images, timesteps, class_labels=labels).sample
    with differentiable.innerloop(model, torch.optim.SGD(model.parameters(), lr=0.1)) as (functional, _):
        assert functional.config == model.config
        assert functional.dtype == torch.float64
        torch.testing.assert_close(functional(images, timesteps, class_labels=labels).sample, expected)
        torch.testing.assert_close(functional(images, timesteps, labels, return_dict=False)[0], expected)
        resnets = functional.mid_block.resnets
        assert resnets[1:] == [resnets[1]] == [resnets[-1]]
        assert [*resnets[:1], *resnets[1:]] == list(resnets)
        with pytest.raises(IndexError):
            resnets[2]
    assert nn.ModuleList.__getitem__ is slicing
    assert type(model.mid_block.resnets[1:]) is nn.ModuleList
