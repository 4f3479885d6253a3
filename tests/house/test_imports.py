"""One import name, whichever way the package is installed and wherever Python starts.

The installs are real (pip, the real `pyproject.toml`, finder and guards) into empty environments that borrow the
packages of the running one; only the bodies of the modules are left out, since torch would take seconds each time.
"""

import subprocess
import sys
import venv
from pathlib import Path

import pytest

INSTALLS = {
    "wheel": [],
    "editable": ["--editable"],
    "editable-strict": ["--config-settings", "editable_mode=strict", "--editable"],
}

IMPORT_ALL = """
import importlib, importlib.util, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
import lightning_conv.callbacks, lightning_conv.recipes
from importlib.resources import files
assert any(path.name.endswith(".yaml") for path in files("lightning_conv.recipes").joinpath("configs").iterdir())
assert importlib.util.find_spec("lightning_conv.tests") is None
for room in (lightning_conv, lightning_conv.callbacks, lightning_conv.recipes):
    print(room.__file__)
"""


def _python(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _run(python: Path, code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # No PYTHONPATH and no user site: only the install under test may provide the package.
    return subprocess.run(
        [str(python), "-s", "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module", autouse=True)
def _no_pythonpath():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH", raising=False)
        yield


@pytest.fixture(
    scope="module", params=[*(pytest.param(kind, marks=pytest.mark.slow) for kind in INSTALLS), "not installed"]
)
def installed(request, house, tmp_path_factory):
    """An environment with one kind of install, and the tree it was installed from."""
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    # Each install has its own tree: setuptools writes build/ and *.egg-info/ into it.
    tree = house.copy(folder / "tree")
    tree.hollow()
    environment = folder / "venv"
    venv.create(environment, with_pip=False)
    python = _python(environment)
    site = Path(_run(python, "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip())
    borrowed = Path(pytest.__file__).parents[1]
    # A folder named in a .pth file joins sys.path without its own .pth files: an editable install there stays out.
    (site / "borrowed.pth").write_text(f"{borrowed}\n")
    if request.param in INSTALLS:
        offline = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "--python", str(python), "install", *offline]
        result = subprocess.run(
            [*command, *INSTALLS[request.param], str(tree.root)], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
    return request.param, python, tree


@pytest.mark.slow
def test_every_module_imports_from_inside_the_root(installed):
    _, python, tree = installed
    result = _run(python, IMPORT_ALL, *tree.modules(), cwd=tree.root)
    assert result.returncode == 0, result.stderr
    assert all(Path(line).is_relative_to(tree.root) for line in result.stdout.split())


def test_every_module_imports_from_outside_the_root(installed, tmp_path):
    kind, python, tree = installed
    if kind == "not installed":
        pytest.skip("nothing to import")
    result = _run(python, IMPORT_ALL, *tree.modules(), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    # A wheel is independent of the tree; both editable kinds point into it.
    assert all(Path(line).is_relative_to(tree.root) == (kind != "wheel") for line in result.stdout.split())


@pytest.mark.slow
def test_checkout_uses_its_own_rooms_when_another_one_is_installed(installed, house, tmp_path):
    _, python, _ = installed
    second = house.copy(tmp_path / "second")
    second.hollow()
    result = _run(python, IMPORT_ALL, *second.modules(), cwd=second.root)
    assert result.returncode == 0, result.stderr
    assert all(Path(line).is_relative_to(second.root) for line in result.stdout.split())


@pytest.mark.parametrize("room", ["callbacks", "recipes"])
def test_bare_room_is_not_there_from_outside_the_root(installed, room, tmp_path):
    _, python, _ = installed
    result = _run(python, f"import {room}", cwd=tmp_path)
    assert f"ModuleNotFoundError: No module named '{room}'" in result.stderr


@pytest.mark.parametrize("room", ["callbacks", "recipes"])
def test_bare_room_is_refused_from_inside_the_root(installed, room):
    _, python, tree = installed
    result = _run(python, f"import {room}", cwd=tree.root)
    assert "ImportError" in result.stderr
    assert f"`lightning_conv.{room}`" in result.stderr


def _run_alone(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # -S: no site-packages, where an editable install of the running environment would find the rooms.
    return subprocess.run([sys.executable, "-S", "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_finder_stays_out_of_an_installed_copy(house, tmp_path):
    """Without a pyproject.toml beside the package, folders that happen to be its neighbours are none of its rooms."""
    tree = house.copy(tmp_path / "site-packages")
    tree.hollow()
    assert _run_alone("import lightning_conv.callbacks", tree.root).returncode == 0
    (tree.root / "pyproject.toml").unlink()
    assert (
        "No module named 'lightning_conv.callbacks'" in _run_alone("import lightning_conv.callbacks", tree.root).stderr
    )


@pytest.mark.slow
def test_finder_stays_out_of_a_copy_that_holds_its_rooms(house, tmp_path):
    """A copy installed into somebody's project folder must not take that project's `callbacks/` for its own."""
    tree = house.copy(tmp_path / "project")
    tree.hollow()
    (tree.root / "callbacks").rename(tree.root / "lightning_conv" / "callbacks")
    (tree.root / "callbacks").mkdir()
    (tree.root / "callbacks" / "__init__.py").write_text("raise SystemExit('somebody else')")
    result = _run_alone("import lightning_conv.callbacks as room; print(room.__file__)", tree.root)
    assert Path(result.stdout.strip()).parent == tree.root / "lightning_conv" / "callbacks"


@pytest.mark.slow
def test_finder_is_installed_once(house, tmp_path):
    tree = house.copy(tmp_path / "tree")
    tree.hollow()
    code = (
        "import sys; from lightning_conv import _checkout; _checkout.install(); _checkout.install();"
        "print(sum(isinstance(finder, _checkout.RoomFinder) for finder in sys.meta_path))"
    )
    assert _run_alone(code, tree.root).stdout.strip() == "1"
