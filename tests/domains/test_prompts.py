"""Prompts: the text that goes with each image goes with it through splits, samples and batches."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sophon.config import DomainConfig
from sophon.domains import Batch, Domain, LoadedDomain, batches, few_shot
from sophon.domains.streamed import joined
from sophon.errors import UserError
from sophon.protection.distributed import Ranks
from tests.domains.made import (
    COUNTS,
    Table,
    loaded,
    of,
    pictures,
    pixels,
    write_csv,
    write_folder,
    write_jsonl,
    write_listed,
)

CAPTIONS = {image.tobytes(): f"{side} {number}" for side in COUNTS for number, image in enumerate(pixels(side)[0])}


def table(side: str, **columns: list[int]) -> Table:
    return Table(image=pictures(side), text=[f"{side} {number}" for number in range(COUNTS[side])], **columns)


WITH_CAPTIONS: dict[str, Any] = {
    "metadata.csv": partial(write_listed, write=write_csv, captions=True),
    "metadata.jsonl without labels": partial(write_listed, write=write_jsonl, captions=True, labels=False),
    "Hugging Face": of(lambda side: table(side, label=pixels(side)[1].tolist())),
    "Hugging Face without labels": of(table),
}


def caption(batch: Batch) -> list[str]:
    return [CAPTIONS[image.numpy().tobytes()] for image in batch.images]


@pytest.mark.parametrize("memory_gb", [1.0, 0.0], ids=["in memory", "streamed"])
@pytest.mark.parametrize("name", WITH_CAPTIONS)
def test_captions_follow_their_images(name: str, memory_gb: float, tmp_path: Path) -> None:
    domain = loaded(WITH_CAPTIONS[name](tmp_path), memory_gb)
    assert len(domain.classes) == (1 if name == "Hugging Face without labels" else 2)
    generator = torch.Generator().manual_seed(0)
    for images in domain.splits.values():
        few = few_shot(images, len(images.classes), generator)
        moved = few.relabelled(few.labels, few.classes).to(torch.device("cpu"))
        for part in (images, images.in_memory(), moved, joined(images, few)):
            batch = next(batches(part, len(part), generator))
            assert batch.prompts is not None
            assert list(batch.prompts) == caption(batch)
            slice_ = Ranks().share(batch)
            assert slice_.prompts == batch.prompts


PROMPTS = {
    "a photo of a {class}": lambda label, text: f"a photo of a {label}",
    "{text}, painted": lambda label, text: f"{text}, painted",
    "a sks dog": lambda label, text: "a sks dog",
}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_names_the_class_or_the_caption(prompt: str, tmp_path: Path) -> None:
    config = WITH_CAPTIONS["metadata.csv"](tmp_path)
    config.prompt = prompt
    batch = loaded(config)["adapt"].first(9)
    assert batch.prompts is not None
    expected = [PROMPTS[prompt](int(label), text) for label, text in zip(batch.labels, caption(batch), strict=True)]
    assert list(batch.prompts) == expected


def test_prompts_are_part_of_a_splits_hash_where_there_are_any(tmp_path: Path) -> None:
    plain = write_folder(tmp_path)
    hashes = []
    for plain.prompt in (None, "a {class}", "the {class}"):
        domain: LoadedDomain = loaded(plain)
        assert (domain["adapt"].prompts is None) == (plain.prompt is None)
        hashes.append(domain.hashes["adapt"])
    assert len(set(hashes)) == 3


def test_a_prompt_that_cannot_be_filled_in_is_refused() -> None:
    config = DomainConfig(name="x", source="imagefolder", prompt="a {colour} {class}")
    with pytest.raises(UserError, match=r"\{colour\} is not allowed"):
        config.validate("domain.restricted")


def test_a_caption_that_is_missing_is_refused(tmp_path: Path) -> None:
    config = write_folder(tmp_path)
    config.prompt = "{text}"
    with pytest.raises(UserError, match=r"^it\.prompt: .* have no captions"):
        loaded(config)


def test_python_hands_prompts_over() -> None:
    domain = loaded(Domain(pixels("train"), pixels("test"), name="x", prompt="a {class}"))
    assert set(domain["attack"].prompts or ()) == {"a 0", "a 1"}
