"""What does not fit is refused by every verb in one line that names it, before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli_helpers import AUDIT, PRETRAIN, PROTECT, RUNS, SMALL, refused, sophon

pytestmark = pytest.mark.slow  # whole commands

COMPARE = ("report", "compare")
THREE = "domain.restricted.classes=[sandal,bag,sneaker]"

REFUSED: list[tuple[tuple[str, ...], tuple[str, ...], list[str]]] = [
    # keys, types and ranges: tests/test_config.py, tests/test_overrides.py
    (PRETRAIN, ("--cfg", "job", "--multirun"), ["--multirun and --cfg: not allowed together"]),
    (PRETRAIN, ("verb=audit",), ["verb: not allowed"]),
    (PRETRAIN, ("model.architecture=resnet19",), ["model.architecture", "resnet19"]),
    (PRETRAIN, ("+model.model_args.foo=1",), ["model.model_args", "foo"]),
    (PRETRAIN, ("model.weights=nowhere.safetensors",), ["nowhere.safetensors"]),
    (PRETRAIN, ("domain.original.classes=[dress,hat]",), ["domain.original.classes", "hat"]),
    (PRETRAIN, ("domain.original.source=cloud",), ["domain.original.source", "cloud", "imagefolder"]),
    (PRETRAIN, ("domain@domain.original=cifar10",), ["domain.original.root", "cifar-10-batches-py"]),
    (PRETRAIN, ("domain@domain.original=cinic10",), ["domain.original.root", "there is no folder data/cinic10"]),
    (PRETRAIN, ("domain.original.per_class=1",), ["domain.original.val_fraction"]),
    (PRETRAIN, ("device=abacus",), ["device", "abacus", "cpu"]),
    (PRETRAIN, ("device=cuda:99",), ["device", "cuda:99"]),
    (PROTECT, (THREE, "sampler.heads=[kept]"), ["'kept'", "5", "3"]),
    (PROTECT, ("domain@domain.original=mnist_digits",), ["domain.original", "10 classes", "5", "t_shirt"]),
    (PROTECT, ("domain.original.classes=[trouser,t_shirt,pullover,dress,coat]",), ["domain.original", "trouser"]),
    (PROTECT, ("method.suppression_loss=magic",), ["method.suppression_loss", "magic", "klu"]),
    (PROTECT, ("+method.objectives.magic={}",), ["method.objectives.magic", "clamp"]),
    (PROTECT, ("+method.stages.reparameterise.gains=[1,2]",), ["method.stages.reparameterise.gains", "1 or 6"]),
    (PROTECT, ("+method.stages.reparameterise.rounds=many",), ["method.stages.reparameterise.rounds", "many"]),
    (PROTECT, ("+method.stages.reparameterise={}", "amp=all"), ["amp", "none"]),
    (PROTECT, ("domain.restricted.fractions.adapt=0.9",), ["domain.restricted.fractions"]),
    (PROTECT, ("reference=nowhere",), ["reference: 'nowhere' does not exist"]),
    (PROTECT, ("reference=own",), ["reference", "sophon.json"]),
    (AUDIT, ("domain@domain.original=mnist_digits",), ["domain.original", "10 classes"]),
    (AUDIT, ("checkpoint=nowhere",), ["checkpoint: 'nowhere' does not exist"]),
    (AUDIT, ("attack=tinny",), ["attack: 'tinny'", "did you mean tiny?", "standard"]),
    (AUDIT, ("+attack.strategies.my attack={lr: 0.1}",), ["my attack"]),
    (AUDIT, ("+attack.strategies.mine=5",), ["attack.strategies.mine: 5 is not allowed; give a mapping"]),
    (AUDIT, ("++attack.strategies.adam_fresh.surgery=[{operation: amputate}]",), ["amputate", "renormalise"]),
    (AUDIT, ("attack.oracle=nobody",), ["attack.oracle", "nobody", "adam_fresh"]),
    (AUDIT, ("attack.benign=[nobody]",), ["attack.benign", "nobody"]),
    (AUDIT, ("+attack.knowing.nobody=[removal]",), ["attack.knowing", "nobody", "adam_fresh"]),
    (AUDIT, ("attack.reuse=[nowhere]",), ["attack.reuse", "nowhere"]),
    (AUDIT, ("attack.shard=3", "attack.shards=3"), ["attack.shard", "0 to 2"]),
    (AUDIT, ("+attack.search.a={optimizers: {sgd: [0.1, 1.0]}, choices: {steps: [1]}}",), ["a.choices.steps"]),
    (
        AUDIT,
        (THREE, "++attack.strategies.adam_fresh.head=kept", "++attack.strategies.adam_probed.data_budget=100000"),
        ["attack.strategies.momentum_kept", "'kept'", "5", "3"],
    ),
    (("audit", *SMALL, "name=other"), (), ["checkpoint: ", "does not exist"]),
    (("export", *SMALL, "name=other"), (), ["checkpoint: ", "does not exist"]),
    (("report", *SMALL), (), ["run_dir: ", "does not exist"]),
    (COMPARE, (), ["report compare", "two audits"]),
    (COMPARE, ("nowhere", "own"), ["nowhere", "does not exist"]),
    (COMPARE, ("own", "own"), ["own", "once"]),
    (COMPARE, ("own", str(RUNS)), ["own", "audit.json"]),
]  # fmt: skip


@pytest.mark.parametrize(("command", "more", "words"), REFUSED, ids=lambda value: " ".join(value)[:60])
def test_what_does_not_fit(made: Path, command: tuple[str, ...], more: tuple[str, ...], words: list[str]) -> None:
    here = ("run_dir=new",) if command in (PRETRAIN, PROTECT, AUDIT) else ()
    message = refused(made, *command, *here, *more)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("command", "override", "words"),
    [
        (PRETRAIN, "pretrain.steps=61", ["pretrain.steps=60", "pretrain.steps=61"]),
        (PROTECT, "method.fts_lr=0.5", ["method.fts_lr", "0.5"]),
        (PROTECT, f"run_dir={RUNS}/pretrain", ["pretrain", "protect"]),
        (PROTECT, "domain.restricted.split_seed=1", ["restricted."]),
        (PROTECT, "seed=7", ["seed=0", "seed=7"]),
        (PRETRAIN, "amp=all", ["amp=absent", 'amp="all"']),
    ],
)
def test_a_run_dir_of_another_run(made: Path, command: tuple[str, ...], override: str, words: list[str]) -> None:
    here = () if "run_dir" in override else (f"run_dir={RUNS / command[0]}", f"reference={RUNS / 'pretrain'}")
    message = refused(made, *command, *here, override)
    assert message.startswith("run_dir: ")
    for word in (*words, "give another run_dir"):
        assert word in message


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ((*PRETRAIN, "run_dir=thesis"), "run_dir: "),
        ((*PROTECT, "run_dir=thesis"), "run_dir: "),
        ((*AUDIT, "run_dir=thesis"), "run_dir: "),
        ((*PRETRAIN, "run_dir=thesis/chapter.txt"), "chapter.txt"),
        (("export", *SMALL, "out=thesis"), "thesis"),
        (("export", *SMALL, "out=thesis/chapter.txt"), "chapter.txt"),
    ],
)
def test_what_is_not_ours_is_not_written_to(made: Path, tmp_path: Path, command: tuple[str, ...], word: str) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "copied"))
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter.txt").write_text("years of work")
    assert word in refused(folder, *command)


def test_what_reports_wrong_input_in_a_sweep_exits_with_2(tmp_path: Path) -> None:
    result = sophon(tmp_path, *PRETRAIN, "--multirun", "pretrain.batch_size=16,0")
    assert result.code == 2
    assert "Traceback" not in result.err
    assert result.err.splitlines()[-1].startswith("sophon: pretrain.batch_size: 0 ")
