"""Every verb on a denoiser, as a user runs it, and how each refuses what a denoiser cannot do."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.cli_helpers import PRETRAIN as PRETRAIN_CLASSIFIER
from tests.cli_helpers import RUNS as CLASSIFIER
from tests.cli_helpers import SMALL as SMALL_CLASSIFIER
from tests.cli_helpers import image_folder, load, refusal, refused, sophon, tree

RUNS = Path("runs/quickstart_diffusion/seed0")
ROLES = ("protected", "unprotected", "scratch")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FILES = ["README.md", "model_index.json", "scheduler/scheduler_config.json", "sophon.json", "unet/config.json", WEIGHTS]

# The demonstration, at a size that takes a second.
SMALL = (
    "experiment=quickstart_diffusion",
    "tracking=disabled",
    "tracking.progress=false",
    "threads=1",
    "domain.original.per_class=20",
    "domain.original.test_per_class=6",
    "domain.restricted.per_class=10",
    "domain.restricted.test_per_class=3",
    "model.image_size=8",
    "model.model_args.block_out_channels=[8,8]",
    "model.model_args.down_block_types=[DownBlock2D,AttnDownBlock2D]",
    "model.model_args.up_block_types=[AttnUpBlock2D,UpBlock2D]",
    "model.model_args.norm_num_groups=4",
    "model.scheduler.num_train_timesteps=20",
    "task.evaluation_images=20",
    "task.sample_steps=2",
)
PRETRAIN = ("pretrain", *SMALL, "pretrain.steps=2", "pretrain.batch_size=8")
PROTECT = (
    "protect",
    *SMALL,
    "method.rounds=2",
    "method.ntr_steps=1",
    "method.ntr_batch_size=8",
    "method.query_batch_size=8",
    "sampler.steps=[1,2]",
    "sampler.batch_sizes=[8]",
    "guard.every=1",
    "guard.tolerance=1000",
)
# `--config-dir` is how users bring groups of their own; `own_attack` writes this one.
AUDIT = ("audit", "--config-dir=own", *SMALL, "attack=tiny")
STRATEGY = "{optimizer: momentum, lr: 0.01, head: kept, batch_size: 8, steps: 2}"
MASKING = "masking: {steps: 1, batches: 1}"  # as it ships, it takes longer than the attack
CONDITIONAL = "model.class_conditional=true"


def own_attack(folder: Path, strategy: str = STRATEGY) -> None:
    (folder / "own" / "attack").mkdir(parents=True, exist_ok=True)
    lines = ["seeds: 1", "eval_points: 2", "samples: 4", MASKING, "strategies:", f"  mine: {strategy}", ""]
    (folder / "own" / "attack" / "tiny.yaml").write_text("\n".join(lines))


def make(folder: Path, *commands: tuple[str, ...]) -> None:
    own_attack(folder)
    for command in commands:
        result = sophon(folder, *command)
        assert result.code == 0, result


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


def test_without_classes_no_labels_are_needed(copied: Path) -> None:
    """Images in ``train/`` and ``test/`` themselves serve to protect, and to attack with."""
    flat = image_folder(copied / "flat", ("any",), count=24)
    for side in ("train", "test"):
        for path in (flat / side / "any").iterdir():
            path.rename(flat / side / path.name)
        (flat / side / "any").rmdir()
    mine = f"[{{name: mine, source: imagefolder, root: {flat}, labels: none}}]"
    several = (f"domain.restricted={mine}", "run_dir=new")
    protect, audit = ([word for word in each if not word.startswith("domain.r")] for each in (PROTECT, AUDIT))
    assert sophon(copied, *protect, *several).code == 0
    restricted = load(copied / "new" / "checkpoint" / "sophon.json")["domains"]["restricted"]
    assert (restricted["name"], restricted["classes"]) == ("mine", ["unlabelled"])
    result = sophon(copied, *audit, *several[:1], "checkpoint=new", "run_dir=audited")
    assert result.code == 0, result
    assert load(copied / "audited" / "audit.json")["domains"]["restricted"] == "mine"


def manifest(folder: Path, verb: str) -> Any:
    return load(folder / RUNS / verb / "checkpoint" / "sophon.json")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def attempts(folder: Path) -> list[Any]:
    return [load(path) for path in sorted((folder / "attempts").iterdir())]


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["pretrain", "protect"])
def test_a_checkpoint_is_a_pipeline_that_says_what_it_is(made: Path, verb: str) -> None:
    checkpoint = made / RUNS / verb / "checkpoint"
    assert sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()) == FILES
    found = manifest(made, verb)
    assert found["verb"] == verb
    assert found["model"]["architecture"] == load(checkpoint / "unet/config.json")["_class_name"] == "UNet2DModel"
    assert found["config"]["task"]["name"] == "denoising"
    assert found["weights_sha256"] == sha256(checkpoint / WEIGHTS)
    assert {"torch", "diffusers"} <= set(found["versions"])
    intactness = found["intactness"]
    assert (intactness["metric"], intactness["unit"], intactness["higher_is_better"]) == ("eps-MSE", "", False)
    card = (checkpoint / "README.md").read_text()
    assert found["weights_sha256"] in card
    for value in intactness["after"].values():
        assert 0 < value < 10
        assert f"{value:.4g}" in card


def test_the_protected_manifest_continues_the_references(made: Path) -> None:
    found, reference = manifest(made, "protect"), manifest(made, "pretrain")
    assert found["parent_sha256"] == reference["weights_sha256"] != found["weights_sha256"]
    assert found["method"]["suppression_loss"] == "dos"
    assert found["model"] == reference["model"]
    assert found["intactness"]["before"] == reference["intactness"]["after"]
    assert (found["intactness"]["tolerance"], found["intactness"]["relative"]) == (1000, True)
    assert found["sampler_support"]["head"] == ["kept"]
    assert found["sampler_support"]["steps"] == [1, 2]


def test_the_export_loads_without_sophon_and_generates(copied: Path) -> None:
    from diffusers import DiffusionPipeline  # after sophon, which mends torchvision where torch has no CUDA

    assert sophon(copied, "export", f"checkpoint={RUNS / 'protect'}", "out=out").code == 0
    source = copied / RUNS / "protect" / "checkpoint"
    assert sorted(str(path.relative_to(copied / "out")) for path in (copied / "out").rglob("*.*")) == FILES
    assert load(copied / "out" / "sophon.json") == load(source / "sophon.json")
    pipeline = DiffusionPipeline.from_pretrained(copied / "out")
    pipeline.set_progress_bar_config(disable=True)
    stored = load_file(source / WEIGHTS)
    assert all(torch.equal(value, stored[name]) for name, value in pipeline.unet.state_dict().items())
    assert pipeline.scheduler.config.num_train_timesteps == 20
    (picture,) = pipeline(batch_size=1, num_inference_steps=2, output_type="np").images
    assert picture.shape == (8, 8, 1)


@pytest.mark.parametrize("name", [WEIGHTS, "unet/config.json", "model_index.json", "scheduler/scheduler_config.json"])
def test_a_checkpoint_with_a_damaged_part_is_refused_or_does_not_need_it(copied: Path, name: str) -> None:
    """The weights are hashed, the index must be there; the rest is in the manifest, and an export writes it anew."""
    source = copied / RUNS / "protect"
    (source / "checkpoint" / name).unlink()
    command = ("export", f"checkpoint={RUNS / 'protect'}", "out=out")
    if name in (WEIGHTS, "model_index.json"):
        assert name in refused(copied, *command)
    else:
        assert sophon(copied, *command).code == 0
        assert (copied / "out" / name).is_file()


def test_one_bit_of_a_weight_is_refused(copied: Path) -> None:
    path = copied / RUNS / "protect" / "checkpoint" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for command in (("export", f"checkpoint={RUNS / 'protect'}", "out=out"), ("sample", *SMALL)):
        assert "sha256" in refused(copied, *command)


def test_nothing_is_pickled_and_nothing_temporary_stays(made: Path) -> None:
    names = list(tree(made))
    assert not [name for name in names if name.endswith((".tmp", ".old", ".pt", ".pth", ".pkl", ".bin", ".ckpt"))]


def test_pretrain_and_protect_repeat_to_the_bit(made: Path, tmp_path: Path) -> None:
    make(tmp_path, PRETRAIN, PROTECT)
    for verb in ("pretrain", "protect"):
        part = RUNS / verb / "checkpoint" / WEIGHTS
        assert sha256(tmp_path / part) == sha256(made / part)


def test_a_pipeline_is_a_start(copied: Path) -> None:
    """The network and the schedule of a folder take the place of the configuration's."""
    make(copied, ("export", f"checkpoint={RUNS / 'protect'}", "out=pipeline"))
    (copied / "pipeline" / "sophon.json").unlink()
    command = (*PRETRAIN, "run_dir=new", "model.weights=pipeline", "pretrain.steps=0")
    make(copied, (*command, "model.scheduler.num_train_timesteps=77", "model.model_args.block_out_channels=[4,4]"))
    assert sha256(copied / "new" / "checkpoint" / WEIGHTS) == sha256(copied / RUNS / "protect/checkpoint" / WEIGHTS)
    model = load(copied / "new" / "checkpoint" / "sophon.json")["model"]
    assert model["scheduler"]["num_train_timesteps"] == 20
    assert model["model_args"]["block_out_channels"] == [8, 8]


