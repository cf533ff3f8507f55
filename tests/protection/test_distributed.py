"""Several ranks against one: two real processes on gloo do everything once, each test looks at what they left."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sophon.config import GuardConfig, MethodConfig
from sophon.domains import Batch, ImageSet, MemoryImages
from sophon.errors import GuardError, UserError
from sophon.protection.batch_norm import WholeBatch
from sophon.protection.distributed import ALONE, Ranks, join
from sophon.protection.fts import FTS
from sophon.protection.ntr import NTR
from sophon.protection.runner import Runner
from sophon.protection.state import STATE_FILE, read_state
from sophon.sampler import SamplerConfig
from sophon.stages.alternate import Alternate
from sophon.tasks import ClassificationTask
from sophon.tensor_files import read_tensors, write_tensors
from tests.cli_helpers import PRETRAIN, PROTECT, REPOSITORY, RUNS, load, refusal, sophon
from tests.protection.staged import context, runner, training
from tests.tiny import (
    state_of,
    tiny_bands,
    tiny_batches,
    tiny_denoising,
    tiny_images,
    tiny_model,
    tiny_spec,
    tiny_unet,
)

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


# --- what both sides do -------------------------------------------------------------------------------------------


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


class Momenta(nn.Module):
    """BatchNorm of every kind: a moving average, an average of all batches, none at all, 1d, and without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(4, momentum=0.3), nn.Tanh(),
            nn.BatchNorm2d(4, momentum=None), nn.Tanh(),
            nn.BatchNorm2d(4, track_running_stats=False), nn.Tanh(),
            nn.BatchNorm2d(4, affine=False, eps=0.1),
        )  # fmt: skip
        self.flat = nn.BatchNorm1d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.flat(torch.tanh(self.layers(self.conv(images))).mean((2, 3))))


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
        for heads in ("kept", "fresh", "probed", "kept+fresh+probed")
        for pool in (0, 3)
    },
    "fts of four": (suppressed, {"heads": "kept+probed", "attackers": 4}, CLOSE),
    "fts of three": (suppressed, {"heads": "kept+fresh+probed", "attackers": 3}, CLOSE),
    "fts of four in a pool": (suppressed, {"heads": "kept+fresh+probed", "attackers": 4, "pool": 7}, CLOSE),
    "diverging": (diverging, {}, SAME),
    "ntr": (reinforced, {}, CLOSE),
    "ntr without distillation": (reinforced, {"weight": 0.0, "batch": 8}, CLOSE),
    "ntr with an image a rank": (reinforced, {"batch": 2}, CLOSE),
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


def exchanges(ranks: Ranks) -> Tensors:
    """What the ranks' own methods give."""
    value = ranks.rank + 1.0
    whole = torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    sums = ranks.sum([number(value), whole * value, torch.tensor([ranks.rank]), torch.zeros(0), whole[0, 0] * value])
    assert sums[1].is_contiguous(memory_format=torch.channels_last)
    kept = torch.full((2,), value)
    named = {"b": kept, "a": kept.clone()}
    ranks.broadcast(dict(sorted(named.items(), reverse=bool(ranks.rank))))
    gathered = ranks.gather({"rank": ranks.rank, "text": "é" * (3 * ranks.rank), "nan": math.nan})
    assert [part["rank"] for part in gathered] == list(range(ranks.size))
    assert [len(part["text"]) for part in gathered] == [3 * rank for rank in range(ranks.size)]
    assert all(math.isnan(part["nan"]) for part in gathered)
    assert ranks.first(lambda: ranks.rank) == 0
    assert [ranks.any(flag) for flag in (False, ranks.rank == ranks.size - 1, True)] == [False, True, True]
    collected = ranks.collect({f"{ranks.rank}/a": whole * value, f"{ranks.rank}/b": torch.tensor(ranks.rank)})
    (draw,) = Drawing.once(ranks)
    return {
        **{f"sum/{index}": tensor for index, tensor in enumerate(sums)},
        "broadcast": kept + named["a"],
        **{f"collected/{name}": tensor for name, tensor in collected.items()},
        "own draw": draw,
    }


class Drawing:
    """What torch's global generator gives a denoiser's loss in a batch of NTR."""

    @staticmethod
    def once(ranks: Ranks) -> list[Tensor]:
        task, model = tiny_denoising(), tiny_unet()
        drawn: list[Tensor] = []

        def original_loss(model: nn.Module, batch: Batch, reference: nn.Module | None) -> Tensor:
            drawn.append(torch.rand(3))
            return sum(p.sum() for p in model.parameters()) * 1.0

        task.original_loss = original_loss  # type: ignore[method-assign]
        NTR(context(model, task, METHOD, original=training(IMAGES), ranks=ranks)).run(1, 0)
        return drawn


