"""What every rank of a run does, and what one process does by itself, to be compared."""

from __future__ import annotations

import copy
import itertools
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sophon.config import GuardConfig, MethodConfig
from sophon.domains import Batch, ImageSet, MemoryImages
from sophon.errors import GuardError, UserError
from sophon.protection.distributed import ALONE, Ranks
from sophon.protection.fts import FTS
from sophon.protection.ntr import NTR
from sophon.protection.runner import Runner
from sophon.sampler import SamplerConfig
from sophon.stages.alternate import Alternate
from sophon.tasks import ClassificationTask
from tests.protection.staged import Momenta, context, runner, training
from tests.tiny import state_of, tiny_bands, tiny_denoising, tiny_images, tiny_model, tiny_spec, tiny_unet

SIZE = 2
RESTRICTED = tiny_bands("restricted", ("adapt", "query"), seed=10, across=True)
ORIGINAL = tiny_bands("original", ("train", "val"), seed=20)
IMAGES = tiny_images(3)
METHOD = MethodConfig(
    name="test", rounds=4, ntr_steps=2, attackers=2, query_batch_size=9, ntr_batch_size=9, probe_steps=2, fts_lr=1e-2
)
ATTACKERS = SamplerConfig(
    {"adam": [1e-3, 1e-1], "momentum": [1e-2, 1e-1]}, batch_sizes=[6], steps=[1, 5], heads=["kept"]
)
Tensors = dict[str, Tensor]


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def suppressed(ranks: Ranks, folder: Path, heads: str = "kept", attackers: int = 2, pool: int = 0) -> Tensors:
    """Four FTS steps: the weights after each, what each step said, the probed head, and the pool of all ranks."""
    model = tiny_model()
    method = replace(METHOD, attackers=attackers, pool=pool, chunk=2, fts_max_norm=1.0)
    sampler = replace(ATTACKERS, heads=heads.split("+"))
    fts = FTS(context(model, method=method, restricted=[RESTRICTED], sampler=sampler, seed=3, ranks=ranks))
    found: Tensors = {}
    for step in range(4):
        told = fts.step(step)
        found |= {f"{step}/{name}": value for name, value in state_of(model).items()}
        found |= {f"{step}/{name}": number(value) for name, value in told._asdict().items()}
    found |= {
        f"probe/{name}": value for name, value in (fts.attackers.probed[0] if fts.attackers.probed else {}).items()
    }
    return found | {f"pool/{name}": value for name, value in ranks.collect(fts.pool.tensors()).items()}


def diverging(ranks: Ranks, folder: Path) -> Tensors:
    """One rank's only attacker diverges, then both do."""
    model = tiny_model().float()
    task = ClassificationTask(tiny_spec(), suppression_loss="klu")
    wild = {"nesterov": [1e38, 1e38], "momentum": [0.05, 0.05]}
    sampler = replace(ATTACKERS, optimizers=wild, steps=[8, 8])
    fts = FTS(context(model, task, METHOD, restricted=[RESTRICTED], sampler=sampler, ranks=ranks))
    steps = [fts.step(index) for index in range(6)]
    return state_of(model) | {"diverged": torch.tensor([step.diverged for step in steps])}


def reinforced(ranks: Ranks, folder: Path, network: str = "tiny", batch: int = 9, weight: float = 0.8) -> Tensors:
    """NTR steps and one gradient, with distillation, on batches that two ranks cannot halve."""
    reference: nn.Module = tiny_model(1)
    if network == "momenta":
        torch.manual_seed(1)
        reference = Momenta().double()
    model = copy.deepcopy(reference)
    with torch.no_grad():
        model.fc.weight.add_(0.3)
    task = ClassificationTask(tiny_spec(), distillation=weight, dtype=torch.float64)
    method = replace(METHOD, ntr_lr=1e-3, ntr_batch_size=batch, ntr_augmentation="crop")
    ntr = NTR(context(model, task, method, reference=reference, original=training(IMAGES), seed=5, ranks=ranks))
    found = {"loss": number(ntr.run(3, 0)), "annealed": number(ntr.run(2, 1, "repair", anneal=True))}
    found |= {f"gradient/{name}": value for name, value in ntr.gradient(2, "anchor").items()}
    return found | state_of(model) | {f"reference/{name}": value for name, value in state_of(reference).items()}


class Measured(ClassificationTask):
    """Accepted, repaired and rolled back in turns; only the first rank is told what was measured."""

    rank = 0

    def __init__(self) -> None:
        super().__init__(tiny_spec(), suppression_loss="klu", distillation=0.5, dtype=torch.float64)
        self.values = itertools.chain([50.0, 50.0, 10.0, 50.0, 10.0, 10.0], itertools.repeat(50.0))

    def evaluate(self, model: nn.Module, images: ImageSet) -> float:
        assert self.rank == 0
        return next(self.values)


def run_of(
    ranks: Ranks, folder: Path, told: Callable[[int], object] = lambda step: None, method: MethodConfig = METHOD
) -> Runner:
    task = Measured()
    task.rank = ranks.rank
    sampler = replace(ATTACKERS, steps=[3, 6], heads=["kept", "fresh", "probed"])
    guard = GuardConfig(every=1, tolerance=1.0, repair_steps=2, max_ntr_steps=4)
    folder.mkdir(exist_ok=True)
    return runner(
        folder, task, told, method=method, guard=guard, original=ORIGINAL, restricted=[RESTRICTED], sampler=sampler,
        ranks=ranks,
    )  # fmt: skip


POOLED = replace(METHOD, pool=5, chunk=1, fts_original_weight=0.5, schedule="cosine")


