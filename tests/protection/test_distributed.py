"""Several ranks against one: two real processes on gloo do everything once, each test looks at what they left."""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sophon.errors import UserError
from sophon.protection.distributed import ALONE, Ranks, join
from sophon.protection.resume import STATE_FILE, read_state
from sophon.tensor_files import read_tensors, write_tensors
from tests.cli_helpers import REPOSITORY
from tests.protection.scenarios import CLOSE, SCENARIOS, SIZE, Tensors, left_by_one, own_draw, refusals, resumed
from tests.tiny import tiny_batches


def work(folder: Path) -> None:
    """Be one of the ranks: run every scenario and write what it gives."""
    torch.set_num_threads(1)
    atexit.register(leave, folder)  # before the group's own, so called after it
    ranks, device = join("auto")
    assert device.type == "cpu"
    for name, (scenario, arguments, _) in SCENARIOS.items():
        write_tensors(folder / f"{name}.{ranks.rank}", scenario(ranks, folder, **arguments))
    again, _ = join("cpu")  # as the next run of a sweep does
    write_tensors(folder / f"drawn.{ranks.rank}", {"own draw": own_draw(again)})
    (folder / f"refusals.{ranks.rank}").write_text(json.dumps(refusals(ranks)))


def leave(folder: Path) -> None:
    """Write which threads still live when all is over."""
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    (folder / f"threads.{os.environ['RANK']}").write_text(json.dumps(threads))


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
def test_each_rank_draws_noise_of_its_own(ranks: Path) -> None:
    """The first rank's is that of a run alone."""
    one, other = (each["own draw"] for each in found(ranks, "drawn"))
    assert torch.equal(one, own_draw(ALONE))
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
    assert one["not finite"].startswith("UserError: method.ntr_lr: the loss of ntr became nan")
    assert not any("\n" in message for message in one.values())


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


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="Linux tells a thread's name")
def test_no_thread_of_the_group_outlives_it(ranks: Path) -> None:
    """Python may end while one holds a tensor, and then aborts the process."""
    for rank in range(SIZE):
        threads = json.loads((ranks / f"threads.{rank}").read_text())
        assert threads
        assert not [name for name in threads if "gloo" in name]


@pytest.mark.parametrize(("count", "size"), [(5, 5), (6, 2), (11, 3)])
def test_slices_make_the_whole(count: int, size: int) -> None:
    batch, parts = tiny_batches(0, 1, count)[0], []
    for rank in range(size):
        ranks = Ranks()
        ranks.rank, ranks.size = rank, size
        parts.append(ranks.share(batch))
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
    assert max(len(part.labels) for part in parts) - min(len(part.labels) for part in parts) <= 1
