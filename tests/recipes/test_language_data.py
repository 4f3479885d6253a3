"""Text as byte sequences: next bytes, whole files held out, two parts of the library that share no line, any folder."""

from __future__ import annotations

import ast
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_conv.recipes import LanguageDataModule
from lightning_conv.recipes.language_data import cut, docstrings, is_held_out, texts_of_library, without

SUM = """
from lightning_conv.recipes import LanguageDataModule
data = LanguageDataModule(n_train=40, length=32); data.setup()
x, y = data.splits.train.tensors
print(int((x * 3 + y).sum()), data.n_train)
"""


def made(**options):
    data = LanguageDataModule(**options)
    data.setup()
    return data


@pytest.fixture
def folder(tmp_path):
    """Thirty files, each of one letter of its own."""
    (tmp_path / "deep").mkdir()
    for number in range(30):
        inner = tmp_path / ("deep" if number % 2 else ".")
        (inner / f"{number:02d}.txt").write_bytes(bytes([65 + number]) * (40 + number))
    (tmp_path / "no.md").write_text("not this one" * 100)
    return tmp_path


def test_targets_are_the_next_bytes_and_sequences_follow_one_another(folder):
    data = made(folder=str(folder), length=7, n_test=None, test_fraction=0.3)
    for split, held_out in ((data.splits.train, False), (data.splits.test, True)):
        x, y = split.tensors
        assert x.shape == y.shape == (len(split), 7)
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x[:, 1:], y[:, :-1])
        rows = torch.cat([x, y[:, -1:]], 1).flatten()
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.txt"))
        texts = [(folder / name).read_bytes() for name in names if is_held_out(name, 0.3, 0) == held_out]
        joined = b"\0".join(texts)
        assert rows.tolist() == list(joined[: len(rows)])
        assert len(joined) - len(rows) < 8


def test_no_file_is_in_both_splits(folder):
    data = made(folder=str(folder), length=7, n_test=None, test_fraction=0.3)
    train, test = ({*split.tensors[0].flatten().tolist()} - {0} for split in (data.splits.train, data.splits.test))
    assert train
    assert test
    assert not train & test
    assert len(train | test) == 30


def test_the_same_files_of_the_library_are_held_out_of_both_parts():
    names = {part: [name for name, _ in texts_of_library(part)] for part in ("docstrings", "sources")}
    assert len(names["sources"]) > 200
    held = {part: {name for name in found if is_held_out(name, 0.1, 0)} for part, found in names.items()}
    both = {*names["docstrings"]} & {*names["sources"]}
    assert held["docstrings"] & both == held["sources"] & both
    assert 0.03 < len(held["sources"]) / len(names["sources"]) < 0.2
    assert not any({"test", "site-packages"} & {*name.split("/")} for name in names["sources"])


def test_documentation_and_code_of_a_module_are_told_apart():
    path = Path(sysconfig.get_path("stdlib"), "textwrap.py")
    source = path.read_text()
    documented = docstrings(source)
    import textwrap

    assert documented[0][0] == ast.get_docstring(ast.parse(source))
    assert textwrap.dedent.__doc__.split("\n")[0].strip() in [said.split("\n")[0].strip() for said, _ in documented]
    code = without(source, documented)
    assert not docstrings_left(code)
    assert "def dedent(text):" in code
    assert "def dedent(text):" not in "\n".join(said for said, _ in documented)
    parts = {part: dict(texts_of_library(part))["textwrap.py"].decode() for part in ("docstrings", "sources")}
    assert parts == {"docstrings": "\n\n".join(said for said, _ in documented), "sources": code}


def docstrings_left(code):
    """A function whose body was its documentation alone is no longer a function, so the text may not parse; look for the quotes."""
    return [line for line in code.splitlines() if line.strip().startswith('"""')]


def test_it_is_the_same_in_another_process_with_another_hash_seed():
    x, y = made(n_train=40, length=32).splits.train.tensors
    environment = {**__import__("os").environ, "PYTHONHASHSEED": "7"}
    found = subprocess.run([sys.executable, "-c", SUM], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.split() == [str(int((x * 3 + y).sum())), "40"]


def test_sizes_are_those_that_a_language_model_needs(folder):
    data = made(folder=str(folder), length=7, test_fraction=0.3)
    assert (data.num_classes, data.input_shape) == (256, (7,))
    assert data.count_train() == data.n_train
    few = made(folder=str(folder), length=7, test_fraction=0.3, n_train=5, n_test=2)
    assert [len(each) for each in few.splits[:2]] == [5, 2]
    rows = {tuple(row) for row in data.splits.train.tensors[0].tolist()}
    assert all(tuple(row) in rows for row in few.splits.train.tensors[0].tolist())


def test_cutting_drops_what_is_left():
    assert cut([b"abc", b"de"], 4).tolist() == [[97, 98, 99, 0]]
    assert cut([], 4).shape == (0, 4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"part": "comments"}, "part: 'comments' is not one of docstrings, sources"),
        ({"length": 0}, "length: must be at least 1"),
        ({"test_fraction": 0.0}, "test_fraction"),
        ({"folder": "nowhere"}, "folder: .*nowhere.* is no folder"),
        ({"n_train": 10**9}, "n_train: there are"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_mistakes_say_what_is_wrong(options, says):
    with pytest.raises(MisconfigurationException, match=says):
        made(**options)


def test_a_folder_without_text_says_where_was_looked(folder):
    with pytest.raises(MisconfigurationException, match=r"folder: .* \(\*\.rst\) has 0 files for the training split"):
        made(folder=str(folder), pattern="*.rst")
