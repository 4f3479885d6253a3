"""Importing a package loads nothing heavy, and each public name is there all the same: for `dir`, `import *`, pickle and type checkers."""

import ast
import inspect
import pickle
import subprocess
import sys
from importlib import import_module
from types import ModuleType

import pytest

from lightning_conv._lazy import imports_for_types, lazy

HEAVY = {"torch", "torchvision", "torchmetrics", "lightning", "numpy", "scipy", "matplotlib", "jsonargparse", "rich"}
AT_ONCE = {
    "lightning_conv.callbacks.criteria": "importing it registers the papers",
    "lightning_conv.kernels.rules": "importing it registers the rules",
    "lightning_conv.last_layer": "`comparators` is one of its functions and one of its modules",
}
"""Large packages that import their names at once, and why."""
LAZY = [
    "lightning_conv",
    "lightning_conv.callbacks",
    "lightning_conv.expressivity",
    "lightning_conv.kernels",
    "lightning_conv.linalg.eigenvalues",
    "lightning_conv.losses",
    "lightning_conv.metrics",
    "lightning_conv.recipes",
    "lightning_conv.sketches",
    "lightning_conv.theory",
    "lightning_conv.theory.networks",
]


def python(code: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_list_of_lazy_packages_is_complete(house):
    calls = {
        name
        for name, path in house.modules().items()
        if "= lazy(__name__)" in path.read_text() and path.name == "__init__.py"
    }
    assert calls == set(LAZY)
    assert not calls & set(AT_ONCE)


def test_importing_the_packages_loads_nothing_heavy():
    loaded = python(f"import {', '.join(LAZY)}\nimport sys; print(*sys.modules)").split()
    assert set(LAZY) <= set(loaded)
    assert not {name.partition(".")[0] for name in loaded} & HEAVY
    ours = {name for name in loaded if name.startswith("lightning_conv")}
    parents = {"lightning_conv.linalg", "lightning_conv._lazy", "lightning_conv._checkout", "lightning_conv._moved"}
    assert ours == {*LAZY, *parents}


@pytest.mark.parametrize("package", LAZY)
def test_every_public_name_is_there_and_shown_by_dir(package, house):
    module = import_module(package)
    read = imports_for_types(house.modules()[package].read_text())
    assert set(read) == set(module.__all__)
    assert set(module.__all__) <= set(dir(module))
    for name, (home, original) in read.items():
        value = getattr(module, name)
        expected = (
            import_module(f"{home}.{original}")
            if isinstance(value, ModuleType)
            else vars(import_module(home)).get(original)
        )
        # A name of another lazy package comes from where that package has it.
        assert value is (expected if expected is not None else getattr(import_module(home), original)), name
        assert vars(module)[name] is value, "kept, so that it is looked up once"


@pytest.mark.parametrize("package", LAZY)
def test_no_public_name_is_also_a_file_of_the_package(package, house):
    """Importing such a file would put it in the place of the name."""
    files = {name.rpartition(".")[2] for name in house.modules() if name.rpartition(".")[0] == package}
    same = files & set(import_module(package).__all__)
    assert not same, f"{package}: {same}; rename the file, or import the names at once"


def test_names_and_submodules_are_there_in_a_fresh_process():
    said = python(
        "import sys, lightning_conv\n"
        "before = 'ntk_gram' in vars(lightning_conv), 'ntk_gram' in dir(lightning_conv)\n"
        "from lightning_conv import *\n"
        "missing = set(lightning_conv.__all__) - set(globals())\n"
        "print(before, missing, lightning_conv.theory.du.__name__, lightning_conv.theory.implicit_bias.__name__,"
        " hasattr(lightning_conv, 'lambda_mim'), 'lightning' in sys.modules)\n"
    )
    papers = "lightning_conv.theory.papers"
    assert said == f"(False, True) set() {papers}.du {papers}.frei False False\n"


def test_an_unknown_name_is_an_attribute_error_or_an_import_error():
    code = "import lightning_conv.callbacks as c\ntry: c.LamdaMin\nexcept AttributeError as e: print(e)\n"
    code += "try: from lightning_conv.callbacks import LamdaMin\nexcept ImportError as e: print(type(e).__name__)"
    assert python(code) == "module 'lightning_conv.callbacks' has no attribute 'LamdaMin'\nImportError\n"


@pytest.mark.parametrize("package", LAZY)
def test_public_classes_and_functions_are_pickled_by_reference(package):
    module = import_module(package)
    values = [getattr(module, name) for name in module.__all__]
    for value in values:
        if inspect.isclass(value) or inspect.isfunction(value):
            assert pickle.loads(pickle.dumps(value)) is value


def test_a_pickled_object_is_read_by_a_process_that_has_imported_nothing(tmp_path):
    from lightning_conv import Bounded

    value = Bounded(1.0, 0.5, 2.0, certified=True, method="a test")
    (tmp_path / "value.pickle").write_bytes(pickle.dumps(value))
    code = f"import pickle; print(pickle.load(open({str(tmp_path / 'value.pickle')!r}, 'rb')))"
    assert python(code) == f"{value}\n"


def test_an_error_inside_a_module_of_a_name_is_not_hidden(tmp_path, monkeypatch):
    package = tmp_path / "shop"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from typing import TYPE_CHECKING\nfrom lightning_conv._lazy import lazy\n__all__ = ['thing']\n"
        "if TYPE_CHECKING:\n    from shop.broken import thing\nelse:\n    __getattr__, __dir__ = lazy(__name__)\n"
    )
    (package / "broken.py").write_text("raise RuntimeError('out of stock')\n")
    monkeypatch.syspath_prepend(tmp_path)
    import shop

    with pytest.raises(RuntimeError, match="out of stock"):
        _ = shop.thing
    monkeypatch.delitem(sys.modules, "shop")


def test_a_package_without_its_source_says_so(monkeypatch):
    module = ModuleType("compiled")
    module.__all__ = ["name"]
    module.__spec__ = type("Spec", (), {"loader": type("Loader", (), {"get_source": lambda self, name: None})()})()
    monkeypatch.setitem(sys.modules, "compiled", module)
    get, _ = lazy("compiled")
    with pytest.raises(ImportError, match="compiled: its names are read from its source"):
        get("name")


def test_type_checkers_do_not_see_the_function_that_accepts_every_name(house):
    """mypy takes any name of a module with a `__getattr__`, also a misspelt one."""
    for package in LAZY:
        (block,) = [
            node
            for node in ast.parse(house.modules()[package].read_text()).body
            if isinstance(node, ast.If) and node.orelse
        ]
        assert ast.unparse(block.test) == "TYPE_CHECKING"
        assert [ast.unparse(node) for node in block.orelse] == ["__getattr__, __dir__ = lazy(__name__)"], package