# --- the two processes --------------------------------------------------------------------------------------------


def work(folder: Path) -> None:
    """Be one of the ranks: run every scenario and write what it gives."""
    torch.set_num_threads(1)
    ranks, device = join("auto")
    assert device.type == "cpu"
    for name, (scenario, arguments, _) in SCENARIOS.items():
        write_tensors(folder / f"{name}.{ranks.rank}", scenario(ranks, folder, **arguments))
    again, _ = join("cpu")  # as the next run of a sweep does
    write_tensors(folder / f"exchanges.{ranks.rank}", exchanges(again))
    (folder / f"refusals.{ranks.rank}").write_text(json.dumps(refusals(ranks)))


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensors]:
    """What one process gives."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("serial")
    left_by_one(folder / "one")
    return {name: scenario(ALONE, folder, **arguments) for name, (scenario, arguments, _) in SCENARIOS.items()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes have filled."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("ranks")
    left_by_one(folder / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"from tests.protection import test_distributed as t; t.work(t.Path({str(folder)!r}))",
            ],
            cwd=REPOSITORY,
            env=environment(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(SIZE), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            ),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(SIZE)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * SIZE, "\n".join(errors)
    return folder


def found(folder: Path, name: str) -> list[Tensors]:
    return [read_tensors(folder / f"{name}.{rank}")[0] for rank in range(SIZE)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_equal_one(name: str, ranks: Path, serial: dict[str, Tensors]) -> None:
    """Both of them: to the bit where two attackers are added up, else to the rounding of sums in another order."""
    tolerance = SCENARIOS[name][2]
    one, other = found(ranks, name)
    pooled = {key for key in serial[name] if key.startswith("pool/")} | {"members"}
    assert set(one) | {"members"} == set(serial[name]) | {"members"}
    assert set(other) - pooled == set(serial[name]) - pooled  # a pool is collected on the first rank
    for key in set(other) - pooled:
        assert torch.equal(one[key].nan_to_num(), other[key].nan_to_num()), key
    for key, value in serial[name].items():
        if key != "members":
            torch.testing.assert_close(one[key], value, rtol=tolerance, atol=tolerance * 1e-2, equal_nan=True)


@pytest.mark.slow
def test_scenarios_are_telling(serial: dict[str, Tensors], ranks: Path) -> None:
    """They diverge, repair, roll back and probe, and fill pools on both ranks."""
    assert {0, 1, 2} <= set(serial["diverging"]["diverged"].tolist())
    for name in ("trained", "trained with a pool"):
        assert serial[name]["where"][3] == 1
    assert {int(key.split("/")[1]) for key in serial["fts of four in a pool"] if key.startswith("pool/")} >= {0, 1}
    state = read_state(ranks / "stopped" / STATE_FILE)
    members = [int(each["members"]) for each in found(ranks, "stopped")]
    assert sum(members) == len(state.data["pool"])
    assert min(members) > 0
    assert state.at.round == 3
    pool = [key.split("/")[1] for key in state.tensors["stage"] if key.startswith("pool/")]
    assert set(pool) == set(state.data["pool"])


@pytest.mark.slow
def test_a_run_of_two_goes_on_alone(serial: dict[str, Tensors], ranks: Path) -> None:
    """The other way round is the scenario `resumed`."""
    state = ranks / "stopped" / STATE_FILE
    before = state.read_bytes()
    went_on = resumed(ALONE, ranks, "stopped")
    state.write_bytes(before)
    for key, value in serial["resumed"].items():
        torch.testing.assert_close(went_on[key], value, rtol=CLOSE, atol=CLOSE * 1e-2)


@pytest.mark.slow
def test_only_the_first_rank_writes(ranks: Path) -> None:
    assert [path.name for path in (ranks / "trainedTrue").iterdir()] == [STATE_FILE]


@pytest.mark.slow
def test_exchanges(ranks: Path) -> None:
    one, other = found(ranks, "exchanges")
    whole = torch.arange(24.0).reshape(1, 2, 3, 4)
    for each in (one, other):
        assert each["sum/0"] == number(3.0)
        assert torch.equal(each["sum/1"], 3 * whole)
        assert torch.equal(each["sum/2"], torch.tensor([1]))
        assert each["sum/3"].shape == (0,)
        assert torch.equal(each["sum/4"], 3 * whole[0, 0])
        assert torch.equal(each["broadcast"], 2 * torch.ones(2))
    collected = {name.removeprefix("collected/"): value for name, value in one.items() if name.startswith("collected")}
    assert set(collected) == {"0/a", "0/b", "1/a", "1/b"}
    assert torch.equal(collected["1/a"], 2 * whole)
    assert collected["1/b"] == torch.tensor(1)
    assert not [name for name in other if name.startswith("collected")]


@pytest.mark.slow
def test_each_rank_draws_noise_of_its_own(ranks: Path) -> None:
    """The first rank's is that of a run alone."""
    one, other = (each["own draw"] for each in found(ranks, "exchanges"))
    assert torch.equal(one, Drawing.once(ALONE)[0])
    assert not torch.equal(one, other)


