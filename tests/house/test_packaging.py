"""What is shipped is what is in the tree, and the versions that the checks use are pinned."""

import re
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lightning_conv


@pytest.fixture(scope="module")
def pyproject(house):
    return tomllib.loads((house.root / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def pins(house):
    lines = (house.root / ".ci" / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.slow
def test_wheel_holds_exactly_the_files_of_the_tree(house, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        expected = house.shipped()
        assert names == set(expected)
        for name, path in expected.items():
            assert archive.read(name) == path.read_bytes(), name


@pytest.mark.slow
def test_wheel_has_one_top_level_name(wheel):
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lightning_conv"}


@pytest.mark.slow
def test_wheel_carries_the_licence_and_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        texts = {name.split(".dist-info/")[-1]: archive.read(name).decode() for name in archive.namelist()}
    assert "Apache License" in texts["licenses/LICENSE"]
    assert "License-Expression: Apache-2.0" in texts["METADATA"]
    assert "lightning-conv = lightning_conv.recipes.cli:main" in texts["entry_points.txt"]


def test_packages_list_names_every_folder_that_ships(house, pyproject):
    assert set(pyproject["tool"]["setuptools"]["packages"]) == house.packages()


def test_version_is_the_same_everywhere(house, pyproject):
    version = pyproject["project"]["version"]
    citation = yaml.safe_load((house.root / "CITATION.cff").read_text())
    assert citation["version"] == version
    assert Path(lightning_conv.__file__).is_relative_to(house.root)
    assert lightning_conv.__version__ == version


def test_every_constraint_is_one_exact_version(pins):
    assert all(re.fullmatch(r"==[^,*]+", str(pin.specifier)) and pin.url is None for pin in pins)


def test_every_direct_dependency_is_pinned_and_the_pin_is_allowed(pyproject, pins):
    project = pyproject["project"]
    wanted = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        versions = [str(pin.specifier).removeprefix("==") for pin in pins if canonicalize_name(pin.name) == name]
        assert versions, requirement.name
        assert all(requirement.specifier.contains(version) for version in versions), requirement.name


def test_pre_commit_runs_the_pinned_ruff(house, pins):
    config = yaml.safe_load((house.root / ".pre-commit-config.yaml").read_text())
    (revision,) = (repo["rev"] for repo in config["repos"] if repo["repo"].endswith("ruff-pre-commit"))
    (pin,) = (pin for pin in pins if pin.name == "ruff")
    assert f"=={revision.removeprefix('v')}" == str(pin.specifier)


def test_copy_of_the_tree_leaves_out_caches(house, tmp_path: Path):
    assert not list(house.copy(tmp_path / "tree").root.rglob("__pycache__"))
