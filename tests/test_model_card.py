"""The model card says what a checkpoint is, what protection cost and promises nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sophon.auditing.card import facts
from sophon.checkpoint import write_checkpoint
from sophon.files import read_json
from tests.auditing.records import audit, idle, trio
from tests.models.test_adapter_contract import CASES
from tests.test_checkpoint import DOMAINS, MANIFEST, model_of

PRETRAIN = {
    **MANIFEST,
    "verb": "pretrain",
    "method": None,
    "sampler_support": None,
    "domains": {"original": DOMAINS["original"]},
    "parent_sha256": None,
    "intactness": {"metric": "accuracy", "unit": "%", "higher_is_better": True, "after": {"val": 91.25, "test": 90.5}},
}
DENOISER = {
    **MANIFEST,
    "intactness": {
        "metric": "eps-MSE",
        "unit": "",
        "higher_is_better": False,
        "before": {"val": 0.0341249, "test": 0.034},
        "after": {"val": 0.0357111, "test": 0.12345678},
        "tolerance": 5.0,
        "relative": True,
    },
}
HOLDS = trio("a", 50.0, 60.0, 50.0)
CARDS: dict[str, tuple[str, dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    # a case, its manifest, what its card says and what it does not
    "protected": (
        "timm",
        MANIFEST,
        (
            "library_name: timm\n",
            "license: other\n",
            "**Not audited**",
            "    - type: accuracy\n      value: 89.125\n",
            "|---|---|---|\n| val | 91.25 | 90.75 |\n| test | 90.50 | 89.12 |\n",
            "Measured on the original domain: accuracy, in %; higher is better.",
            "at most 1.0 on `val`",
            "A classifier of 3 classes (pets), protected against fine-tuning on **faces**",
            "| rounds | `7` |",
            "| momentum, learning rate | 0.001 to 0.1 |",
            "| steps | 10 to 20 |",
            "| head | fresh, kept |",
            "not a guarantee",
            "sophon audit",
            'timm.create_model("local-dir:PATH", pretrained=True)',
            "`cc`",
            "| original domain | pets, 3 classes |",
            "`dog | fox`",
        ),
        ("non-fine-tunable", "hard to fine-tune on", "fts_steps"),
    ),
    "audited": (
        "timm",
        MANIFEST | {"audits": [facts(audit(trio("a", 57.0, 60.0, 50.0)))]},
        (
            "**WEAKENED**: Protection takes something from an attacker, but not all: ",
            "- Worst case: `a`, gap closed 0.30 [0.30, 0.30].",
            "- An attacker who knows how it protects was not run; ",
            "- On the original domain protection costs 0.7 points",
            "- It rests on 1000 test images, 1 seed and 1 attack; ",
            "name: dogs\n",
            "value: 57.0\n      name: accuracy after the worst attack (a)\n",
            "- type: gap closed\n      value: 0.3",
        ),
        ("Not audited", "non-fine-tunable"),
    ),
    "audited on two domains": (
        "timm",
        MANIFEST | {"audits": [facts(audit(HOLDS, domains={"restricted": each})) for each in "xy"]},
        ("**HOLDS**", "### x\n", "### y\n", "- non-fine-tunable\n"),
        ("Not audited",),
    ),
    "audited without an attack": (
        "timm",
        MANIFEST | {"audits": [facts(audit(idle(1.0, 2.0, 3.0)))]},
        ("**CANNOT BE JUDGED**: No attack was tried.",),
        ("non-fine-tunable", "Worst case"),
    ),
    "reference": (
        "timm",
        PRETRAIN,
        ("**not protected**", "|---|---|\n| val | 91.25 |\n| test | 90.50 |\n"),
        ("non-fine-tunable", "before protection", "Threat model", "parent"),
    ),
    "denoiser": (
        "diffusers",
        DENOISER,
        (
            "library_name: diffusers\nlicense: other\npipeline_tag: unconditional-image-generation\n",
            "A denoising diffusion model (pets), protected against fine-tuning on **faces**",
            "Images: 1 x 8 x 8, scaled to -1..1.",
            "Measured on the original domain: eps-MSE; lower is better.",
            "| val | 0.03412 | 0.03571 |\n| test | 0.034 | 0.1235 |\n",
            "at most 5.0 % of the value before on `val`",
            'DiffusionPipeline.from_pretrained("PATH")',
        ),
        ("Classes, in", "image-classification", "accuracy"),
    ),
    "conditional denoiser": (
        "diffusers-classes",
        DENOISER,
        (
            "A denoising diffusion model conditioned on 3 classes (pets)",
            "Classes, in the order of the labels: `cat`, `dog | fox`, `owl`.",
        ),
        ("image-classification", "accuracy"),
    ),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_says_what_is_true_and_nothing_else(name: str, tmp_path: Path) -> None:
    kind, manifest, said, unsaid = CARDS[name]
    spec = replace(CASES[kind].spec, classes=("cat", "dog | fox", "owl"))
    write_checkpoint(tmp_path, model_of(kind), spec, manifest)
    card = (tmp_path / "README.md").read_text()
    for text in (*said, read_json(tmp_path / "sophon.json")["weights_sha256"]):
        assert text in card, text
    for text in (*unsaid, "None", "\n\n\n"):
        assert text not in card, text
