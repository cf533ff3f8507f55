"""Every verb on a denoiser, as a user runs it, and how each refuses what a denoiser cannot do."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.cli_helpers import PRETRAIN as PRETRAIN_CLASSIFIER
from tests.cli_helpers import RUNS as CLASSIFIER
from tests.cli_helpers import SMALL as SMALL_CLASSIFIER
from tests.cli_helpers import image_folder, load, refused, sophon, tree
from tests.denoising_commands import (
    AUDIT,
    CONDITIONAL,
    PRETRAIN,
    PROTECT,
    ROLES,
    RUNS,
    SMALL,
    WEIGHTS,
    make,
    own_attack,
)

pytestmark = pytest.mark.slow  # whole commands


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which pretrain, protect and audit have run; never written to again."""
    folder = tmp_path_factory.mktemp("made")
    make(folder, PRETRAIN, PROTECT, AUDIT)
    return folder


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a class-conditional reference of five classes."""
    folder = tmp_path_factory.mktemp("conditional")
    make(folder, (*PRETRAIN, CONDITIONAL))
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a classifier's checkpoint."""
    folder = tmp_path_factory.mktemp("classifier")
    make(folder, (*PRETRAIN_CLASSIFIER, "pretrain.steps=1"))
    return folder / CLASSIFIER / "pretrain"


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copied"))


def test_a_folder_without_classes_is_one_class(copied: Path) -> None:
    """Images in ``train/`` and ``test/`` themselves serve to protect, and to attack with."""
    flat = image_folder(copied / "flat", ("any",), count=24)
    for side in ("train", "test"):
        for path in (flat / side / "any").iterdir():
            path.rename(flat / side / path.name)
        (flat / side / "any").rmdir()
    mine = (
        "domain@domain.restricted=objects_a",
        "domain.restricted.name=mine",
        f"domain.restricted.root={flat}",
    )
    protect, audit = ([word for word in each if not word.startswith("domain.r")] for each in (PROTECT, AUDIT))
    assert sophon(copied, *protect, *mine, "run_dir=new").code == 0
    restricted = load(copied / "new" / "checkpoint" / "sophon.json")["domains"]["restricted"]
    assert (restricted["name"], restricted["classes"]) == ("mine", ["image"])
    result = sophon(copied, *audit, *mine, "checkpoint=new", "run_dir=audited")
    assert result.code == 0, result
    assert load(copied / "audited" / "audit.json")["domains"]["restricted"] == "mine"


def manifest(folder: Path, verb: str) -> Any:
    return load(folder / RUNS / verb / "checkpoint" / "sophon.json")


def attempts(folder: Path) -> list[Any]:
    return [load(path) for path in sorted((folder / "attempts").iterdir())]


# ---- the audit ------------------------------------------------------------------------------------------------------


def test_an_attempt_of_each_role_is_measured_by_an_error(made: Path) -> None:
    found, metric = attempts(made / RUNS / "audit"), {"name": "eps-MSE", "unit": "", "higher_is_better": False}
    assert [record["role"] for record in found] == sorted(ROLES)
    for record in found:
        assert record["metric"] == metric
        assert record["exposure"] == "seen"
        assert [point["step"] for point in record["curve"]] == [0, 2]
        bands = {name for name in record["details"] if name.startswith("eps-MSE t ")}
        assert bands == {"eps-MSE t 0-4", "eps-MSE t 5-9", "eps-MSE t 10-14", "eps-MSE t 15-19"}
        mean = sum(record["details"][band] for band in bands) / len(bands)
        assert mean == pytest.approx(record["test"]), "20 images, 20 timesteps: each band has five"
    summary = load(made / RUNS / "audit" / "audit.json")
    assert summary["metric"] == metric
    of = {record["role"]: record["test"] for record in found}
    gap = (of["protected"] - of["unprotected"]) / (of["scratch"] - of["unprotected"])
    assert summary["attacks"][0]["gap_closed"]["value"] == pytest.approx(gap)
    intactness, stated = summary["intactness"], manifest(made, "protect")["intactness"]
    assert (intactness["before"], intactness["after"]) == (stated["before"]["test"], stated["after"]["test"])
    lost = intactness["after"] - intactness["before"]
    assert intactness["loss"]["value"] == pytest.approx(lost), "an error that grew is lost"
    assert (stated["tolerance"], stated["relative"]) == (1000, True)


# ---- samples --------------------------------------------------------------------------------------------------------


