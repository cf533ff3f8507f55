"""Profile mode: the right figures in the right rows, and a run that does not notice."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode

from sophon.config import Config
from sophon.errors import UserError
from sophon.protect import profiling
from sophon.protect.profiling import IDLE, OFF, TABLE_FILE, TRACE_FILE, Profile, measure_peak, table
from sophon.protect.regions import ATTACKER_PASS, ATTACKER_STEP, GUARD, NTR_PASS, PREPARE, REGIONS
from sophon.protect.trace import ELSE, Summary, summarise
from tests.protect.test_trainer import METHOD, Scripted, trainer
from tests.tiny import assert_same_state, state_of, tiny_unet

CPU = torch.device("cpu")
FILES = {TRACE_FILE, TABLE_FILE}


@pytest.fixture(autouse=True)
def _small_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_PEAK_SIZES", {"cpu": 32})
    monkeypatch.setattr(profiling, "_PEAK_SECONDS", 0.0)


def every_region() -> None:
    """One round: each region twice, one product of 2 * 10 * 10 * 10 = 2000 FLOPs in each."""
    matrix = torch.ones(10, 10)
    for name in REGIONS * 2:
        with record_function(name):
            matrix @ matrix


def recorded(
    folder: Path, body: Callable[[], object] = every_region, done: int = 0, rounds: int = 3, **fields: Any
) -> list[str]:
    """Run the rounds after ``done``; return what was said."""
    said: list[str] = []
    with Profile(folder, CPU, say=said.append, **fields).over(done, rounds) as round_done:
        for _ in range(done, rounds):
            body()
            round_done()
    return said


def trace_in(folder: Path) -> dict[str, Any]:
    return json.loads(gzip.decompress((folder / TRACE_FILE).read_bytes()))


def summary_of(folder: Path) -> Summary:
    return summarise(trace_in(folder))


def rows_of(text: str) -> dict[str, list[str]]:
    """Read the table back: its cells by the name of the row."""
    names = "|".join(map(re.escape, [*REGIONS, ELSE, IDLE, "total"]))
    found = re.findall(rf"^({names})((?:  .*)?)$", text, re.MULTILINE)
    return {name: re.split(r"\s{2,}", cells.strip()) for name, cells in found}


def percent(cell: str) -> float:
    return float(cell.removesuffix(" %"))


# ---- the table ------------------------------------------------------------------------------------------------------


def test_the_table_has_every_region_and_adds_up(tmp_path: Path) -> None:
    said = recorded(tmp_path)
    text = (tmp_path / TABLE_FILE).read_text()
    assert said == [text.rstrip()]
    rows = rows_of(text)
    assert list(rows) == [*REGIONS, ELSE, "total"]
    assert {rows[name][0] for name in REGIONS} == {"4"}  # two rounds of two
    assert {rows[name][3] for name in REGIONS} == {"8e-06"}
    assert rows[ELSE][2] == "0"
    assert rows["total"][1:3] == ["100.0 %", "8e-05"]
    shares = [percent(rows[name][2]) for name in REGIONS] + [percent(rows[ELSE][1])]
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares) + 0.01)
    assert min(shares) >= 0


def test_the_table_fits_a_screen(tmp_path: Path) -> None:
    lines = recorded(tmp_path)[0].splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) < 80
    assert lines[0].startswith("Profile of round 2, round 3; CPU, ")
    assert lines[0].endswith("after 1 round of warm-up")


def test_the_table_names_the_dearest_operators_and_the_share_of_the_peak() -> None:
    operators = {f"aten::{index}": index / 10 for index in range(1, 8)}
    costs = summarise({"traceEvents": []}).costs
    costs[ATTACKER_PASS].flop, costs[ATTACKER_PASS].seconds = 6_000_000_000, 1.5
    text = table(Summary(["round 7"], 2.0, costs, operators, False), 12e9, "by hand", "here")
    assert text.startswith("Profile of round 7; here\n")
    assert rows_of(text)[ATTACKER_PASS] == ["0", "1.500", "75.0 %", "6", "4"]
    assert "Peak 12 GFLOP/s (by hand); achieved 3, 25.0 % of it." in text
    dearest = re.findall(r"^ +([\d.]+) % +([\d.]+) s +(\S+)$", text, re.MULTILINE)
    assert dearest == [(f"{5 * n:.1f}", f"{n / 10:.3f}", f"aten::{n}") for n in (7, 6, 5, 4, 3)]


def test_the_seconds_of_the_regions_and_the_rest_are_those_of_the_rounds(tmp_path: Path) -> None:
    recorded(tmp_path)
    summary = summary_of(tmp_path)
    assert summary.rounds == ["round 2", "round 3"]
    assert sum(cost.seconds for cost in summary.costs.values()) == pytest.approx(summary.seconds)
    assert all(cost.seconds > 0 for cost in summary.costs.values())
    # self times: no operator's time is counted in that of its caller too
    assert 0 < sum(summary.operators.values()) <= summary.seconds


def test_the_trace_names_the_regions(tmp_path: Path) -> None:
    recorded(tmp_path)
    names = [event["name"] for event in trace_in(tmp_path)["traceEvents"] if event.get("cat") == "user_annotation"]
    assert all(names.count(name) == 4 for name in REGIONS)
    assert {"round 2", "round 3"} <= set(names)


def test_the_peak_is_measured_without_touching_the_global_generator() -> None:
    before = torch.get_rng_state()
    size, peak = measure_peak(CPU, torch.float32)
    assert size == 32
    assert 1e3 < peak < 1e15
    assert torch.equal(torch.get_rng_state(), before)


def test_the_peak_is_that_of_the_precision_of_the_passes(tmp_path: Path) -> None:
    assert "(matmul, bfloat16, 32 x 32)" in recorded(tmp_path, amp=True)[0]
    assert "(matmul, float32, 32 x 32)" in recorded(tmp_path)[0]


# ---- FLOPs ----------------------------------------------------------------------------------------------------------

# module, shape of its input, FLOPs of its forward pass by hand
BY_HAND = {
    "dense": (nn.Conv2d(3, 8, 3, padding=1), (4, 3, 6, 6), 2 * 4 * 36 * 8 * 3 * 9),
    "strided": (nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), (4, 3, 7, 6), 2 * 4 * (4 * 3) * 8 * 3 * 9),
    "dilated": (nn.Conv2d(3, 8, 3, dilation=2), (4, 3, 7, 6), 2 * 4 * (3 * 2) * 8 * 3 * 9),
    "grouped": (nn.Conv2d(6, 4, (1, 3), groups=2), (5, 6, 4, 4), 2 * 5 * (4 * 2) * 4 * 3 * 3),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), (5, 6, 4, 4), 2 * 5 * (2 * 2) * 6 * 9),
    "double": (nn.Conv2d(6, 6, 3, groups=6).double(), (5, 6, 4, 4), 2 * 5 * (2 * 2) * 6 * 9),
    "transposed": (nn.ConvTranspose2d(3, 8, 4, stride=2), (2, 3, 5, 5), 2 * 2 * 25 * 3 * 8 * 16),
    "one dimension": (nn.Conv1d(3, 8, 3), (4, 3, 10), 2 * 4 * 8 * 8 * 3 * 3),
    "linear": (nn.Linear(7, 5), (3, 7), 2 * 3 * 7 * 5),
    "linear of rank 3": (nn.Linear(7, 5, bias=False), (3, 2, 7), 2 * 3 * 2 * 7 * 5),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_flops_by_hand(name: str, tmp_path: Path) -> None:
    """Each gradient costs what the forward pass does; the first layer's needs one only, with respect to the weight."""
    module, shape, forward = BY_HAND[name]
    images = torch.rand(shape, dtype=next(module.parameters()).dtype)

    def body() -> None:
        with record_function(ATTACKER_PASS):
            torch.autograd.grad(module(images).sum(), list(module.parameters()))
        with record_function(GUARD), torch.no_grad():
            module(images)
        torch.autograd.grad(module(images.clone().requires_grad_()).sum(), list(module.parameters()))

    recorded(tmp_path, body, rounds=1)
    costs = summary_of(tmp_path).costs
    assert costs[ATTACKER_PASS].flop == 2 * forward
    assert costs[GUARD].flop == forward
    assert costs[ELSE].flop == 2 * forward
    assert sum(cost.flop for cost in costs.values()) == 5 * forward


