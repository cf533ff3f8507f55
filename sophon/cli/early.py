"""Refuse before torch is imported: pickles, data folders that do not exist, and the run folder of other settings."""

from __future__ import annotations

from pathlib import Path

from sophon.config import Config, DomainConfig, default_folder, keyed, plain
from sophon.paths import require_folder
from sophon.pickles import refuse_pickle
from sophon.run_folder import refuse_another

# what each verb opens, beside the original domain
_RESTRICTED, _BENIGN = {"protect", "audit"}, {"audit"}
_WEIGHTS = {"pretrain": (), "protect": ("reference",), "audit": ("checkpoint", "reference")}


def refuse_early(config: Config) -> None:
    """Look at what a run is going to open.

    Raises:
        UserError: weights are a pickle, an image folder is not there, or ``run_dir`` is that of other settings.
    """
    if config.verb not in _WEIGHTS:
        return
    weights = {key: getattr(config, key) for key in _WEIGHTS[config.verb]}
    if config.verb == "pretrain":
        weights["model.weights"] = config.model.weights
    for key, path in weights.items():
        if path:
            refuse_pickle(Path(path), key, config.model.library)
    for key, domain in _domains(config).items():
        if domain.source == "imagefolder":
            require_folder(domain.root, f"{key}.root")
    if config.verb == "protect":  # its sampler may depend on the data
        folder = config.run_dir or default_folder(config, "protect")
        refuse_another(folder, "protect", plain(config, "seed", "task", "method", "guard"))


def _domains(config: Config) -> dict[str, DomainConfig]:
    domain, opened = config.domain, {"domain.original": config.domain.original}
    if config.verb in _RESTRICTED or domain.pretrained_on == "both":
        opened |= keyed(domain.restricted)
    if config.verb in _BENIGN and domain.benign:
        opened["domain.benign"] = domain.benign
    return opened
