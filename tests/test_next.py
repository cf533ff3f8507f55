"""A verb ends with the command that goes on, as it can be pasted."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from sophon.attacker import FineTuneStrategy
from sophon.cli.next import next_steps
from sophon.config import Config, DomainConfig, MethodConfig, ModelConfig

EXPERIMENT = ["experiment=quickstart", "seed=1"]


def config(verb: str, **values: Any) -> Config:
    made = Config(verb, "mine", 1, model=ModelConfig(architecture="a"), method=MethodConfig("m"), **values)
    made.domain.restricted = {"shoes": DomainConfig("shoes", "bundled")}
    made.pretrain = FineTuneStrategy()
    return made


@pytest.mark.parametrize(
    ("made", "overrides", "flags", "lines"),
    [
        (config("pretrain"), EXPERIMENT, [], ["next: sophon protect experiment=quickstart seed=1"]),
        (
            config("pretrain", run_dir="a b"),
            ["name=mine", "pretrain.steps=0", "model=x", "domain.restricted.root=it's", "run_dir=a b", "amp=all"],
            ["--config-dir=own"],
            [
                "next: sophon protect --config-dir=own name=mine 'domain.restricted.root=it'\"'\"'s' amp=all "
                "'reference=a b'"
            ],
        ),
        (
            config("pretrain"),
            ["domain@domain.original=folder"],
            [],
            [
                "next: sophon protect domain@domain.original=folder domain@domain.restricted=folder "
                "domain.restricted.root=path/to/restricted"
            ],
        ),
        (config("pretrain"), ["name=x"], [], ["next: sophon protect name=x"]),
        (
            config("protect"),
            [*EXPERIMENT, "method.rounds=5", "workers=2", "+attack/family=[lora]", "~domain@domain.benign"],
            [],
            [
                "next: sophon audit experiment=quickstart seed=1 workers=2 '+attack/family=[lora]' "
                "'~domain@domain.benign'",
                "next: sophon export checkpoint=runs/mine/seed1/protect out=runs/mine/seed1/export",
            ],
        ),
        (
            config("protect", run_dir="x", reference="r"),
            ["run_dir=x", "reference=r"],
            [],
            [
                "next: sophon audit reference=r attack=smoke checkpoint=x",
                "next: sophon export checkpoint=x out=runs/mine/seed1/export",
            ],
        ),
        (config("audit"), EXPERIMENT, [], ["next: sophon report run_dir=runs/mine/seed1/audit"]),
        (config("audit", run_dir="here"), ["run_dir=here"], [], ["next: sophon report run_dir=here"]),
        (config("report"), EXPERIMENT, [], []),
        (config("sample"), EXPERIMENT, [], ["next: sophon audit experiment=quickstart seed=1"]),
        (config("sample", checkpoint="x"), ["checkpoint=x"], [], ["next: sophon audit checkpoint=x"]),
        (config("compare"), [], [], []),
    ],
)  # fmt: skip
def test_the_next_command(made: Config, overrides: list[str], flags: list[str], lines: list[str]) -> None:
    found = next_steps(made, overrides, flags)
    assert found == lines
    assert all(shlex.split(line)[:2] == ["next:", "sophon"] for line in found)


def test_a_shard_is_followed_by_the_audit_of_all() -> None:
    made = config("audit")
    made.attack.shards = 2
    overrides = [*EXPERIMENT, "attack=full", "attack.shards=2", "attack.shard=0"]
    assert next_steps(made, overrides, []) == ["next: sophon audit experiment=quickstart seed=1 attack=full"]


def test_audits_of_other_seeds_are_set_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1, 2):
        folder = Path("runs/mine") / f"seed{seed}" / "audit"
        folder.mkdir(parents=True)
        (folder / "audit.json").write_text('{"checkpoint": {"path": "a b"}}')
    compare = "next: sophon report compare runs/mine/seed1/audit runs/mine/seed0/audit runs/mine/seed2/audit"
    export = "next: sophon export 'checkpoint=a b' audit=runs/mine/seed1/audit out=runs/mine/seed1/export"
    assert next_steps(config("audit"), [], [])[1:] == [compare, export]
    assert next_steps(config("report"), [], []) == [compare, export]
    other = next_steps(config("report", run_dir="runs/mine/seed0/audit"), [], [])
    assert other[1] == "next: sophon export 'checkpoint=a b' audit=runs/mine/seed0/audit out=runs/mine/seed0/export"


def test_an_export_is_followed_by_the_code_that_loads_it(tmp_path: Path) -> None:
    out = tmp_path / 'a "b"'
    out.mkdir()
    (out / "README.md").write_text('# Card\n\n```python\nimport json\n\nname = json.dumps("PATH/x")\n```\n')
    first, *code = next_steps(config("export", out=str(out)), [], [])
    assert first.startswith("next, in Python")
    scope: dict[str, Any] = {}
    exec("\n".join(code), scope)
    assert scope["name"].endswith('a \\"b\\"/x"')