def test_flops_of_attention_by_hand(tmp_path: Path) -> None:
    query, key, value = (torch.rand(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))
    one = 2 * 2 * 3 * 5 * 7 * 8  # a product of the sizes of Q K^T

    def body() -> None:
        with record_function(GUARD), torch.no_grad():
            torch.nn.functional.scaled_dot_product_attention(query, key, value)
        with record_function(NTR_PASS):
            torch.nn.functional.scaled_dot_product_attention(query, key, value).sum().backward()

    recorded(tmp_path, body, rounds=1)
    costs = summary_of(tmp_path).costs
    assert costs[GUARD].flop == 2 * one
    assert costs[NTR_PASS].flop == 2 * one + 5 * one


def test_flops_of_a_whole_unet_are_those_of_torchs_counter(tmp_path: Path) -> None:
    """With attention as plain products: the counter does not know the CPU's fused one."""
    unet = tiny_unet().float()
    images, times = torch.rand(2, 1, 6, 6), torch.tensor([1, 2])

    def body() -> None:
        with record_function(NTR_PASS), sdpa_kernel(SDPBackend.MATH):
            unet(images, times).sample.sum().backward()

    with FlopCounterMode(display=False) as counter:
        body()
    recorded(tmp_path, body, rounds=1)
    assert summary_of(tmp_path).costs[NTR_PASS].flop == counter.get_total_flops() > 0