@pytest.mark.slow
def test_what_fails_on_one_rank_fails_on_all(ranks: Path) -> None:
    one, other = (json.loads((ranks / f"refusals.{rank}").read_text()) for rank in range(SIZE))
    assert one == other
    assert "fine" not in one
    assert "enough" not in one
    assert one["first"] == "UserError: first: it cannot"
    assert one["together"] == "GuardError: together: one cannot"
    assert one["both"] == "UserError: both: said by 0"
    assert one["attackers"].startswith("UserError: method.attackers: 1 leaves some of the 2 ranks without work;")
    assert one["batch"].startswith("UserError: method.ntr_batch_size: 1 leaves some of the 2 ranks without work;")
    assert one["not finite"].startswith("UserError: method.ntr_lr: the loss on the original domain became nan")
    assert not any("\n" in message for message in one.values())


# --- alone --------------------------------------------------------------------------------------------------------


def test_alone_there_is_nothing_to_exchange() -> None:
    ranks, device = join("cpu")
    assert (ranks, device) == (ALONE, torch.device("cpu"))
    assert not torch.distributed.is_initialized()
    tensors = [torch.ones(2)]
    assert ranks.sum(tensors)[0] is tensors[0]
    assert (ranks.gather(3), ranks.any(True), ranks.any(False), list(ranks.mine(3))) == ([3], True, False, [0, 1, 2])
    with pytest.raises(UserError, match="mine"), ranks.together():
        raise UserError("mine")


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [5, 6, 11])
def test_slices_make_the_whole(count: int, size: int) -> None:
    batch, parts = tiny_batches(0, 1, count)[0], []
    for rank in range(size):
        ranks = Ranks()
        ranks.rank, ranks.size = rank, size
        parts.append(ranks.share(batch))
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
    assert max(len(part.labels) for part in parts) - min(len(part.labels) for part in parts) <= 1