def test_an_image_folder_is_a_domain(tmp_path: Path) -> None:
    image_folder(tmp_path / "images")
    folder = ("domain@domain.original=cinic10", "domain.original.root=images")
    make(tmp_path, (*PRETRAIN, *folder))
    assert manifest(tmp_path, "pretrain")["model"]["classes"] == ["cat", "dog"]


# ---- the audit ------------------------------------------------------------------------------------------------------


def test_an_attempt_of_each_role_is_measured_by_an_error(made: Path) -> None:
    found = attempts(made / RUNS / "audit")
    assert [record["role"] for record in found] == sorted(ROLES)
    for record in found:
        assert record["metric"] == {"name": "eps-MSE", "unit": "", "higher_is_better": False}
        assert record["exposure"] == "seen"
        assert [point["step"] for point in record["curve"]] == [0, 2]
        assert 0 < record["test"] < 10
        bands = {name for name in record["details"] if name.startswith("eps-MSE t ")}
        assert bands == {"eps-MSE t 0-4", "eps-MSE t 5-9", "eps-MSE t 10-14", "eps-MSE t 15-19"}
        mean = sum(record["details"][band] for band in bands) / len(bands)
        assert mean == pytest.approx(record["test"]), "20 images, 20 timesteps: each band has five"
        assert record["flops"] > 0


