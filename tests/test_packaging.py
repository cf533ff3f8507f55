"""What an installed wheel carries besides modules."""

from __future__ import annotations

import tomllib
import zipfile
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


def test_wheel_carries_configuration_data_and_licences(tmp_path: Path) -> None:
    built = next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    names = set(zipfile.ZipFile(built).namelist())
    for path in ROOT.joinpath("conf").rglob("*.yaml"):
        assert f"sophon/conf/{path.relative_to(ROOT / 'conf')}" in names
    for path in (
        "sophon/py.typed",
        "sophon/domains/data/fashion_mnist.npz",
        "sophon/domains/data/LICENSE.mnist",
        "sophon/templates/model_card.md.j2",
        "sophon/report/templates/page.html.j2",
        "sophon/report/templates/page.css.j2",
        "sophon/report/templates/colours.css.j2",
    ):
        assert path in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "experiments/")) for name in names)


def test_dependencies_are_ranges_and_the_developers_versions_lie_in_them() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]
    wanted = {canonicalize_name(each.name): each.specifier for each in map(Requirement, lines)}
    assert [name for name, allowed in wanted.items() if "==" in str(allowed)] == ["higher"]
    exact = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    pinned = {canonicalize_name(each.name): str(each.specifier).removeprefix("==") for each in exact}
    assert {"torch", "torchvision", "timm", "diffusers", "peft", "pytest", "mypy", "ruff"} <= set(pinned)
    assert not [name for name in wanted.keys() & pinned.keys() if pinned[name] not in wanted[name]]
