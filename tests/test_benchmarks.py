"""The benchmarks run at a tiny size, compare what they say they compare, and their formulas count right."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from sophon.errors import UserError

BENCHMARKS = Path(__file__).parents[1] / "experiments" / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the scripts find one another, as they do when one of them is run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def _case(model: str = "resnet_tiny", steps: tuple[int, ...] = (2,)) -> Any:
    from cases import Case

    return Case(model, 4, 4, steps)


def _job(cell: str, *methods: str, model: str = "resnet_tiny", steps: int = 2) -> Any:
    from measure import Job

    return Job(cell, _case(model), steps, methods, repeats=1)


# Inner loop


def _options(out: Path, **changes: Any) -> argparse.Namespace:
    from inner_loop import parsed

    options = parsed(["--out", str(out), "--repeats", "1", "--limit", "10"])
    return argparse.Namespace(**{**vars(options), **changes})


@pytest.mark.slow
def test_cells_become_json_and_a_table(tmp_path: Path) -> None:
    from inner_loop import cells, run
    from measure import measure
    from methods import METHODS

    options = _options(tmp_path / "results.json")
    wanted = ("time/tiny/K1", "memory/tiny/K2/learn2learn")
    chosen = {name: job for name, job in cells(options, {"tiny": _case(steps=(1, 2))}) if name in wanted}
    assert run(chosen, options, measure)
    found = json.loads(options.out.read_text())["cells"]
    assert set(found) == set(wanted)
    timed = found["time/tiny/K1"]
    assert set(timed["seconds"]) == {name for name, each in METHODS.items() if each.timed}
    assert all(len(values) == 1 and values[0] > 0 for values in timed["seconds"].values())
    assert any("ours_first" in what for what in timed["disagreements"])
    assert not any("bf16" in what for what in timed["disagreements"])
    assert 0 < timed["approximations"]["ours_first_bf16"]["difference"] < 0.5
    table = options.out.with_suffix(".md").read_text()
    assert "4 images a step, 4 a query" in table
    assert "| 1 |" in table
    assert "| 2 |" in table
    assert str(tmp_path) not in options.out.read_text() + table
    assert str(BENCHMARKS) not in options.out.read_text() + table


def _fake(seconds: float) -> Any:
    def measure(job: Any) -> dict[str, Any]:
        from dataclasses import asdict

        from records import machine

        times = {method: [seconds * (1 + index)] for index, method in enumerate(job.methods)}
        return {"seconds": times, "job": asdict(job), "machine": machine(torch.device("cpu"))}

    return measure


def test_measuring_a_cell_again_replaces_that_cell_alone(tmp_path: Path) -> None:
    from inner_loop import run

    options = _options(tmp_path / "results.json")
    one, two = _job("time", "bound", steps=1), _job("time", "bound", "learn2learn")
    run({"time/tiny/K1": one, "time/tiny/K2": two}, options, _fake(1.0))
    run({"time/tiny/K2": two}, options, _fake(3.0))
    found = json.loads(options.out.read_text())["cells"]
    assert found["time/tiny/K1"]["seconds"] == {"bound": [1.0]}
    assert found["time/tiny/K2"]["seconds"] == {"bound": [3.0], "learn2learn": [6.0]}
    assert "| 2 | 3 | 2 |" in options.out.with_suffix(".md").read_text()


def test_a_method_that_needs_too_much_is_left_out_and_said_so(tmp_path: Path) -> None:
    from inner_loop import run

    options = _options(tmp_path / "results.json", limit=0.002)
    run({"time/tiny/K2": _job("time", "bound", "higher_second")}, options, _fake(1.0))
    cell = json.loads(options.out.read_text())["cells"]["time/tiny/K2"]
    assert set(cell["seconds"]) == {"bound"}
    assert "time, higher_second, K 2: not run: needs about" in options.out.with_suffix(".md").read_text()


def test_a_cell_that_fails_is_not_written_and_the_next_one_is_measured(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from inner_loop import run

    def measure(job: Any) -> dict[str, Any]:
        if job.steps == 1:
            raise UserError("the process ended with 1")
        return _fake(1.0)(job)

    options = _options(tmp_path / "results.json")
    jobs = {"time/tiny/K1": _job("time", "bound", steps=1), "time/tiny/K2": _job("time", "bound")}
    assert not run(jobs, options, measure)
    assert set(json.loads(options.out.read_text())["cells"]) == {"time/tiny/K2"}
    assert "time/tiny/K1: not measured: the process ended with 1" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet_tiny", pytest.param("unet16_tiny", marks=pytest.mark.slow)])
def test_all_methods_find_the_same(model: str) -> None:
    from measure import measure_time
    from methods import METHODS

    timed = [name for name, each in METHODS.items() if each.timed]
    differences = measure_time(_job("time", *timed, model=model))["disagreements"]
    pairs = {
        "gradients of learn2learn and ours_first",
        "gradients of higher_first and ours_first",
        "gradients of higher_second and ours_second",
        "weights of ours_first and bound",
        "weights of ours_first_adam and bound_adam",
    }
    assert pairs <= set(differences)
    assert max(differences.values()) < 1e-3


@pytest.mark.parametrize("what", ["gradients", "weights"])
def test_a_method_that_finds_something_else_is_caught(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    import measure
    from methods import METHODS

    honest = METHODS["learn2learn"]

    def tampered(work: Any) -> Any:
        outcome = honest.run(work)
        if what == "weights":  # as if the attacker had been trained otherwise
            return outcome._replace(weights={name: weight + 1e-3 for name, weight in outcome.weights.items()})
        return outcome._replace(gradients={name: 1.01 * part for name, part in outcome.gradients.items()})

    monkeypatch.setitem(METHODS, "learn2learn", dataclasses.replace(honest, run=tampered))
    with pytest.raises(measure.DisagreementError, match=f"{what} of learn2learn and .* differ by"):
        measure.measure_time(_job("time", "bound", "ours_first", "learn2learn"))


def test_what_approximates_is_set_beside_the_exact_gradient() -> None:
    from measure import OTHER, approximations, disagreements

    exact, near = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])
    found = {"bound": {}, "ours_first": {"gradients": exact}, "ours_first_bf16": {"gradients": near}}
    assert disagreements(found) == {}
    beside = approximations({**found, OTHER: {"gradients": -exact}})
    assert beside["ours_first_bf16"] == pytest.approx({"cosine": 24 / 25, "difference": math.sqrt(2) / 5})
    assert beside[OTHER] == pytest.approx({"cosine": -1, "difference": 2})
    assert approximations({"bound": {}}) == {}


@pytest.mark.slow
def test_cheaper_gradients_of_a_checkpoint_come_as_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gradients
    from cases import make_model

    from sophon.export import Checkpoint

    def read(path: str, key: str) -> Checkpoint:
        model, spec, _ = make_model("resnet_tiny", torch.device("cpu"))
        return Checkpoint(model, spec, {}, Path(path), "")

    monkeypatch.setattr(gradients, "read_checkpoint", read)
    size = ["--k", "2", "--batch", "4", "--draws", "2", "--out", str(tmp_path / "gradients.json")]
    gradients.main(["--reference", "here", "--domain", "fashion_mnist", *size])
    (cell,) = json.loads((tmp_path / "gradients.json").read_text())["cells"].values()
    for draw in cell["draws"]:
        assert set(draw) == {"ours_first_fifth", "ours_first_bf16", "ours_first_fifth_bf16", "other queries"}
        assert draw["ours_first_bf16"]["cosine"] > draw["other queries"]["cosine"]
    cosine = statistics.median(draw["other queries"]["cosine"] for draw in cell["draws"])
    assert f"| {cosine:.3f} (" in capsys.readouterr().out
    with pytest.raises(UserError, match="head: 'kept' needs as many classes"):
        gradients.main(["--reference", "here", "--domain", "fashion_shoes_bags", *size])


@pytest.mark.slow
def test_a_child_weighs_its_method() -> None:
    from inner_loop import in_a_process

    found = in_a_process(_job("memory", "learn2learn"))
    above = found["peak"] - found["loaded"]
    # two graphs of four images, three sets of weights
    assert above > 2 * 4 * 115_248 + 3 * 4 * 157_650
    assert above < 200e6
    assert found["loaded"] > 100e6
    assert found["machine"]["threads"] == 1


@pytest.mark.slow
def test_a_child_that_fails_is_said_so() -> None:
    from inner_loop import in_a_process

    with pytest.raises(UserError, match="ended with 1"):
        in_a_process(_job("memory", "learn2learn", model="no_such_model"))


def test_a_pattern_that_names_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from inner_loop import main

    assert main(["--only", "time/vgg/*", "--out", str(tmp_path / "results.json")]) == 2
    assert "time/vgg/*" in capsys.readouterr().err


# A model's sizes


def test_facts_of_a_model_are_those_of_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    import cases
    from torch import nn

    bench = cases.make(_case(), torch.device("cpu"))
    # 3 x 3 convolution without padding and bias: 4 x 30 x 30 outputs of 9 products; head of 4 to 10
    net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(3600, 10))
    monkeypatch.setattr(bench.task, "train_mode", lambda model, scope: None)
    found = cases.facts(cases.Bench(net, bench.task, bench.adapt, bench.query))
    assert found.flops == 2 * (3600 * 9 + 3600 * 10)
    assert found.parameters == 36 + 36_000 + 10
    # the image, tanh's output (the linear layer's input is a view of it), the log-softmax's output and the label
    assert found.activations == 4 * (32 * 32 + 3600 + 10) + 8
    assert found.graph > found.activations


# Cost model


def test_flops_of_a_round_by_hand() -> None:
    from formulas import Model, Round, round_flops, second_order_flops, simulation_flops

    model = Model(flops=10, parameters=100, activations=7, graph=20)
    work = Round(5, 3, 2, every=2, attackers=3, ranks=2, ntr_steps=2, ntr_batch=4)
    assert work.queries == 3  # after steps 2, 4 and 5
    assert work.turns == 2
    assert simulation_flops(model, work) == 3 * 10 * (5 * 3 + 3 * 2)
    assert round_flops(model, work) == 2 * 630 + 3 * 10 * 2 * 4 / 2
    whole = 10 * (9 * 5 * 3 + 3 * 3 * 2)
    assert second_order_flops(model, work) == whole
    assert second_order_flops(model, work, segment=9) == whole
    # four steps again, and the forward pass of their two queries
    assert second_order_flops(model, work, segment=1) == whole + 10 * (3 * 4 * 3 + 2 * 2)


def test_bytes_and_seconds_by_hand() -> None:
    from formulas import Device, Model, Round, bound_bytes, communicated, round_seconds, simulation_bytes, update_bytes

    model = Model(flops=10, parameters=100, activations=7)
    assert update_bytes(model, "sgd") == 3 * 400
    assert update_bytes(model, "adam") == 7 * 400
    work = Round(2, 3, 3, optimizer="adam")
    assert bound_bytes(model, work) == 4 * 4 * 400 + 2 * 7 * 400
    assert simulation_bytes(model, work) == bound_bytes(model, work) + 3 * 2 * 400
    assert communicated(model, work) == 0
    spread = Round(2, 3, 3, attackers=4, ranks=4, ntr_steps=2, ntr_batch=8)
    assert communicated(model, spread) == 2 * 3 / 4 * 400 * 3
    device = Device(flops=60, bandwidth=1000, link=100)
    moved = 16 * 400 + 2 * 3 * 400 + 3 * 2 * 400 + (1 + 2) * 7 * 400 + 4 * 2 * 400
    expected = (3 * 10 * 12 + 3 * 10 * 2 * 8 / 4) / 60 + moved / 1000 + 1800 / 100
    assert math.isclose(round_seconds(model, spread, device), expected)


def test_memory_by_hand() -> None:
    from formulas import (
        Model,
        Round,
        bound_memory,
        first_order_memory,
        kept_graphs_memory,
        plain_memory,
        protection_memory,
        second_order_memory,
    )

    model = Model(flops=10, parameters=100, activations=7, graph=20)
    work = Round(6, 3, 5, optimizer="adam")
    assert plain_memory(model, work) == 3 * 7 + 3 * 400
    assert bound_memory(model, work) == 5 * 7 + 3 * 400
    assert first_order_memory(model, work) == 5 * 7 + 4 * 400
    assert first_order_memory(model, Round(600, 3, 5, optimizer="adam")) == first_order_memory(model, work)
    assert kept_graphs_memory(model, work) == 6 * 5 * 7 + 6 * 400 + 400
    assert second_order_memory(model, work) == 6 * (3 * 20 + 1200) + 6 * 5 * 7 + 800
    assert second_order_memory(model, work, segment=2) == 2 * (3 * 20 + 1200) + 5 * 7 + 3 * 1200 + 800
    assert protection_memory(model, work, micro=2) == 11 * 400 + 14


def test_what_a_device_achieves_is_read_off_the_bound() -> None:
    from formulas import Model, Round, achieved, bound_bytes, simulation_flops

    model, work = Model(flops=10, parameters=100, activations=7), Round(2, 3, 3)
    seconds = simulation_flops(model, work) / 50 + bound_bytes(model, work) / 1e6
    assert math.isclose(achieved(model, work, seconds, 1e6).flops, 50)
    cached = achieved(model, work, 0.001, 1e6)
    assert cached.bandwidth == math.inf
    assert cached.flops == simulation_flops(model, work) / 0.001


def test_predictions_are_set_beside_what_was_measured() -> None:
    from cost_model import memory_rows, time_rows
    from formulas import Model, Round, bound_bytes, first_order_memory, simulation_bytes, simulation_flops

    model = Model(flops=10.0, parameters=100.0, activations=7.0)
    work = Round(5, 4, 4)
    bound = simulation_flops(model, work) / 50 + bound_bytes(model, work) / 1e6
    ours = bound + (simulation_bytes(model, work) - bound_bytes(model, work)) / 1e6
    common = {"job": {"steps": 5, "case": {"adapt": 4, "query": 4}}, "model": vars(model), "not_run": {}}
    cells = {
        "time/a/K5": {**common, "seconds": {"bound": [bound], "ours_first": [2 * ours]}, "bandwidth": 1e6},
        "memory/a/K5/ours_first": {**common, "loaded": 10, "peak": 10 + 4 * first_order_memory(model, work)},
    }
    assert [(*row[:3], row[-1]) for row in time_rows(cells)] == [("a", "5", "ours_first", "0.50")]
    assert [(*row[:3], row[-1]) for row in memory_rows(cells)] == [("a", "5", "ours_first", "0.25")]


def test_the_forecast_follows_from_its_assumptions() -> None:
    from cost_model import forecast, large_unet
    from formulas import Device, Round

    model = large_unet(parameters=1e9, positions=1000, fan_in=1000, kept=2)
    assert model.flops == 2e12
    assert model.activations == 4e9
    work = Round(50, 130, 20, attackers=8, optimizer="adam")
    device = Device(flops=2e15, bandwidth=math.inf)
    found = dict(forecast(model, work, device, memory=20e9, rounds=100))
    # 8 attackers, 50 steps, 150 images, three passes
    assert found["a round"] == "3.6e+17 FLOP"
    assert found["a round on one device"] == "180 s"
    assert found["a round on 8 ranks"] == "22 s"
    # eleven numbers for each parameter and one image
    assert found["memory of a rank"] == "48 GB"
    assert found["devices by memory"] == "3 a rank"


# Whole runs and ranks


def test_a_whole_run_is_projected_from_its_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from whole_run import main

    size = ["--model", "resnet_tiny", "--k", "2", "--batch", "6", "--query", "2", "--rounds", "1"]
    main([*size, "--out", str(tmp_path / "whole.json")])
    (name, cell), *rest = json.loads((tmp_path / "whole.json").read_text())["cells"].items()
    assert not rest
    assert name == "resnet_tiny, K 2, 4 + 2 images, N 1"
    # two steps of four images with queries of two, and an NTR step of six; 2,585,856 FLOPs forward
    assert cell["flops"] == 3 * 2_585_856 * (2 * (4 + 2) + 6)
    minutes = 800 * cell["seconds"][0] / 60
    assert f"| {minutes:.3g} min |" in capsys.readouterr().out


def test_a_whole_run_refuses_a_query_that_leaves_no_images() -> None:
    from whole_run import parsed

    with pytest.raises(UserError, match="--query: 150"):
        parsed(["--query", "150"])


def test_rounds_are_clocked_without_what_comes_before_them(tmp_path: Path) -> None:
    import ranks

    commands = []

    def clock(arguments: list[str]) -> float:
        commands.append(arguments)
        rounds = next((int(each.split("=")[1]) for each in arguments if each.startswith("method.rounds=")), 0)
        return 10 + rounds * (2 if "torch.distributed.run" in arguments else 3)

    assert ranks.compare(tmp_path, clock) == {"1": [3.0] * ranks.PAIRS, "2": [2.0] * ranks.PAIRS}
    assert commands[0][-1] == f"run_dir={tmp_path / 'pretrain'}"
    folders = [arguments[-1] for arguments in commands]
    assert len(set(folders)) == len(folders)