@pytest.mark.parametrize(
    ("variables", "device", "message"),
    [
        ({"WORLD_SIZE": "two"}, "cpu", "WORLD_SIZE: 'two' is not allowed"),
        ({"WORLD_SIZE": "0"}, "cpu", "WORLD_SIZE: '0' is not allowed"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "cpu", "LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set; .* torchrun$"),
        ({"WORLD_SIZE": "1"}, "gpu", "device: 'gpu' is not known"),
        (
            dict.fromkeys(("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), "0") | {"WORLD_SIZE": "2"},
            "cuda:0",
            "device: 'cuda:0' is not allowed with 2 ranks; give auto, cpu or cuda",
        ),
    ],
)
def test_environments_that_are_not_torchruns(
    variables: dict[str, str], device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as caught:
        join(device)
    assert "\n" not in str(caught.value)


# --- BatchNorm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 3), (7, 3, 5), (7, 3, 4, 4)])
def test_batch_norm_of_one_slice_is_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Output, gradients and running statistics, far from zero too, where sums of squares would lose everything."""
    images = (torch.randn(shape, dtype=torch.float64) + 1000 * torch.arange(3).view(3, *[1] * (len(shape) - 2))).to(
        dtype
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    results = []
    for mode in (WholeBatch(lambda row: row[None]), nullcontext()):
        kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
        layer = kind(3, momentum=0.4, dtype=wide)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
            layer.bias.copy_(torch.tensor([0.5, -1.0, 2.0]))
        given = images.clone().requires_grad_()
        with mode:
            found = layer(given)
        (found.float() ** 3).sum().backward()
        results.append([found, given.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()])
    loose = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 5e-2}[dtype]
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=loose, atol=loose * 10)


def test_batch_norm_in_evaluation_is_left_alone() -> None:
    def never(row: Tensor) -> Tensor:
        raise AssertionError

    layer, images = nn.BatchNorm2d(3).eval(), torch.randn(4, 3, 2, 2)
    expected = layer(images)
    with WholeBatch(never):
        assert torch.equal(layer(images), expected)
        assert torch.equal(F.batch_norm(images, layer.running_mean, layer.running_var), F.batch_norm(
            images, layer.running_mean, layer.running_var, None, None, False
        ))  # fmt: skip


# --- the command line ---------------------------------------------------------------------------------------------


def torchrun(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={SIZE}"]
    return subprocess.Popen(
        [*launcher, "-m", "sophon", *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(err: str) -> set[str]:
    """The lines that are ours, each once."""
    return {line for line in err.splitlines() if line.startswith("sophon: ")}


TWO = (*PROTECT, "method.attackers=2", "device=cpu")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    assert sophon(folder, *PRETRAIN).code == 0
    return folder


@pytest.mark.slow
def test_torchrun_protects(pretrained: Path, tmp_path: Path) -> None:
    """It writes one checkpoint, reports once, and weights that are near those of one process."""
    reference = f"reference={pretrained / RUNS / 'pretrain'}"
    process = torchrun(tmp_path, *TWO, reference, "run_dir=two")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("round 3 of 3") == 1, out
    assert sophon(tmp_path, *TWO, reference, "run_dir=one").code == 0
    states = [read_state(tmp_path / name / STATE_FILE) for name in ("one", "two")]
    assert states[0].at.history[0]["query_loss"] == pytest.approx(states[1].at.history[0]["query_loss"])
    for name, value in states[0].tensors["good"].items():
        torch.testing.assert_close(states[1].tensors["good"][name], value, rtol=0.1, atol=0.05)
    manifests = [load(tmp_path / name / "checkpoint" / "sophon.json") for name in ("one", "two")]
    assert manifests[0]["history"] == manifests[1]["history"]
    assert "already done" in sophon(tmp_path, *TWO, reference, "run_dir=two").out


@pytest.mark.slow
def test_torchrun_is_interrupted_and_one_process_goes_on(pretrained: Path, tmp_path: Path) -> None:
    reference = f"reference={pretrained / RUNS / 'pretrain'}"
    long = (*TWO, reference, "run_dir=run", "method.rounds=4000", "sampler.steps=[1,1]", "guard.every=2")
    process = torchrun(tmp_path, *long)
    try:
        while process.poll() is None and not (tmp_path / "run" / STATE_FILE).exists():
            signal.sigtimedwait((), 0.1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode != 0
    assert said(err) == {"sophon: interrupted; the same command goes on"}, err
    done = read_state(tmp_path / "run" / STATE_FILE).at.round
    assert 0 < done < 4000
    result = sophon(tmp_path, "export", reference, "checkpoint=run", "out=out", *long[1 : len(long) - 5])
    assert result.code == 0, result
    process = start_alone(tmp_path, long)
    assert "going on" not in process.err
    assert refusal(process, 130) == "interrupted; the same command goes on"
    assert read_state(tmp_path / "run" / STATE_FILE).at.round > done


def start_alone(folder: Path, command: tuple[str, ...]) -> Any:
    """Let one process go on with the run, and stop it once it has saved another state."""
    before = (folder / "run" / STATE_FILE).read_bytes()
    make = Runner.save

    def saved(self: Runner) -> None:
        make(self)
        if (folder / "run" / STATE_FILE).read_bytes() != before:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "save", saved)
        return sophon(folder, *command)


@pytest.mark.slow
def test_torchrun_refuses(pretrained: Path, tmp_path: Path) -> None:
    """Fewer attackers than ranks: nothing is written, one line, whichever rank says it."""
    reference = f"reference={pretrained / RUNS / 'pretrain'}"
    process = torchrun(tmp_path, *PROTECT, reference, "run_dir=run", "device=cpu")
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    (line,) = said(err)
    assert line.startswith("sophon: method.attackers: 1 leaves some of the 2 ranks without work;")
    assert "exitcode  : 2" in err
    assert not (tmp_path / "run").exists()


def test_other_verbs_run_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = refusal(sophon(tmp_path, *PRETRAIN))
    assert message == "pretrain: runs as one process, but WORLD_SIZE is 2; only protect spreads over ranks"
    assert not list(tmp_path.iterdir())
