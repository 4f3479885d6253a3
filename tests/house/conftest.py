"""The tree as the house tests see it, and copies of it to build and install from.

Nothing here writes into the working tree, and nothing needs a network.
"""

import ast
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

SHIPPED = {".py", ".yaml", ".css", ".js", ".json", ".txt"}

ROOMS = {
    "lightning_conv": "lightning_conv",
    "lightning_conv.callbacks": "callbacks",
    "lightning_conv.recipes": "recipes",
}


@dataclass(frozen=True)
class House:
    """A checkout: the three rooms below `root`."""

    root: Path

    def shipped(self) -> dict[str, Path]:
        """Every file that an installation must hold: its path below site-packages -> its path in the tree."""
        files = {"lightning_conv/py.typed": self.root / "lightning_conv" / "py.typed"}
        for package, folder in ROOMS.items():
            for path in sorted((self.root / folder).rglob("*")):
                if path.suffix in SHIPPED and "__pycache__" not in path.parts:
                    files[f"{package.replace('.', '/')}/{path.relative_to(self.root / folder).as_posix()}"] = path
        return files

    def packages(self) -> set[str]:
        """Every folder that holds something to ship, as a dotted name."""
        return {name.rpartition("/")[0].replace("/", ".") for name in self.shipped()}

    def modules(self) -> dict[str, Path]:
        """Every module by its public name."""
        python = {name: path for name, path in self.shipped().items() if path.suffix == ".py"}
        return {
            name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path
            for name, path in python.items()
            if path.name != "__main__.py"
        }

    def copy(self, target: Path) -> "House":
        """Copy what a build reads, without what earlier builds and runs left behind."""
        copied = House(target)
        for path in [self.root / name for name in ("pyproject.toml", "README.md", "LICENSE")] + [
            *self.shipped().values()
        ]:
            place = target / path.relative_to(self.root)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
        return copied

    def hollow(self) -> None:
        """Empty every module but for the lines that make the house importable: the import then takes no torch.

        Kept are the finder, its call, and the guards on `__name__`, so that what is tested is the real thing.
        """
        for path in self.modules().values():
            if path.name not in {"_checkout.py", "_moved.py"}:
                kept = [node for node in ast.parse(path.read_text()).body if _is_structure(node)]
                path.write_text("\n".join(ast.unparse(node) for node in kept) + "\n")


def _is_structure(node: ast.stmt) -> bool:
    source = ast.unparse(node)
    return (isinstance(node, ast.If) and "__name__ !=" in source) or source in {
        "from lightning_conv import _checkout, _moved",
        "_checkout.install()",
        "_moved.install()",
    }


HERE = House(Path(__file__).resolve().parents[2])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for `module_name` once for each module."""
    if "module_name" in metafunc.fixturenames:
        metafunc.parametrize("module_name", sorted(HERE.modules()))


@pytest.fixture(scope="session")
def house() -> House:
    return HERE


def run(*command: object, cwd: Path) -> str:
    """Run a command and return what it printed; a failure shows it."""
    result = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command} failed\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="session")
def wheel(house: House, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as released: built from the sdist, which is built from a copy of the tree."""
    root = tmp_path_factory.mktemp("wheel")
    tree = house.copy(root / "tree")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", root / "dist", tree.root, cwd=root)
    (built,) = (root / "dist").glob("*.whl")
    return built
