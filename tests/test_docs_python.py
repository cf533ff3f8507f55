"""The examples for Python in README and docs/ are run as they stand, at a size that takes seconds."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sophon
from sophon.api.calls import audit, protect
from sophon.config import DomainConfig
from tests.cli_helpers import REPOSITORY, image_folder
from tests.domains.made import load, save_image

pytestmark = pytest.mark.filterwarnings("ignore:.*no better than a guess")

METHOD = {"rounds": 1, "ntr_steps": 1, "ntr_batch_size": 4, "query_batch_size": 4}
SMALL = {f"method.{key}": value for key, value in METHOD.items()} | {
    "sampler": {"optimizers": {"sgd": [0.01, 0.1]}, "batch_sizes": [4], "steps": [1, 1], "heads": ["kept"]},
    "guard.tolerance": 100.0,
}
ATTACKS = {
    "attack": {
        "eval_points": 2,
        "masking": {"heads": []},
        "strategies": {"sgd": {"optimizer": "sgd", "lr": 0.1, "batch_size": 4, "steps": 1}},
    }
}
NETWORK = """
from torch import nn

class SmallNet(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.GroupNorm(2, 4), nn.ReLU())
        self.fc = nn.Linear(4, classes)

    def forward(self, images):
        return self.fc(self.features(images).mean((2, 3)))
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The blocks of README and of docs/models.md, in a folder with what they name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sophon, "protect", partial(protect, settings=SMALL), raising=False)
    monkeypatch.setattr(sophon, "audit", lambda *a, attacks=None, **k: audit(*a, settings=ATTACKS, **k), raising=False)
    (tmp_path / "my_networks.py").write_text(NETWORK)
    for name in ("animals", "people"):
        image_folder(tmp_path / "data" / name)
    pages = [(REPOSITORY / page).read_text() for page in ("README.md", "docs/models.md")]
    return [re.search(r"```python\n(import sophon.*?)```", page, re.DOTALL)[1] for page in pages]


@pytest.mark.slow
def test_a_network_of_ones_own(small: list[str]) -> None:
    names: dict = {}
    exec(small[0], names)
    from my_networks import SmallNet  # type: ignore[import-not-found]

    alone = SmallNet(classes=2)
    alone.load_state_dict(load_file("release/model.safetensors"))
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(alone.eval()(images), names["result"].model(images))
    assert "SmallNet" in Path("release/README.md").read_text()
    assert Path("report.html").stat().st_size > 1000


def test_a_table_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [f"images/{number}.png,{'cat' if number % 2 else 'dog'}" for number in range(10)]
    for number in range(10):
        save_image(Path(f"data/animals/images/{number}.png"), (number, 0, 0))
    Path("data/animals/labels.csv").write_text("\n".join(["image,label", *rows]))
    exec(re.search(r"```python\n(.*?)```", (REPOSITORY / "docs/data.md").read_text(), re.DOTALL)[1], {})
    train, test, _ = load(DomainConfig(name="x", source="imagefolder", root="data/animals"))
    assert (train.classes, train.labels.bincount().tolist()) == (("cat", "dog"), [4, 4])
    assert test.labels.bincount().tolist() == [1, 1]


@pytest.mark.slow  # imports transformers
def test_a_model_of_transformers(small: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.ViTConfig(**size, image_size=16, patch_size=8, num_labels=2)
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained("path/to/vit")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained("path/to/vit")
    names: dict = {}
    exec(small[1], names)
    released = transformers.AutoModelForImageClassification.from_pretrained("vit-release")
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(released(images).logits, names["result"].model(images).logits)
    assert json.loads(Path("runs/vit-audit/audit.json").read_text())["verdict"]["word"]
