"""Clusters of the reference's features stand for the labels that the defender has not."""

from __future__ import annotations

import pytest
import torch

from sophon.api.common import with_pseudo_labels
from sophon.config import DomainConfig
from sophon.losses import SUPPRESSION_LOSSES, reads_labels
from tests.tiny import tiny_denoising, tiny_domain, tiny_model, tiny_task, tiny_unet


def test_the_losses_that_read_labels_are_those_that_change_with_them() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.0, 0.0]])
    for name, loss in SUPPRESSION_LOSSES.items():
        first, second = (float(loss(logits, torch.tensor(labels))) for labels in ([0, 1], [2, 0]))
        assert (first != second) is reads_labels(loss), name


def test_pseudo_labels_are_clusters_of_the_references_features() -> None:
    domain, model, task = tiny_domain("d", ("adapt", "query")), tiny_model(), tiny_task()
    config = DomainConfig("d", labels="none", clusters=2)
    modes = [module.training for module in model.modules()]
    found = with_pseudo_labels(domain, config, "domain.restricted", task, model)
    assert found.classes == ("cluster_0", "cluster_1")
    assert modes == [module.training for module in model.modules()]
    features = task.features(model.eval(), domain["query"].images)
    assert features is not None
    features = features.detach()
    centres = [features[found["query"].labels == label].mean(0) for label in range(2)]
    apart = float((centres[0] - centres[1]).norm())
    within = [float((features[found["query"].labels == label] - centres[label]).norm(dim=1).mean()) for label in (0, 1)]
    assert max(within) < apart
    assert with_pseudo_labels(domain, DomainConfig("d"), "domain.restricted", task, model) is domain


@pytest.mark.parametrize("conditional", [False, True])
def test_a_denoiser_has_no_features_and_keeps_one_class(conditional: bool) -> None:
    domain, config = tiny_domain("d", ("adapt",)), DomainConfig("d", labels="none")
    task, model = tiny_denoising(conditional=conditional), tiny_unet(conditional=conditional)
    assert with_pseudo_labels(domain, config, "domain.restricted", task, model) is domain