def test_samples_are_pictures_of_the_start_and_the_end(made: Path) -> None:
    folder = made / RUNS / "audit"
    for record in attempts(folder):
        assert [shot["step"] for shot in record["samples"]] == [0, 2]
        pictures = [(folder / shot["file"]).read_bytes() for shot in record["samples"]]
        assert pictures[0] != pictures[1]
        assert all(Image.open(io.BytesIO(picture)).format == "PNG" for picture in pictures)
        assert all(shot["file"].startswith("samples/") for shot in record["samples"])


def test_audit_json_says_which_way_is_better(made: Path) -> None:
    summary = load(made / RUNS / "audit" / "audit.json")
    assert summary["metric"] == {"name": "eps-MSE", "unit": "", "higher_is_better": False}
    assert summary["attempts"] == 3
    assert {each["step"] for each in summary["masking"]["seen"]} == {0, 1}
    (attack,) = summary["attacks"]
    assert set(attack["roles"]) == set(ROLES)
    by_role = {record["role"]: record["test"] for record in attempts(made / RUNS / "audit")}
    assert {role: found["mean"] for role, found in attack["roles"].items()} == pytest.approx(by_role)
    gap = (by_role["protected"] - by_role["unprotected"]) / (by_role["scratch"] - by_role["unprotected"])
    assert attack["gap_closed"]["value"] == pytest.approx(gap)
    intactness, stated = summary["intactness"], manifest(made, "protect")["intactness"]
    assert (intactness["before"], intactness["after"]) == (stated["before"]["test"], stated["after"]["test"])
    assert intactness["loss"]["value"] == pytest.approx(intactness["after"] - intactness["before"]), (
        "an error that grew is lost"
    )
    assert "eps-MSE" in (made / RUNS / "audit" / "report.md").read_text()