@settings(max_examples=15, deadline=None)
@given(
    size=st.integers(4, 9),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    transposed=st.booleans(),
)
def test_flops_of_convolutions_are_those_of_torchs_counter(
    tmp_path_factory: pytest.TempPathFactory, size: int, kernel: int, stride: int, padding: int, transposed: bool
) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(2, 3, kernel, stride, padding)
    images = torch.rand(2, 2, size, size)
    folder = tmp_path_factory.mktemp("run")

    def body() -> None:
        with record_function(NTR_PASS):
            layer(images.requires_grad_()).sum().backward()

    with FlopCounterMode(display=False) as counter:
        body()
    recorded(folder, body, rounds=1)
    assert summary_of(folder).costs[NTR_PASS].flop == counter.get_total_flops() > 0


# ---- traces by hand -------------------------------------------------------------------------------------------------


def event(cat: str, name: str, start: float, end: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "ts": start * 1e6,
        "dur": (end - start) * 1e6,
        "tid": tid,
        "args": args,
    }


def product(start: float, end: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    args = {"Input Dims": [[10, 10], [10, 5]], "Concrete Inputs": ["", ""], **args}
    return event("cpu_op", "aten::mm", start, end, tid, **args)


def test_an_operator_within_another_counts_once() -> None:
    outer = {"Input Dims": [[5], [10, 10], [10, 5]], "Concrete Inputs": [""] * 5}
    events = [
        event("user_annotation", "round 2", 0, 10),
        event("user_annotation", ATTACKER_PASS, 1, 9),
        event("cpu_op", "aten::linear", 1, 5),
        event("cpu_op", "aten::addmm", 2, 5, **outer),
        product(3, 4.5),
        product(5, 6),
        {"ph": "i", "name": "an instant", "ts": 0},
    ]
    summary = summarise({"traceEvents": events[::-1]})
    assert summary.costs[ATTACKER_PASS].flop == 2 * 1000
    assert summary.operators == {"aten::linear": 1, "aten::addmm": 1.5, "aten::mm": 2.5}


def test_of_regions_that_nest_the_outer_one_counts() -> None:
    events = [
        event("user_annotation", "round 2", 0, 10),
        event("user_annotation", "Optimizer.step#Adam.step", 0, 10),
        event("user_annotation", PREPARE, 1, 5),
        event("user_annotation", ATTACKER_PASS, 1, 3),
        event("user_annotation", ATTACKER_STEP, 3, 4),
        event("user_annotation", ATTACKER_PASS, 5, 8),
        product(2, 3),
        product(4.5, 5),
        product(6, 7),
        product(9, 10),
    ]
    costs = summarise({"traceEvents": events}).costs
    found = {name: (cost.calls, cost.seconds, cost.flop) for name, cost in costs.items() if cost.seconds}
    assert found == {PREPARE: (1, 4, 2000), ATTACKER_PASS: (1, 3, 1000), ELSE: (0, 3, 1000)}


def cuda_trace() -> dict[str, Any]:
    """Two regions of half a second on the host, which the device works on for 2 and for 5 s; a copy outside."""
    events = [
        event("user_annotation", "round 2", 0, 10),
        event("gpu_user_annotation", ATTACKER_PASS, 2, 4),
        event("user_annotation", ATTACKER_PASS, 0, 0.5),
        event("user_annotation", NTR_PASS, 0.5, 1),
        product(0.1, 0.2, **{"External id": 5}),
        event("cuda_runtime", "cudaLaunchKernel", 0.15, 0.16, correlation=50),
        event("kernel", "gemm", 2, 4, tid=7, correlation=50, **{"External id": 5}),
        product(0.6, 0.7, tid=2, **{"External id": 6}),  # the thread of the backward pass
        event("cuda_driver", "cuLaunchKernel", 0.65, 0.66, tid=2, correlation=60),
        event("kernel", "gemm", 4, 7, tid=7, correlation=60, **{"External id": 6}),
        event("cuda_runtime", "cudaGraphLaunch", 0.9, 0.91, correlation=70),
        event("kernel", "fused", 7, 8, tid=7, correlation=70),
        event("kernel", "fused", 8, 9, tid=7, correlation=70),
        event("cuda_runtime", "cudaDeviceSynchronize", 0.95, 0.96),
        event("gpu_memcpy", "Memcpy HtoD", 9, 9.5, tid=7, correlation=99),
    ]
    return {"traceEvents": events}


def test_a_devices_work_belongs_to_the_region_that_launched_it() -> None:
    summary = summarise(cuda_trace())
    assert summary.on_device
    found = {name: cost.device_seconds for name, cost in summary.costs.items() if cost.device_seconds}
    assert found == {ATTACKER_PASS: 2, NTR_PASS: 5, ELSE: 0.5}
    assert [summary.costs[name].flop for name in (ATTACKER_PASS, NTR_PASS)] == [1000, 1000]
    assert summary.operators == {"aten::mm": 5, "fused": 2, "Memcpy HtoD": 0.5}


def test_the_table_of_a_device_shows_its_idle_time() -> None:
    rows = rows_of(table(summarise(cuda_trace()), 1e6, "by hand", "here"))
    assert list(rows) == [*REGIONS, ELSE, IDLE, "total"]
    assert rows[ATTACKER_PASS] == ["1", "0.500", "2.000", "20.0 %", "1e-06", "5e-07"]
    assert rows[NTR_PASS] == ["1", "0.500", "5.000", "50.0 %", "1e-06", "2e-07"]
    assert rows[ELSE] == ["9.000", "0.500", "5.0 %", "0"]
    assert rows[IDLE] == ["2.500", "25.0 %"]
    assert rows["total"] == ["10.000", "10.000", "100.0 %", "2e-06", "2e-07"]


# ---- when it records ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("done", "rounds", "expected", "title"),
    [
        (0, 9, ["round 2", "round 3"], "after 1 round of warm-up"),
        (5, 9, ["round 7", "round 8"], "after 1 round of warm-up"),
        (6, 9, ["round 8", "round 9"], "after 1 round of warm-up"),
        (7, 9, ["round 9"], "after 1 round of warm-up"),
        (8, 9, ["round 9"], "without warm-up"),
        (0, 1, ["round 1"], "without warm-up"),
    ],
)
def test_it_records_what_there_is(tmp_path: Path, done: int, rounds: int, expected: list[str], title: str) -> None:
    (said,) = recorded(tmp_path, done=done, rounds=rounds)
    assert summary_of(tmp_path).rounds == expected
    assert said.splitlines()[0].endswith(title)
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_its_files_are_there_when_the_last_recorded_round_ends(tmp_path: Path) -> None:
    seen = []
    with Profile(tmp_path, CPU, say=lambda text: None).over(0, 5) as round_done:
        for _ in range(5):
            every_region()
            round_done()
            seen.append(len(list(tmp_path.iterdir())))
    assert seen == [0, 0, 2, 2, 2]


