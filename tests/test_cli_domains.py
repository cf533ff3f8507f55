"""Several restricted domains, and domains without labels, from the command line to what is written."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from sophon.cli import conf_dir, with_several_domains
from sophon.config import Config, DomainConfig, plain
from sophon.errors import UserError
from sophon.losses import READS_LABELS, SUPPRESSION_LOSSES
from sophon.validation import from_omegaconf
from sophon.verbs.common import with_pseudo_labels
from tests.cli_helpers import (
    AUDIT,
    PRETRAIN,
    PROTECT,
    RUNS,
    load,
    own_groups,
    refusal,
    refused,
    sophon,
    start,
    tree,
    weights_sha256,
)
from tests.tiny import tiny_denoising, tiny_domain, tiny_model, tiny_task, tiny_unet

DIGITS = "{name: digits, source: bundled, dataset: mnist, classes: ['0', '1', '2', '3', '4'], per_class: 40}"
LIST = f"domain.restricted=[fashion_shoes_bags, {DIGITS}]"
TWO = (LIST, "domain.several.fashion_shoes_bags.per_class=40", "domain.several.digits.test_per_class=20")
NAMES = ["fashion_shoes_bags", "digits"]
FLAT = ("domain.restricted.labels=none", "domain.restricted.clusters=5")


def of_several(command: tuple[str, ...]) -> tuple[str, ...]:
    """Return a command of `tests.cli_helpers` for both domains."""
    return (*(word for word in command if not word.startswith("domain.restricted.")), *TWO)


# ---- the configuration ----------------------------------------------------------------------------------------------


def typed(*overrides: str) -> Config:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return from_omegaconf(hydra.compose("config", overrides=with_several_domains(["verb=protect", *overrides])))


def test_a_list_names_files_and_holds_mappings_in_its_own_order() -> None:
    mapping = r"{name: 'it\'s', source: imagefolder, root: 'a, b', classes: [x, y], per_class: null, download: true}"
    config = typed(f"domain.restricted=[{mapping}, objects_b]", "domain.several.objects_b.per_class=7")
    first, second = config.domain.restricted
    assert first == DomainConfig("it's", "imagefolder", root="a, b", classes=["x", "y"], download=True)
    assert (second.name, second.root, second.per_class) == ("objects_b", "data/objects_b", 7)
    assert from_omegaconf(OmegaConf.create(plain(config))) == config


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_a_list_takes_the_place_of_an_experiments_domain(prefix: str) -> None:
    config = typed("experiment=paper", f"{prefix}domain.restricted=[stl10,svhn]")
    assert [each.name for each in config.domain.restricted] == ["stl10", "svhn"]
    assert config.name == "paper_caformer_m36_stl10+svhn"


def test_a_list_of_one_is_that_one() -> None:
    assert typed("domain.restricted=[mnist]").domain == typed("domain@domain.restricted=mnist").domain


def test_a_defaults_list_may_name_several_and_the_command_line_choose() -> None:
    several = [f"+domain@domain.several.{name}={name}" for name in ("mnist", "svhn")]
    assert [each.name for each in typed(*several).domain.restricted] == ["mnist", "svhn"]
    assert [each.name for each in typed(*several, "domain.chosen=[svhn]").domain.restricted] == ["svhn"]


def test_one_domain_is_written_as_it_was_given() -> None:
    written = plain(typed("domain@domain.restricted=mnist", "domain.restricted.per_class=100"))["domain"]["restricted"]
    assert (written["name"], written["per_class"]) == ("mnist", 100)


WRONG = {
    "unknown name": (("domain.restricted=[mnist,nope]",), ["domain/nope", "objects_a", "svhn"]),
    "the same twice": (("domain.restricted=[mnist,mnist]",), ["domain.restricted", "each once"]),
    "the same name": (("domain.restricted=[mnist,svhn]", "domain.several.svhn.name=mnist"), ["'mnist'", "2 times"]),
    "no folder's name": (("domain.restricted=[mnist,svhn]", "domain.several.svhn.name=a/b"), ["'a/b'", "folder"]),
    "none": (("domain.restricted=[]",), ["domain.restricted", "one domain or more"]),
    "a number": (("domain.restricted=[mnist,3]",), ["domain.restricted", "3", "conf/domain"]),
    "without a name": (("domain.restricted=[{source: bundled}]",), ["domain.restricted", "bundled", "name"]),
    "without a source": (("domain.restricted=[{name: a}]",), ["domain.several.a.source", "missing"]),
    "unknown key": (("domain.restricted=[{name: a, sourc: b}]",), ["sourc", "DomainConfig"]),
    "wrong type": (("domain.restricted=[{name: a, per_class: many}]",), ["per_class", "many"]),
    "half a list": (("domain.restricted=[mnist",), ["domain.restricted=[mnist"]),
    "a sweep": (("domain.restricted=[mnist],[svhn]",), ["sweep"]),
    "beside a key": ((LIST, "domain.restricted.per_class=3"), ["domain.restricted.per_class=3", "domain.several"]),
    "beside a choice": ((LIST, "domain@domain.restricted=mnist"), ["domain@domain.restricted=mnist"]),
    "beside a list": ((LIST, "domain.restricted=[mnist]"), ["domain.restricted=[mnist]"]),
    "not among them": (("domain.chosen=[svhn]", "+domain@domain.several.a=mnist"), ["domain.chosen", "svhn", "a"]),
    "labels": (("domain.restricted.labels=some",), ["domain.restricted.labels", "some", "given, none"]),
    "one cluster": (("domain.restricted.clusters=1",), ["domain.restricted.clusters", "1", ">= 2"]),
    "original labels": (("domain.original.labels=none",), ["domain.original.labels", "none"]),
    "benign labels": (("+domain@domain.benign=mnist", "domain.benign.labels=none"), ["domain.benign.labels", "none"]),
}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["domain.restricted=[]"], "give one domain or more, and each once"),
        (["domain.restricted=[a,b,a]"], "give one domain or more, and each once"),
        (["domain.restricted=[a,[b]]"], "['b'] is not allowed"),
        (["domain.restricted=[a,{source: b}]"], "is not allowed; name files"),
        (["domain.restricted=[a],[b]"], "a sweep over lists"),
        (["domain.restricted=[a"], "domain.restricted=[a: "),
        (["domain.restricted=[a]", "~domain@domain.restricted"], "not allowed beside domain.restricted=[a]"),
        (["domain.restricted.root=b", "+domain.restricted=[a]"], "not allowed beside +domain.restricted=[a]"),
    ],
)
def test_a_list_that_cannot_be_said_in_hydras_terms(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        with_several_domains(overrides)
    assert "\n" not in str(caught.value)


def test_other_overrides_stay_as_they_are() -> None:
    overrides = ["verb=audit", "domain@domain.restricted=mnist", "domain.restricted.classes=['1','2']", "seed=1,2"]
    assert with_several_domains(overrides) == overrides
    assert with_several_domains([*overrides[::3], "domain.restricted=[a]"])[-2:] == ["verb=audit", "seed=1,2"]


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG)
def test_what_makes_no_domains_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    overrides, words = WRONG[case]
    message = refused(tmp_path, "protect", "tracking=disabled", *overrides)
    for word in words:
        assert word in message


@pytest.mark.slow
def test_cfg_prints_the_domains_and_runs_nothing(tmp_path: Path) -> None:
    result = sophon(tmp_path, *of_several(PROTECT), "--cfg", "job")
    assert result.code == 0
    domains = yaml.safe_load(result.out)["domain"]
    assert domains["chosen"] == NAMES
    assert {name: each["per_class"] for name, each in domains["several"].items()} == dict.fromkeys(NAMES, 40)
    assert not tree(tmp_path)


@pytest.mark.slow
def test_a_list_is_no_sweep(tmp_path: Path) -> None:
    """The sweep's first job has both domains, and is refused for want of a reference."""
    result = sophon(tmp_path, *of_several(PROTECT), "--multirun", "seed=0,1")
    assert result.code == 2
    jobs = [line for line in result.err.splitlines() if line.startswith("Error executing job")]
    assert len(jobs) == 1
    assert "seed=0" in jobs[0]
    assert "fashion_shoes_bags" in jobs[0]
    assert "digits" in jobs[0]


