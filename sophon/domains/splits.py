"""Splits: disjoint, stratified, seeded by the data's own configuration, and hashed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sophon.config import DomainConfig
from sophon.config.domains import RESTRICTED_SPLITS
from sophon.domains.part import class_generator
from sophon.domains.sources import Loaded, load_source
from sophon.domains.streamed import joined
from sophon.domains.types import ImageSet, LoadedDomain
from sophon.errors import UserError


def load_original(
    config: DomainConfig, *, image_size: int, channels: int, where: str = "domain.original", memory_gb: float = math.inf
) -> LoadedDomain:
    """Load an original domain.

    Its training images are split, class by class, into ``train`` and ``val``; the data set's test images are ``test``.
    A training image whose pixels equal those of an earlier one, or of a test image, is left out.

    Args:
        config: the data set; ``val_fraction`` of the training images go to ``val``.

    Returns:
        The domain, on the CPU, with the splits ``train``, ``val`` and ``test``.

    Raises:
        UserError: as `load_source`; or ``val_fraction`` leaves a split without some class.
    """
    fractions = {"train": 1 - config.val_fraction, "val": config.val_fraction}
    loaded = load_source(config, image_size=image_size, channels=channels, where=where, memory_gb=memory_gb)
    return _split(loaded, config, fractions, where)


def load_restricted(
    config: DomainConfig,
    *,
    image_size: int,
    channels: int,
    where: str = "domain.restricted",
    memory_gb: float = math.inf,
) -> LoadedDomain:
    """Load a restricted domain.

    Its training images are split, class by class, into ``adapt`` and ``query`` (the defender's), ``attack`` and
    ``select`` (the attacker's); the data set's test images are ``test``. Duplicates are left out as by `load_original`.

    Args:
        config: the data set; ``fractions`` are the parts of the training images that each split gets.

    Returns:
        The domain, on the CPU, with the splits ``adapt``, ``query``, ``attack``, ``select`` and ``test``.

    Raises:
        UserError: as `load_source`; or ``fractions`` leaves a split without some class.
    """
    loaded = load_source(config, image_size=image_size, channels=channels, where=where, memory_gb=memory_gb)
    return _split(loaded, config, {name: config.fractions[name] for name in RESTRICTED_SPLITS}, where)


def classes_of_all(original: LoadedDomain, restricted: Sequence[LoadedDomain]) -> tuple[str, ...]:
    """Return the classes of the original domain, then those of the restricted ones; with domain names if any repeat."""
    domains = [original, *restricted]
    names = [name for domain in domains for name in domain.classes]
    if len(set(names)) < len(names):
        names = [f"{domain.name}: {name}" for domain in domains for name in domain.classes]
    return tuple(names)


def defenders_images(original: LoadedDomain, restricted: Sequence[LoadedDomain]) -> ImageSet:
    """Return ``train`` of the original domain with ``adapt`` and ``query`` of the restricted ones, as one set.

    Its classes are `classes_of_all`. Images that equal one of ``val``, ``attack``, ``select`` or ``test`` are left out.
    """
    classes, start, sets = classes_of_all(original, restricted), 0, []
    for domain, splits in ((original, ("train",)), *((domain, ("adapt", "query")) for domain in restricted)):
        sets += [domain[name].relabelled(domain[name].labels + start, classes) for name in splits]
        start += len(domain.classes)
    held = [original["val"], original["test"]]
    held += [domain[name] for domain in restricted for name in ("attack", "select", "test")]
    return _without_duplicates(joined(*sets), joined(*held))


def few_shot(images: ImageSet, budget: int | None, generator: torch.Generator) -> ImageSet:
    """Draw the images that an attacker with a small budget owns.

    Classes get equal numbers, up to one; where a class runs out, the others fill the budget. With the same generator
    state, a larger budget holds every image of a smaller one.

    Args:
        budget: how many images, at least one a class; None for all of them, in their order.
        generator: on the CPU; the only source of randomness.

    Returns:
        ``budget`` images in a random order, on the device of ``images``.

    Raises:
        UserError: ``budget`` is smaller than the number of classes or larger than the number of images.
    """
    if budget is None:
        return images.in_memory()
    if not len(images.classes) <= budget <= len(images):
        raise UserError(
            f"data_budget: {budget} is not allowed; it must be {len(images.classes)} (one image a class) "
            f"to {len(images)} (all there are), or null for all"
        )
    order = torch.randperm(len(images), generator=generator)
    labels = images.labels.cpu()[order]
    rank = torch.empty_like(labels)  # how many images of its class come before this one
    for label in range(len(images.classes)):
        members = labels == label
        rank[members] = torch.arange(int(members.sum()))
    return images.take(order[rank.argsort(stable=True)[:budget]]).in_memory()


def _split(loaded: Loaded, config: DomainConfig, fractions: Mapping[str, float], where: str) -> LoadedDomain:
    everything, test, notes = loaded
    train = _without_duplicates(everything, test)
    if len(train) < len(everything):
        notes.left_out["repeated"] += len(everything) - len(train)
    indices = _stratified(train, fractions, config.split_seed, where)
    splits = {name: train.take(chosen) for name, chosen in indices.items()} | {"test": test}
    classes, hashes = splits["test"].classes, {name: images.sha256() for name, images in splits.items()}
    return LoadedDomain(config.name, classes, splits, hashes, tuple(notes.texts()))


def _without_duplicates(train: ImageSet, test: ImageSet) -> ImageSet:
    seen, kept = set(map(bytes, test.fingerprints().numpy())), []
    for index, fingerprint in enumerate(map(bytes, train.fingerprints().numpy())):
        if fingerprint not in seen:
            seen.add(fingerprint)
            kept.append(index)
    return train.take(torch.tensor(kept, dtype=torch.int64)) if len(kept) < len(train) else train


def _stratified(train: ImageSet, fractions: Mapping[str, float], seed: int, where: str) -> dict[str, Tensor]:
    """Split indices of ``train`` so that every class is cut in the same proportions, to within one image."""
    key = f"{where}.val_fraction" if "val" in fractions else f"{where}.fractions"
    parts: dict[str, list[Tensor]] = {name: [] for name in fractions}
    for label, class_name in enumerate(train.classes):
        members = (train.labels == label).nonzero().flatten()
        if not len(members):
            raise UserError(
                f"{where}: every training image of class '{class_name}' equals another one or a test image; "
                "give test images of their own, and each image to one class"
            )
        members = members[torch.randperm(len(members), generator=class_generator(seed, "split", class_name))]
        start, total = 0, 0.0
        for name, fraction in fractions.items():
            total += fraction
            stop = min(round(total * len(members)), len(members))
            if stop == start:
                raise UserError(
                    f"{key}: {fraction:g} of the {len(members)} different training images of class '{class_name}' "
                    f"leaves none for split '{name}'; give it a larger part or keep more images"
                )
            parts[name].append(members[start:stop])
            start = stop
    return {name: torch.cat(chosen).sort().values for name, chosen in parts.items()}