def test_sample_writes_one_grid_that_repeats(copied: Path) -> None:
    command = ("sample", *SMALL, "n=9")
    make(copied, command)
    path = copied / RUNS / "sample" / "samples.png"
    first = path.read_bytes()
    picture = Image.open(io.BytesIO(first))
    assert picture.format == "PNG"
    assert picture.width == picture.height
    assert picture.width >= 3 * 8
    path.unlink()
    again = sophon(copied, *command, "tracking.progress=true")
    assert re.search(r"^sample (\d+)/\1, ", again.err, re.MULTILINE), again
    assert path.read_bytes() == first
    make(copied, (*command, "checkpoint=" + str(RUNS / "pretrain"), "run_dir=other"))
    assert (copied / "other" / "samples.png").read_bytes() != first
    assert tree(copied / RUNS / "sample").keys() == {"samples.png"}


def test_sample_of_a_classifier_is_refused(copied: Path, classifier: Path) -> None:
    message = refused(copied, "sample", *SMALL_CLASSIFIER, f"checkpoint={classifier}")
    assert message.endswith("is a model of classification; give a denoiser's")


# ---- class-conditional ----------------------------------------------------------------------------------------------


def test_a_conditional_denoiser_through_every_verb(conditional: Path, tmp_path: Path) -> None:
    """Five classes of clothes; ten of digits, so that no head can be kept."""
    folder = Path(shutil.copytree(conditional, tmp_path / "copied"))
    own_attack(folder, "{optimizer: momentum, lr: 0.01, head: fresh, batch_size: 8, steps: 2}")
    heads = "sampler.heads=[fresh,probed]"
    audit = (*AUDIT, CONDITIONAL)
    sample = ("sample", *SMALL, "n=4")
    for command in ((*PROTECT, heads, "method.probe_steps=1"), audit, sample):
        result = sophon(folder, *command)
        assert result.code == 0, result
    found = manifest(folder, "protect")
    assert found["model"]["model_args"]["num_class_embeds"] == 5
    assert load_file(folder / RUNS / "protect/checkpoint" / WEIGHTS)["class_embedding.weight"].shape[0] == 5
    assert {record["exposure"] for record in attempts(folder / RUNS / "audit")} == {"seen"}
    assert (folder / RUNS / "sample" / "samples.png").is_file()


def test_a_kept_head_with_other_classes_is_refused_before_anything_is_written(conditional: Path) -> None:
    message = refused(conditional, *PROTECT, "run_dir=new")
    assert message.startswith("head: 'kept' needs as many classes")
    assert all(number in message for number in ("5", "10"))


# ---- wrong words ----------------------------------------------------------------------------------------------------

WRONG: dict[tuple[str, ...], dict[str, list[str]]] = {
    PRETRAIN: {
        "task.name=juggling": ["task.name", "juggling", "classification, denoising"],
        "task=classification": ["task.name", "diffusers", "allowed: denoising"],
        "model.mean=[0.4]": ["model.mean", "0.4", "0.5"],
        "+model.scheduler.prediction_type=magic": ["prediction_type", "magic", "v_prediction"],
        "model.model_args.norm_num_groups=3": ["model.model_args", "3"],
        "+model.model_args.num_class_embeds=3": ["model.model_args.num_class_embeds"],
    },
    PROTECT: {
        "method.suppression_loss=klu": ["method.suppression_loss", "klu", "dos"],
        "sampler.heads=[kept,fresh]": ["head", "fresh", "class-conditional"],
        "domain@domain.original=mnist_digits": ["domain.original", "10 classes"],
    },
    AUDIT: {
        "++attack.strategies.mine.head=fresh": ["head", "fresh", "allowed: kept"],
        "++attack.strategies.mine.scope=head": ["scope", "head"],
    },
}


@pytest.mark.parametrize(
    ("command", "override", "words"),
    [(command, *case) for command, cases in WRONG.items() for case in cases.items()],
    ids=lambda value: value[0] if isinstance(value, tuple) else str(value)[:40],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    copied: Path, command: tuple[str, ...], override: str, words: list[str]
) -> None:
    message = refused(copied, *command, "run_dir=new", override)
    assert all(word in message for word in words), message


def test_audit_of_a_classifier_as_a_denoiser_is_refused(made: Path, classifier: Path) -> None:
    both = (f"checkpoint={classifier}", f"reference={classifier}")
    assert "task.name" in refused(made, *AUDIT, "run_dir=new", *both)
    assert "reference" in refused(made, *AUDIT, "run_dir=new", f"reference={classifier}")


# ---- the guard and losses that are not finite -----------------------------------------------------------------------


def test_a_guard_that_accepts_nothing_exits_with_3_and_says_percent(copied: Path) -> None:
    command = (*PROTECT, "run_dir=new", "guard.tolerance=0.5", "guard.repair_steps=0", "method.fts_lr=10")
    for _ in range(2):
        result = sophon(copied, *command)
        assert result.code == 3
        last = result.err.splitlines()[-1]
        assert last.startswith("sophon: guard.tolerance: no round kept eps-MSE on val within 0.5 % of ")
        assert not (copied / "new" / "checkpoint").exists()