def test_disabled_it_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recorded(tmp_path, enabled=False) == []
    assert recorded(tmp_path, done=3, rounds=3) == []
    monkeypatch.chdir(tmp_path)
    with OFF.over(0, 3) as round_done:
        round_done()
    assert not list(tmp_path.iterdir())
    assert Config().profile is False


def test_only_the_first_rank_records(tmp_path: Path) -> None:
    assert recorded(tmp_path, rank=1) == []
    assert not list(tmp_path.iterdir())
    assert len(recorded(tmp_path, rank=0)) == 1


@pytest.mark.parametrize("rounds_before", [0, 1, 2])
def test_an_interrupted_run_leaves_no_files_and_no_profiler(tmp_path: Path, rounds_before: int) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    bodies = iter([every_region] * rounds_before + [interrupt])
    with pytest.raises(KeyboardInterrupt):
        recorded(tmp_path, lambda: next(bodies)(), rounds=8)
    assert not list(tmp_path.iterdir())
    recorded(tmp_path)  # a profiler that still ran would refuse
    assert summary_of(tmp_path).rounds == ["round 2", "round 3"]


def test_an_earlier_profile_is_replaced(tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name).write_text("old")
    recorded(tmp_path, done=4, rounds=5)
    assert summary_of(tmp_path).rounds == ["round 5"]
    assert "round 5" in (tmp_path / TABLE_FILE).read_text()


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / TRACE_FILE).mkdir()
    with pytest.raises(UserError, match=rf"^cannot write .*{TRACE_FILE}: ") as caught:
        recorded(tmp_path)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [TRACE_FILE]


def test_no_room_for_the_trace_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profiling.tempfile, "TemporaryDirectory", full)
    with pytest.raises(UserError, match=r"^profile: no trace .*\(No space left on device\); set TMPDIR, or false$"):
        recorded(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    method = replace(METHOD, rounds=4)
    plain = trainer(tmp_path / "plain", Scripted(), method=method)
    plain.run()
    folder = tmp_path / "profiled"
    with Profile(folder, CPU, say=lambda text: None).over(0, method.rounds) as round_done:
        profiled = trainer(folder, Scripted(), told=lambda number: round_done(), method=method)
        profiled.run()
    assert_same_state(profiled.model, state_of(plain.model))
    assert profiled.at.history == plain.at.history
    summary = summary_of(folder)
    assert summary.rounds == ["round 2", "round 3"]
    assert sum(cost.flop for cost in summary.costs.values()) > 0