def everything(run: Runner) -> Tensors:
    losses = [row[name] for row in run.at.history for name in ("query_loss", "gradient_norm", "ntr_loss")]
    where = [run.at.round, run.at.good_round, run.at.ntr_steps, run.at.rollbacks, run.at.good]
    stage: Any = run.stage
    pool = run.context.ranks.collect(stage.fts.pool.tensors())
    return {
        **state_of(run.context.model),
        **{f"good/{name}": value for name, value in run.guard.good.items()},
        **{f"pool/{name}": value for name, value in pool.items()},
        "losses": torch.tensor(losses, dtype=torch.float64),
        "where": torch.tensor(where, dtype=torch.float64),
    }


def trained(ranks: Ranks, folder: Path, pool: bool = False) -> Tensors:
    """Rounds with a repair, a roll-back and, with a pool, the original domain's gradient."""
    run = run_of(ranks, folder / f"trained{pool}", method=POOLED if pool else METHOD)
    run.run()
    return everything(run)


def stopped(ranks: Ranks, folder: Path) -> Tensors:
    """The last rank alone is asked to stop, in the third round; all end after it, and it is saved."""

    def told(step: int) -> None:
        if step == 3 and ranks.rank == ranks.size - 1:
            signal.raise_signal(signal.SIGTERM)

    run = interrupted(ranks, folder / "stopped", told)
    members = run.stage.fts.pool.members  # type: ignore[attr-defined]
    found = everything(run) | {"members": torch.tensor(len(members))}
    own = {place % POOLED.attackers % ranks.size for place in members}
    assert own <= {ranks.rank}
    return found


def interrupted(ranks: Ranks, folder: Path, told: Callable[[int], None]) -> Runner:
    run = run_of(ranks, folder, told, POOLED)
    run.context.task.values = itertools.repeat(50.0)  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        run.run()
    return run


def left_by_one(folder: Path) -> None:
    """Stop one process after three rounds."""
    interrupted(ALONE, folder, lambda step: step == 3 and signal.raise_signal(signal.SIGTERM))


def resumed(ranks: Ranks, folder: Path, of: str = "one") -> Tensors:
    """Go on from what one process has left, or several."""
    run = run_of(ranks, folder / of, method=POOLED)
    run.context.task.values = itertools.repeat(50.0)  # type: ignore[attr-defined]
    assert run.at.round == 3
    run.run()
    return everything(run)


# what: arguments, and whether two ranks give the very bits of one
SAME, CLOSE = 0.0, 1e-8
SCENARIOS: dict[str, tuple[Callable[..., Tensors], dict[str, Any], float]] = {
    **{
        f"fts {heads} {pool}": (suppressed, {"heads": heads, "pool": pool}, SAME)
        for heads, pool in (("kept", 0), ("probed", 3), ("kept+fresh+probed", 0), ("kept+fresh+probed", 3))
    },
    "fts of three": (suppressed, {"heads": "kept+fresh+probed", "attackers": 3}, CLOSE),
    "fts of four in a pool": (suppressed, {"heads": "kept+fresh+probed", "attackers": 4, "pool": 7}, CLOSE),
    "diverging": (diverging, {}, SAME),
    "ntr": (reinforced, {}, CLOSE),
    "ntr without distillation": (reinforced, {"weight": 0.0, "batch": 8}, CLOSE),
    "ntr of every momentum": (reinforced, {"network": "momenta"}, CLOSE),
    "trained": (trained, {}, CLOSE),
    "trained with a pool": (trained, {"pool": True}, CLOSE),
    "stopped": (stopped, {}, CLOSE),
    "resumed": (resumed, {}, CLOSE),
}


def refusals(ranks: Ranks) -> dict[str, str]:
    """How each rank fares where one of them, or all, fail."""
    other = ranks.size - 1

    @contextmanager
    def noted(name: str) -> Iterator[None]:
        try:
            yield
        except (UserError, GuardError) as error:
            found[name] = f"{type(error).__name__}: {error}"

    def fail() -> None:
        raise UserError("first: it cannot")

    found: dict[str, str] = {}
    with noted("first"):
        ranks.first(fail)
    with noted("together"), ranks.together():
        if ranks.rank == other:
            raise GuardError("together: one cannot")
    with noted("both"), ranks.together():
        raise UserError(f"both: said by {ranks.rank}")
    with noted("fine"), ranks.together():
        pass
    for name, method in (
        ("attackers", replace(METHOD, attackers=1)), ("batch", replace(METHOD, ntr_batch_size=1)), ("enough", METHOD)
    ):  # fmt: skip
        with noted(name):
            Alternate(None).check(context(tiny_model(), method=method, ranks=ranks))
    with noted("not finite"):
        spoilt = MemoryImages(IMAGES.images, IMAGES.labels, IMAGES.classes)
        task = Spoilt(tiny_spec(), dtype=torch.float64)
        task.spoil = ranks.rank == other
        NTR(context(tiny_model(), task, METHOD, original=training(spoilt), ranks=ranks)).run(1, 0)
    return found


class Spoilt(ClassificationTask):
    spoil = False

    def original_loss(self, *arguments: Any) -> Tensor:
        loss = super().original_loss(*arguments)
        return loss * math.nan if self.spoil else loss


def own_draw(ranks: Ranks) -> Tensor:
    """Return what torch's global generator gives a denoiser's loss in a batch of NTR."""
    task, model = tiny_denoising(), tiny_unet()
    drawn: list[Tensor] = []

    def original_loss(model: nn.Module, batch: Batch, reference: nn.Module | None) -> Tensor:
        drawn.append(torch.rand(3))
        return sum(p.sum() for p in model.parameters()) * 1.0

    task.original_loss = original_loss  # type: ignore[method-assign]
    NTR(context(model, task, METHOD, original=training(IMAGES), ranks=ranks)).run(1, 0)
    return drawn[0]