# ---- without labels -------------------------------------------------------------------------------------------------


def test_the_losses_that_read_labels_are_those_that_change_with_them() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.0, 0.0]])
    for name, loss in SUPPRESSION_LOSSES.items():
        first, second = (float(loss(logits, torch.tensor(labels))) for labels in ([0, 1], [2, 0]))
        assert (first != second) is (name in READS_LABELS), name


def test_pseudo_labels_are_clusters_of_the_references_features() -> None:
    domain, model, task = tiny_domain("d", ("adapt", "query")), tiny_model(), tiny_task()
    config = DomainConfig("d", labels="none", clusters=2)
    modes = [module.training for module in model.modules()]
    found = with_pseudo_labels(domain, config, "domain.restricted", task, model)
    assert found.classes == ("cluster_0", "cluster_1")
    assert modes == [module.training for module in model.modules()]
    features = task.features(model.eval(), domain["query"].images)
    assert features is not None
    features = features.detach()
    centres = [features[found["query"].labels == label].mean(0) for label in range(2)]
    apart = float((centres[0] - centres[1]).norm())
    within = [float((features[found["query"].labels == label] - centres[label]).norm(dim=1).mean()) for label in (0, 1)]
    assert max(within) < apart
    assert with_pseudo_labels(domain, DomainConfig("d"), "domain.restricted", task, model) is domain


