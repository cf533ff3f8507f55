"""How far models are from the reference in weight space, and what their frozen features still tell apart.

Distance and linear-mode barrier to the reference were reported as predictors of how fast what was unlearned comes back:
who is close and connected relearns quickly. Nothing here trains anything.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sophon.domains import ImageSet, LoadedDomain, evaluation_batches
from sophon.models import ModelSpec
from sophon.seeds import derive_seed, seed_all
from sophon.surgery import Means, restate
from sophon.tasks import Task
from sophon.tasks.task import evaluating

PLACES = (0.25, 0.5, 0.75)  # on the way from the reference
NEIGHBOURS = 10
_BATCH = 500


def measure(
    models: Mapping[str, nn.Module],
    spec: ModelSpec,
    task: Task,
    original: LoadedDomain,
    restricted: LoadedDomain,
    seed: int,
) -> list[dict[str, Any]]:
    """Compare models with the ``unprotected`` one.

    Args:
        models: by role, of one architecture; left as they are.
        original: whose ``val`` split the barrier is measured on, with BatchNorm statistics estimated on ``train``.
        restricted: whose ``test`` images are told apart by their nearest neighbours among the ``attack`` images.
        seed: of the batches that statistics are estimated on.

    Returns:
        A row a model: ``role``; ``distance``, the L2 distance of its parameters to the reference's, relative to the
        norm of these; ``barrier``, by how much the metric on the way between the two falls below a straight line, at
        most; and ``neighbours``, the accuracy in percent of the `NEIGHBOURS` nearest neighbours by the cosine of
        features, None for models without features.
    """
    rows = []
    for role, model in models.items():
        row: dict[str, Any] = {"role": role, "distance": None, "barrier": None}
        if role != "unprotected":
            row["distance"] = distance(model, models["unprotected"])
            row["barrier"] = _barrier(models["unprotected"], model, spec, task, original, seed)
        rows.append(row | {"neighbours": _neighbours(model, task, restricted)})
    return rows


def distance(model: nn.Module, reference: nn.Module) -> float:
    """Return the L2 distance between the parameters of two models, relative to the norm of the second's."""
    pairs = [
        (a.detach().double(), b.detach().double())
        for a, b in zip(model.parameters(), reference.parameters(), strict=True)
    ]
    return math.hypot(*(float((a - b).norm()) for a, b in pairs)) / math.hypot(*(float(b.norm()) for _, b in pairs))


def _barrier(
    reference: nn.Module, model: nn.Module, spec: ModelSpec, task: Task, original: LoadedDomain, seed: int
) -> float:
    ends = [task.evaluate(end, original["val"]) for end in (reference, model)]
    heights = [0.0]
    for place in PLACES:
        between = copy.deepcopy(reference)
        with torch.no_grad():
            for weight, other in zip(between.parameters(), model.parameters(), strict=True):
                weight.lerp_(other, place)
        seed_all(derive_seed(seed, "geometry"))
        generator = torch.Generator().manual_seed(derive_seed(seed, "geometry"))
        restate(between, Means(task, spec, original.classes, original["train"], generator))
        straight = (1 - place) * ends[0] + place * ends[1]
        heights.append(task.metric.sign * (straight - task.evaluate(between, original["val"])))
    return math.nan if any(map(math.isnan, heights)) else max(heights)


def _neighbours(model: nn.Module, task: Task, restricted: LoadedDomain) -> float | None:
    known, tested = (_features(model, task, restricted[split]) for split in ("attack", "test"))
    if known is None or tested is None:
        return None
    labels = restricted["attack"].labels.to(known.device)
    count = min(NEIGHBOURS, len(known))
    predicted = [
        labels[(part @ known.T).topk(count).indices].mode(dim=1).values for part in torch.split(tested, _BATCH)
    ]
    return 100 * float((torch.cat(predicted) == restricted["test"].labels.to(known.device)).double().mean())


def _features(model: nn.Module, task: Task, images: ImageSet) -> Tensor | None:
    """Return features of length 1, float [N, D]; None if the model has none, NaN where they are not finite."""
    parts = []
    with evaluating(model):
        for batch in evaluation_batches(images, _BATCH):
            features = task.features(model, batch.images)
            if features is None:
                return None
            parts.append(F.normalize(features))
    return torch.cat(parts)
