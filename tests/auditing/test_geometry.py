"""Distance and barrier to the reference, and what frozen features tell apart."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from sophon.auditing.geometry import distance, measure
from sophon.domains import MemoryImages
from tests.auditing.staging import ORIGINAL, RESTRICTED
from tests.tiny import assert_same_state, state_of, tiny_model, tiny_spec, tiny_task


class Told(type(tiny_task())):  # type: ignore[misc]
    """A task whose features are the labels, and whose metric a model's first weight decides."""

    def features(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(images[:, 0, 0, 0].long() % 3, 3).double()

    def evaluate(self, model: nn.Module, images: Any) -> float:
        return float(abs(next(model.parameters()).detach().flatten()[0]))


def labelled(labels: list[int]) -> MemoryImages:
    images = torch.tensor(labels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 6, 6).contiguous()
    return MemoryImages(images, torch.tensor(labels), ("a", "b", "c"))


def found(models: dict[str, nn.Module], task: Any = None, restricted: Any = RESTRICTED) -> dict[str, dict[str, Any]]:
    rows = measure(models, tiny_spec(), task or tiny_task(), ORIGINAL, restricted, 0)
    return {row["role"]: row for row in rows}


def test_the_distance_is_relative_to_the_references_norm() -> None:
    one, other = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    one.weight.data, other.weight.data = torch.tensor([[3.0, 8.0]]), torch.tensor([[3.0, 4.0]])
    assert distance(one, other) == pytest.approx(4 / 5)


def test_the_barrier_is_how_far_the_way_falls_below_a_straight_line() -> None:
    models = {"unprotected": tiny_model(0), "protected": tiny_model(0)}
    for model, value in zip(models.values(), (2.0, -2.0), strict=True):
        next(model.parameters()).data.flatten()[0] = value
    rows = found(models, Told(tiny_spec(), dtype=torch.float64))
    assert rows["protected"]["barrier"] == pytest.approx(2.0)  # 0 on the way from 2 to 2
    assert rows["unprotected"]["barrier"] is rows["unprotected"]["distance"] is None


def test_neighbours_tell_classes_apart_by_features() -> None:
    splits = {"attack": labelled([0, 1, 2] * 12), "test": labelled([0, 1, 2, 2])}
    restricted = type(RESTRICTED)("r", ("a", "b", "c"), splits, {})
    rows = found({"unprotected": tiny_model(0)}, Told(tiny_spec(), dtype=torch.float64), restricted)
    assert rows["unprotected"]["neighbours"] == 100
    splits["test"] = MemoryImages(splits["test"].images, torch.tensor([0, 1, 2, 0]), ("a", "b", "c"))
    assert found({"unprotected": tiny_model(0)}, Told(tiny_spec(), dtype=torch.float64), restricted)["unprotected"][
        "neighbours"
    ] == pytest.approx(75)


@pytest.mark.slow
def test_models_stay_as_they_are_and_the_same_seed_gives_the_same() -> None:
    models = {"protected": tiny_model(1), "unprotected": tiny_model(2), "filtered": tiny_model(2)}
    before = {role: state_of(model) for role, model in models.items()}
    rows = found(models)
    assert found(copy.deepcopy(models)) == rows
    for role, model in models.items():
        assert_same_state(model, before[role])
    assert (rows["filtered"]["distance"], rows["protected"]["distance"] > 0) == (0, True)
    assert rows["protected"]["barrier"] >= 0
    assert all(0 <= row["neighbours"] <= 100 for row in rows.values())
