"""The shipped files composed without Hydra are what Hydra composes of them."""

from __future__ import annotations

from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

from sophon import cli  # noqa: F401  (tells Hydra the schema)
from sophon.config.shipped import STANDARD, USUAL, chosen, conf_dir
from sophon.errors import UserError
from sophon.losses import DENOISING_SUPPRESSION_LOSSES
from tests.tiny import slow

PLAIN = ["guard=relative", "method=mlac", "pretrain=adam_ema", "sampler=tar", "task=denoising"]
LISTING = [f"attack={path.stem}" for path in (conf_dir() / "attack").glob("*.yaml") if "defaults:" in path.read_text()]


@pytest.mark.parametrize("choice", [*PLAIN, *slow(LISTING, ("attack=full", "attack=standard"))])
def test_a_choice_is_composed_as_by_hydra(choice: str) -> None:
    group, name = choice.split("=")
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed = hydra.compose("config", ["verb=audit", choice])[group]
    ours = chosen(group, name)
    # the schema adds its defaults, the file's own keys are all there
    assert OmegaConf.to_container(composed) == OmegaConf.to_container(OmegaConf.merge(composed, ours))
    assert ours.get("strategies", {}).keys() == composed.get("strategies", {}).keys()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("sophon_kul", r"^method: 'sophon_kul' is not known.*sophon_klu"),
        ("none.yaml", r"^method: 'none.yaml' is not known"),
        ("broken.yaml", r"broken.yaml: "),
        ("m" * 300, r"^method: cannot read .*File name too long$"),
    ],
)
def test_what_cannot_be_had_is_one_line(tmp_path: Any, monkeypatch: Any, choice: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text("a: [1\nb: }")
    with pytest.raises(UserError, match=message) as caught:
        chosen("method", choice)
    assert "\n" not in str(caught.value)


def test_a_file_of_ones_own_and_plain_data(tmp_path: Any) -> None:
    (tmp_path / "mine.yaml").write_text("defaults:\n  - sophon_klu\nrounds: 3\n")
    (tmp_path / "sophon_klu.yaml").write_text("name: mine\nrounds: 1\n")
    assert chosen("method", str(tmp_path / "mine.yaml")) == {"name": "mine", "rounds": 3}
    assert chosen("method", {"rounds": 5}) == {"rounds": 5}


@pytest.mark.parametrize("method", ["unlearn_esd", "undo_dos", "unlearn_dos", "dos_pool", "sophon_dos"])
def test_a_denoisers_method_has_a_denoisers_loss(method: str) -> None:
    assert chosen("method", method)["suppression_loss"] in DENOISING_SUPPRESSION_LOSSES


def test_what_is_usual_exists() -> None:
    for kind, usual in USUAL.items():
        for group, choice in {**usual, "attack": STANDARD[kind]}.items():
            assert chosen(group, choice)
