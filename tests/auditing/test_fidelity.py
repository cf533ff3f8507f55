import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from sophon.auditing import fidelity
from sophon.auditing.fidelity import CACHE, Fidelity, feature_network
from sophon.config import DomainConfig
from sophon.domains import LoadedDomain, MemoryImages, load_original, load_restricted
from sophon.errors import UserError
from sophon.tensor_files import read_tensors

pytestmark = pytest.mark.slow  # trains a network

CPU = torch.device("cpu")
STEPS = 40


@pytest.fixture(scope="module")
def domains():
    few = {"source": "bundled", "per_class": 60, "test_per_class": 40}
    clothes = DomainConfig(name="clothes", dataset="fashion_mnist", classes=["trouser", "bag", "dress"], **few)
    digits = DomainConfig(name="digits", dataset="mnist", classes=["0", "1", "7"], **few)
    return (
        load_original(clothes, image_size=16, channels=1),
        load_restricted(digits, image_size=16, channels=1),
    )


@pytest.fixture(scope="module")
def trained(domains, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("features")
    return feature_network(*domains, seed=3, folder=folder, device=CPU, steps=STEPS), folder


def network(domains, folder, steps=STEPS, seed=3):
    return feature_network(*domains, seed=seed, folder=folder, device=CPU, steps=steps)


def noise(like, seed=0):
    return torch.randint(0, 256, like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def same_network(folder, other):
    one, another = (read_tensors(path / CACHE)[0] for path in (folder, other))
    return one.keys() == another.keys() and all(torch.equal(one[name], another[name]) for name in one)


# ---- distances ------------------------------------------------------------------------------------------------------


def measured(network, generated, real):
    return network.distance(generated, MemoryImages(real, torch.zeros(len(real), dtype=torch.int64), ("any",)))


def test_real_images_are_near_and_others_far(domains, trained):
    original, restricted = domains
    real = restricted["test"].images
    distance = partial(measured, trained[0])
    held_out = distance(restricted["attack"].images, real)
    assert distance(real, real) == pytest.approx(0, abs=1e-3)
    assert 0 <= held_out < 0.2 * distance(noise(real), real)
    assert held_out < 0.2 * distance(original["test"].images, real)
    assert math.isfinite(distance(torch.zeros_like(real), real))


def test_distance_does_not_depend_on_how_images_are_batched(domains, trained, monkeypatch):
    real = domains[1]["test"].images
    whole = measured(trained[0], noise(real), real.clone())
    monkeypatch.setattr(fidelity, "_BATCH", 7)
    assert measured(trained[0], noise(real), real.clone()) == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize(("generated", "real"), [(1, 5), (5, 1), (0, 5)])
def test_two_images_of_each_set_are_needed(domains, trained, generated, real):
    images = domains[1]["test"].images
    with pytest.raises(ValueError, match="two images of each"):
        measured(trained[0], images[:generated], images[:real])


def test_distance_by_hand(monkeypatch):
    class Pixels(nn.Module):
        num_features = 2

        def forward(self, images):
            return images.flatten(1).float()

    from torchmetrics.image.fid import FrechetInceptionDistance  # takes seconds to import

    metric = FrechetInceptionDistance(feature=Pixels(), reset_real_features=False)
    real = torch.tensor([[0, 0], [2, 2], [0, 2], [2, 0]], dtype=torch.uint8).view(4, 1, 1, 2)
    # Means differ by (3, 4); the covariances, c and 4 c with c = 4/3 on the diagonal, by 2 * (2 - 1) ** 2 * 4/3.
    generated = 2 * (real - 1) + torch.tensor([6, 7], dtype=torch.uint8).view(1, 1, 1, 2) - torch.tensor(2)
    generated = generated.to(torch.uint8)
    found = measured(Fidelity("pixels", metric, 1, CPU, lambda images: images, 1), generated, real)
    assert found == pytest.approx(9 + 16 + 8 / 3, rel=1e-5)


def test_concept_rate_counts_restricted_classes(domains, trained, monkeypatch):
    by_hand = Fidelity("pixels", Mock(), 1, CPU, lambda images: images.flatten(1).float(), originals=2)
    logits = torch.tensor([[9, 0, 0], [0, 9, 0], [0, 0, 9], [1, 2, 3]], dtype=torch.uint8).view(4, 1, 1, 3)
    assert by_hand.concept_rate(logits) == 50
    monkeypatch.setattr(fidelity, "_BATCH", 3)
    assert by_hand.concept_rate(logits) == 50
    original, restricted = (domain["test"].images for domain in domains)
    assert trained[0].concept_rate(restricted) > 50 + trained[0].concept_rate(original)


# ---- the network trained here ---------------------------------------------------------------------------------------


def test_training_is_deterministic_and_leaves_the_global_generator_alone(domains, trained, tmp_path):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    again = network(domains, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    real = domains[1]["test"].images
    assert measured(again, noise(real), real) == measured(trained[0], noise(real), real)
    assert same_network(tmp_path, trained[1])
    network(domains, tmp_path / "other", seed=4, steps=1)
    network(domains, tmp_path / "another", seed=5, steps=1)
    assert not same_network(tmp_path / "other", tmp_path / "another")


def test_training_never_sees_a_test_split(domains, trained, tmp_path):
    def blind(domain, keep):
        splits = {name: images for name, images in domain.splits.items() if name == keep}
        return LoadedDomain(domain.name, domain.classes, splits, domain.hashes)

    network((blind(domains[0], "train"), blind(domains[1], "adapt")), tmp_path)
    assert same_network(tmp_path, trained[1])


def test_an_audit_that_goes_on_reads_the_network_it_trained(domains, trained, monkeypatch):
    monkeypatch.setattr(fidelity, "fine_tune", lambda *_: pytest.fail("trained again"))
    again = network(domains, trained[1])
    real = domains[1]["test"].images
    assert measured(again, noise(real), real) == measured(trained[0], noise(real), real)


@pytest.mark.parametrize("change", ["seed", "steps", "original", "restricted"])
def test_a_network_trained_on_something_else_is_refused(domains, trained, change):
    original, restricted = domains
    if change == "original":
        original = replace(original, hashes={**original.hashes, "train": "0" * 64})
    if change == "restricted":
        restricted = replace(restricted, hashes={**restricted.hashes, "adapt": "0" * 64})
    more = {"seed": {"seed": 4}, "steps": {"steps": STEPS + 1}}.get(change, {})
    with pytest.raises(UserError, match=r"run_dir: .*other images or in another way"):
        network((original, restricted), trained[1], **more)


@pytest.mark.parametrize("keep", [0, 100, -10])
def test_a_damaged_network_is_refused(domains, trained, tmp_path, keep):
    (tmp_path / CACHE).write_bytes((trained[1] / CACHE).read_bytes()[:keep])
    with pytest.raises(UserError, match="truncated or not a safetensors file"):
        network(domains, tmp_path)


def test_training_that_diverges_leaves_nothing(domains, tmp_path, monkeypatch):
    monkeypatch.setattr(fidelity, "fine_tune", Mock(side_effect=FloatingPointError))
    with pytest.raises(UserError, match=r"attack\.frechet_samples: .*diverged"):
        network(domains, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_colour_images(tmp_path):
    few = {"source": "bundled", "dataset": "mnist", "classes": ["0", "1"], "per_class": 20, "test_per_class": 10}
    domains = (
        load_original(DomainConfig(name="a", **few), image_size=8, channels=3),
        load_restricted(DomainConfig(name="b", **few), image_size=8, channels=3),
    )
    real = domains[1]["test"].images
    assert math.isfinite(measured(network(domains, tmp_path, steps=1), noise(real), real))


# ---- Inception ------------------------------------------------------------------------------------------------------


class FakeInception(nn.Module):
    num_features = 3

    def forward(self, images):
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        return images.float().mean((2, 3))


@pytest.fixture
def inception(monkeypatch, tmp_path):
    """torch-fidelity installed and a weights file in torch.hub's cache; gives its path and what was asked for."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, asked = FrechetInceptionDistance, []

    def made(*, feature, **settings):
        asked.append((feature, settings.get("feature_extractor_weights_path"), force()))
        return real(feature=FakeInception() if feature == 2048 else feature, reset_real_features=False)

    def force():
        return fidelity.os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")

    weights = tmp_path / "hub" / "checkpoints" / fidelity._INCEPTION
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    monkeypatch.setattr("torchmetrics.image.fid.FrechetInceptionDistance", made)
    monkeypatch.setattr(fidelity, "find_spec", lambda name: object())
    monkeypatch.setattr(fidelity, "sha256_file", lambda path: "6726825d" + Path(path).read_bytes().hex())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return weights, asked


@pytest.mark.parametrize("before", [None, "0"])
def test_inception_is_used_when_it_is_at_hand(domains, tmp_path, inception, monkeypatch, before):
    weights, asked = inception
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    monkeypatch.delenv(key, raising=False) if before is None else monkeypatch.setenv(key, before)
    found = network(domains, tmp_path)
    assert found.name == "Inception-v3 (FID)"
    assert asked == [(2048, str(weights), "1")]
    assert fidelity.os.environ.get(key) == before
    assert (tmp_path / CACHE).exists()  # the concept rate's
    real = domains[1]["test"].images
    assert measured(found, noise(real), real) > measured(found, real, real) == pytest.approx(0, abs=1e-2)


@pytest.mark.parametrize("lacking", ["package", "weights", "whole weights"])
def test_inception_is_not_fetched(domains, tmp_path, inception, monkeypatch, lacking):
    weights, _ = inception
    if lacking == "package":
        monkeypatch.setattr(fidelity, "find_spec", lambda name: None)
    elif lacking == "weights":
        weights.unlink()
    else:
        monkeypatch.setattr(fidelity, "sha256_file", lambda path: "0" * 64)
    name = network(domains, tmp_path / "run", steps=1).name
    assert name.startswith("small ResNet trained here")
    assert "FID" not in name
