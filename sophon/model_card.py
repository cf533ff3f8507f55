"""The model card of a checkpoint: README.md with the Hub's header, and an audit's figures if there are any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from sophon import models
from sophon.config import MethodConfig
from sophon.models import ModelSpec
from sophon.models.adapter import ModelCard


def model_card(spec: ModelSpec, manifest: Mapping[str, Any]) -> str:
    """Return the card of a model whose manifest, ``sophon.json``, is complete; Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sophon"), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = lambda value: " ".join(str(value).replace("|", "\\|").split())
    environment.filters["figure"] = lambda value, unit: f"{value:.2f}" if unit == "%" else f"{value:.4g}"
    card, domains = models.adapter_of(spec).card(), manifest.get("domains") or {}
    usual = asdict(MethodConfig())
    parts = {
        "metadata": _metadata(spec, card, manifest),
        "settings": {name: value for name, value in (manifest.get("method") or {}).items() if usual.get(name) != value},
        "audits": manifest.get("audits") or [],
    }
    template = environment.get_template("model_card.md.j2")
    return template.render(spec=spec, card=card, manifest=manifest, domains=domains, **parts) + "\n"


def _metadata(spec: ModelSpec, card: ModelCard, manifest: Mapping[str, Any]) -> str:
    """Return the card's YAML header: what the Hub reads, with the figures of intactness and audits as `model-index`."""
    audits, intactness = manifest.get("audits") or [], manifest.get("intactness") or {}
    original = (manifest.get("domains") or {}).get("original") or {"name": "original"}
    measured = [(original["name"], intactness.get("metric", "accuracy"), intactness.get("after", {}).get("test"), "")]
    for audit in audits:
        attack = f"after the worst attack ({audit['attack']})"
        measured.append((audit["restricted"], audit["metric"], audit["value"], attack))
        measured.append((audit["restricted"], "gap closed", audit["gap_closed"], attack))
        measured.append((audit["restricted"], "removal", audit["removal"], "against a filtered model"))
    holds = bool(audits) and all(audit["word"] == "HOLDS" for audit in audits)
    results = [
        EvalResult(
            task_type=card.pipeline_tag,
            dataset_type=domain,
            dataset_name=domain,
            dataset_split="test",
            metric_type=metric,
            metric_name=f"{metric} {when}".strip(),
            metric_value=value,
        )
        for domain, metric, value, when in measured
        if value is not None
    ]
    tags = [card.pipeline_tag, spec.library, "sophon", *(["non-fine-tunable"] if holds else [])]
    data = ModelCardData(
        library_name=spec.library,
        pipeline_tag=card.pipeline_tag,
        license="other",
        tags=tags,
        model_name=manifest.get("name") or spec.architecture,
        eval_results=results or None,
    )
    text: str = data.to_yaml()
    return text