def test_curves_parquet_holds_every_point(made: Path) -> None:
    frame = pd.read_parquet(made / RUNS / "audit" / "curves.parquet")
    assert len(frame) == 3 * 2
    assert set(frame["role"]) == set(ROLES)


def test_the_page_is_one_file_with_its_pictures(made: Path) -> None:
    page = (made / RUNS / "audit" / "report.html").read_text()
    sources = re.findall(r"<img[^>]*\bsrc=\"([^\"]*)\"", page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for source in sources:
        Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))).verify()
    assert "<script src" not in page
    assert "<link" not in page


def test_report_writes_the_same_again(copied: Path) -> None:
    folder = copied / RUNS / "audit"
    before = tree(folder)
    (folder / "report.html").unlink()
    (folder / "report.md").write_text("")
    result = sophon(copied, "report", f"run_dir={RUNS / 'audit'}")
    assert result.code == 0, result
    assert tree(folder) == before
    assert "`mine`" in result.out


def test_an_audit_goes_on_with_what_is_missing(copied: Path) -> None:
    folder = copied / RUNS / "audit"
    before = tree(folder / "samples")
    kept, *lost = sorted((folder / "attempts").iterdir())
    content = kept.read_bytes()
    for path in lost:
        path.unlink()
    make(copied, AUDIT)
    assert kept.read_bytes() == content
    assert len(list((folder / "attempts").iterdir())) == 3
    assert tree(folder / "samples") == before, "the same noise, the same pictures"


def test_without_samples_none_are_drawn(copied: Path) -> None:
    make(copied, (*AUDIT, "run_dir=new", "attack.samples=0"))
    assert not list((copied / "new").rglob("*.png"))
    assert all(not record["samples"] for record in attempts(copied / "new"))
    assert "<img" not in (copied / "new" / "report.html").read_text()


@pytest.mark.parametrize(
    ("strategy", "outside"),
    [("{head: kept, batch_size: 8, steps: 2, scope: attention, optimizer: momentum, lr: 0.01}", ["scope"]),
     ("{head: kept, batch_size: 8, steps: 1, scope: last_blocks, optimizer: sgd, lr: 0.1}", ["optimizer", "scope"]),
     ("{head: kept, batch_size: 8, steps: 2, ema: 0.9, optimizer: momentum, lr: 0.01}", ["ema"])],
)  # fmt: skip
def test_attacks_of_other_kinds_are_held_out(copied: Path, strategy: str, outside: list[str]) -> None:
    own_attack(copied, strategy)
    make_again = (*AUDIT, "run_dir=new", "attack.samples=0", "attack.roles=[protected]")
    result = sophon(copied, *make_again)
    assert result.code == 0, result
    (record,) = attempts(copied / "new")
    assert (record["exposure"], record["outside"]) == ("held_out", outside)


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
    make(copied, command)
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