@pytest.mark.parametrize("conditional", [False, True])
def test_a_denoiser_has_no_features_and_keeps_one_class(conditional: bool) -> None:
    domain, config = tiny_domain("d", ("adapt",)), DomainConfig("d", labels="none")
    task, model = tiny_denoising(conditional=conditional), tiny_unet(conditional=conditional)
    assert with_pseudo_labels(domain, config, "domain.restricted", task, model) is domain


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    own_groups(folder)
    result = sophon(folder, *PRETRAIN)
    assert result.code == 0, result
    return folder


@pytest.fixture
def copied(pretrained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pretrained, tmp_path / "copied"))


@pytest.mark.slow
def test_protecting_without_labels(copied: Path) -> None:
    result = sophon(copied, *PROTECT, *FLAT)
    assert result.code == 0, result
    restricted = load(copied / RUNS / "protect" / "checkpoint" / "sophon.json")["domains"]["restricted"]
    assert restricted["classes"] == [f"cluster_{index}" for index in range(5)]
    assert sophon(copied, *PROTECT, *FLAT, "run_dir=again").code == 0
    again = load(copied / "again" / "checkpoint" / "sophon.json")["domains"]["restricted"]
    assert again["hashes"] == restricted["hashes"]
    assert "restricted" in refused(copied, *PROTECT, *FLAT, "domain.restricted.split_seed=1")
    # an attacker has labels
    message = refused(copied, *AUDIT, *FLAT)
    assert message.startswith("domain.restricted.labels: ")
    assert "given" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        *(
            (("method.suppression_loss=" + name,), ["method.suppression_loss", name, "klu"])
            for name in sorted(READS_LABELS)
        ),
        (("domain.restricted.clusters=4",), ["'kept'", "5", "4"]),
        (("domain.restricted.clusters=1000",), ["domain.restricted.clusters", "1000", "fewer"]),
    ],
)
def test_what_needs_labels_is_refused(copied: Path, overrides: tuple[str, ...], words: list[str]) -> None:
    message = refused(copied, *PROTECT, *FLAT, *overrides)
    for word in words:
        assert word in message


# ---- several, from end to end ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which both domains were protected against and audited; never written to again."""
    folder = Path(shutil.copytree(pretrained, tmp_path_factory.mktemp("made") / "both"))
    for command in (PROTECT, AUDIT):
        result = sophon(folder, *of_several(command))
        assert result.code == 0, result
    return folder


@pytest.mark.slow
def test_the_manifest_and_the_card_name_both(made: Path) -> None:
    checkpoint = made / RUNS / "protect" / "checkpoint"
    manifest = load(checkpoint / "sophon.json")
    restricted = manifest["domains"]["restricted"]
    assert [each["name"] for each in restricted] == NAMES
    assert [each["name"] for each in manifest["config"]["domain"]["restricted"]] == NAMES
    digests = [digest for each in restricted for digest in each["hashes"].values()]
    assert len(set(digests)) == len(digests) == 10
    card = (checkpoint / "README.md").read_text()
    assert "**fashion_shoes_bags** and **digits**" in card
    assert all(digest in card for digest in digests)


