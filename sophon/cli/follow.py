"""Defaults that follow from the model: a denoiser gets a denoiser's task, loss, attackers and guard."""

from __future__ import annotations

import json
from collections.abc import Sequence, Set
from contextlib import suppress
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sophon.cli.overrides import named
from sophon.config.shipped import USUAL, conf_dir
from sophon.paths import is_file

# Which key names the checkpoint of a verb, and which verb makes it.
_STARTS_FROM = {
    "protect": ("reference", "pretrain"),
    "audit": ("checkpoint", "protect"),
    "sample": ("checkpoint", "protect"),
}


def following(overrides: Sequence[str], searched: Sequence[str]) -> tuple[list[str], DictConfig]:
    """Add the group choices that follow from the run's model where neither the command nor its files chose.

    Args:
        overrides: of one run, as Hydra takes them.
        searched: folders of configuration groups besides the shipped ones.

    Returns:
        The overrides with those choices, and what they compose to, Hydra's own part included.
    """
    folders = json.dumps([f"file://{Path(folder).resolve()}" for folder in searched])

    def composed(overrides: Sequence[str]) -> DictConfig:
        config: DictConfig = compose("config", [*overrides, f"hydra.searchpath={folders}"], return_hydra_config=True)
        return config

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = composed(overrides)
        choices = _choices(config, named(overrides))
        if choices:
            config = composed([*choices, *overrides])
    return [*choices, *overrides], config


def _choices(config: DictConfig, chosen: Set[str]) -> list[str]:
    choices, usual = config.hydra.runtime.choices, USUAL["classification"]
    with suppress(OmegaConfBaseException):  # what does not resolve is refused where it is run
        if not {"task", "task.name"} & chosen and choices["task"] == usual["task"] and _is_denoiser(config):
            kept = {group for group, choice in usual.items() if choices[group] == choice} - chosen
            return [f"{group}={choice}" for group, choice in USUAL["denoising"].items() if group in kept]
    return []


def _is_denoiser(config: DictConfig) -> bool:
    """Return whether the run's model is a denoiser: by its checkpoint, where it starts from one that is there."""
    if config.verb in _STARTS_FROM or config.model.weights:
        key, maker = _STARTS_FROM.get(config.verb, ("model.weights", ""))
        given = OmegaConf.select(config, key)
        folder = Path(given or f"runs/{config.name}/seed{config.seed}/{maker}").expanduser()
        if is_file(folder / "model_index.json", key):
            return True
        for manifest in (folder / "sophon.json", folder / "checkpoint" / "sophon.json"):
            with suppress(OSError, ValueError, LookupError, TypeError):  # what is wrong with it, the verb says
                return bool(json.loads(manifest.read_bytes())["model"]["library"] == "diffusers")
    return bool(config.model.library == "diffusers")