WRONG = {
    "unknown task": ("task.name=juggling", ["task.name", "juggling", "classification, denoising"]),
    "a classifier's task": ("task=classification", ["model.library", "diffusers", "timm, torchvision"]),
    "no images to measure": ("task.evaluation_images=0", ["task.evaluation_images", "0", ">= 1"]),
    "no steps to sample in": ("task.sample_steps=0", ["task.sample_steps", "0", ">= 1"]),
    "other normalisation": ("model.mean=[0.4]", ["model.mean", "0.4", "0.5"]),
    "unknown prediction": ("+model.scheduler.prediction_type=magic", ["prediction_type", "magic", "v_prediction"]),
    "size that cannot be halved": ("model.image_size=9", ["model.image_size", "9"]),
    "groups that do not divide": ("model.model_args.norm_num_groups=3", ["model.model_args", "3"]),
    "average of all": ("pretrain.ema=1", ["pretrain.ema", "1"]),
    "no training": ("pretrain.steps=0", ["pretrain.steps", "model.weights"]),
    "a layer's own key": ("+model.model_args.num_class_embeds=3", ["model.model_args.num_class_embeds"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gives_one_line_that_names_it_and_writes_nothing(tmp_path: Path, case: str) -> None:
    override, words = WRONG[case]
    message = refused(tmp_path, *PRETRAIN, override)
    for word in words:
        assert word in message


WRONG_FOR_PROTECT = {
    "a classifier's loss": ("method.suppression_loss=klu", ["method.suppression_loss", "klu", "dos"]),
    "a classifier's task": ("task=classification", ["model.library", "diffusers"]),
    "a head that is not there": ("sampler.heads=[kept,fresh]", ["head", "fresh", "class-conditional"]),
    "a scope that is not there": ("sampler.scopes=[head]", ["scope", "head"]),
    "other original classes": ("domain@domain.original=mnist_digits", ["domain.original", "10 classes"]),
    "unknown augmentation": ("sampler.augmentations=[magic]", ["magic"]),
}


@pytest.mark.parametrize("case", WRONG_FOR_PROTECT)
def test_protect_refuses_what_does_not_fit_before_it_writes(copied: Path, case: str) -> None:
    override, words = WRONG_FOR_PROTECT[case]
    message = refused(copied, *PROTECT, "run_dir=new", override)
    for word in words:
        assert word in message


WRONG_FOR_AUDIT = {
    "fresh head": ("++attack.strategies.mine.head=fresh", ["head", "fresh", "allowed: kept"]),
    "probed head": ("++attack.strategies.mine.head=probed", ["head", "probed", "allowed: kept"]),
    "scope of a head": ("++attack.strategies.mine.scope=head", ["scope", "head"]),
    "unknown scope": ("++attack.strategies.mine.scope=tail", ["scope", "tail", "attention"]),
    "a classifier's task": ("task=classification", ["model.library", "diffusers"]),
    "budget above what there is": ("++attack.strategies.mine.data_budget=100000", ["data_budget", "100000"]),
}


@pytest.mark.parametrize("case", WRONG_FOR_AUDIT)
def test_audit_refuses_what_does_not_fit_before_any_attempt(copied: Path, case: str) -> None:
    override, words = WRONG_FOR_AUDIT[case]
    message = refused(copied, *AUDIT, "run_dir=new", override)
    for word in words:
        assert word in message


def test_audit_of_a_classifier_as_a_denoiser_is_refused(made: Path, classifier: Path) -> None:
    both = (f"checkpoint={classifier}", f"reference={classifier}")
    assert "model.library" in refused(made, *AUDIT, "run_dir=new", *both)
    assert "reference" in refused(made, *AUDIT, "run_dir=new", f"reference={classifier}")


# ---- the guard and losses that are not finite -----------------------------------------------------------------------


def test_a_guard_that_accepts_nothing_exits_with_3_and_says_percent(copied: Path) -> None:
    command = (*PROTECT, "run_dir=new", "guard.tolerance=0.5", "guard.repair_steps=0", "method.fts_lr=10")
    for _ in range(2):
        message = refusal(sophon(copied, *command), 3)
        assert message.startswith("guard.tolerance: no round kept eps-MSE on val within 0.5 % of ")
        assert not (copied / "new" / "checkpoint").exists()


def test_a_diverging_pretraining_says_what_to_lower(tmp_path: Path) -> None:
    message = refusal(sophon(tmp_path, *PRETRAIN, "pretrain.optimizer=sgd", "pretrain.lr=1e30", "pretrain.steps=9"))
    assert message.startswith("pretrain.lr: ")
    assert not list(tmp_path.rglob("checkpoint"))


def test_exactly_differentiated_protection(copied: Path) -> None:
    make(copied, (*PROTECT, "run_dir=new", "method.engine=second_order", "method.pool=0"))
    first, second = (copied / folder / "checkpoint" / WEIGHTS for folder in (RUNS / "protect", "new"))
    assert sha256(first) != sha256(second)