@pytest.mark.slow
def test_a_protection_goes_on_only_with_the_same_domains_in_the_same_order(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "copied"))
    digest = weights_sha256(folder / RUNS / "protect" / "checkpoint")
    assert "already done" in sophon(folder, *of_several(PROTECT)).out
    assert sophon(folder, *of_several(PROTECT), "run_dir=again").code == 0
    assert weights_sha256(folder / "again" / "checkpoint") == digest
    turned = [word for word in of_several(PROTECT) if word != LIST]
    assert "order" in refused(folder, *turned, f"domain.restricted=[{DIGITS}, fashion_shoes_bags]")
    assert "restricted" in refused(folder, *PROTECT)


@pytest.mark.slow
def test_each_domain_has_an_audit_of_its_own_and_they_are_compared(made: Path) -> None:
    folder = made / RUNS / "audit"
    assert sorted(path.name for path in folder.iterdir()) == ["comparison.html", "comparison.md", *sorted(NAMES)]
    text = (folder / "comparison.md").read_text()
    for name in NAMES:
        summary = load(folder / name / "audit.json")
        assert summary["domains"]["restricted"] == name
        assert summary["verdict"].split("(")[0] in text
        assert f"seed 0 ({name})" in text
        assert (folder / name / "report.html").exists()


def audited(folder: Path) -> dict[str, Any]:
    return {
        name: {key: value for key, value in load(folder / name / "audit.json").items() if key != "seconds_total"}
        for name in NAMES
    }


@pytest.mark.slow
def test_the_audit_of_one_of_them_is_the_same_by_itself(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "copied"))
    one = f"domain.restricted=[{DIGITS}]"
    command = [word for word in AUDIT if not word.startswith("domain.restricted.")]
    reuse = f"attack.reuse=[{RUNS / 'audit' / 'digits'}]"
    result = sophon(folder, *command, one, "domain.several.digits.test_per_class=20", "run_dir=alone", reuse)
    assert result.code == 0, result
    alone, both = load(folder / "alone" / "audit.json"), load(folder / RUNS / "audit" / "digits" / "audit.json")
    assert alone["attacks"] == both["attacks"]
    assert {path.name for path in (folder / "alone" / "attempts").iterdir()} == {
        path.name for path in (folder / RUNS / "audit" / "digits" / "attempts").iterdir()
    }
    assert "one domain" in refused(folder, *of_several(AUDIT), "run_dir=alone")
    assert "run.json" in refused(folder, *command, one, f"run_dir={RUNS / 'audit'}")


@pytest.mark.slow
def test_report_writes_them_and_their_comparison_again(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "copied"))
    before = tree(folder)
    for name in ("comparison.md", *(f"{name}/report.md" for name in NAMES)):
        (folder / RUNS / "audit" / name).unlink()
    result = sophon(folder, "report", f"run_dir={RUNS / 'audit'}")
    assert result.code == 0, result
    after = tree(folder)
    assert {name: after[name] for name in after if name.endswith(".md")} == {
        name: before[name] for name in before if name.endswith(".md")
    }
    for name in NAMES:
        assert re.search(rf"^{name}: ", result.out, re.MULTILINE)


@pytest.mark.slow
def test_an_audit_killed_in_its_second_domain_goes_on(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "copied"))
    shutil.rmtree(folder / RUNS / "audit")
    process = start(folder, *of_several(AUDIT))
    first, second = (folder / RUNS / "audit" / name for name in NAMES)
    while process.poll() is None and not list((second / "attempts").glob("*.json")):
        time.sleep(0.1)
    process.kill()
    process.communicate()
    written = tree(first / "attempts")
    assert not (folder / RUNS / "audit" / "comparison.html").exists()
    assert sophon(folder, *of_several(AUDIT)).code == 0
    assert tree(first / "attempts") == written
    assert audited(folder / RUNS / "audit") == audited(made / RUNS / "audit")


@pytest.mark.slow
def test_nothing_is_begun_if_one_of_them_does_not_fit(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "copied"))
    wrong = "domain.several.digits.classes=[zero]"
    message = refusal(sophon(folder, *of_several(AUDIT), "run_dir=new", wrong))
    assert message.startswith("domain.several.digits.classes: ")
    assert not (folder / "new").exists()


def test_two_domains_of_one_name_are_refused_from_python() -> None:
    config = typed("domain.restricted=[mnist,svhn]")
    data = plain(config)
    data["domain"]["restricted"][1]["name"] = "mnist"
    with pytest.raises(UserError, match=r"^domain\.restricted: the name 'mnist' is given 2 times"):
        from_omegaconf(OmegaConf.create(data))
