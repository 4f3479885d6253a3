"""A module that has moved is imported by its old name, too, with a warning that names the new one."""

import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

from lightning_conv._moved import MOVED


def test_every_new_name_exists_and_no_old_one_does(house):
    assert [new for new in MOVED.values() if find_spec(new) is None] == []
    hidden = [name for name in house.modules() if name in MOVED or name.rpartition(".")[0] in MOVED]
    assert hidden == []  # the finder comes first, so it would hide a module of an old name


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lightning_conv.float64", "lightning_conv.networks.precision"),
        ("lightning_conv.eigenvalues.bounded", "lightning_conv.linalg.eigenvalues.bounded"),
    ],
)
def test_an_old_name_is_the_same_module_and_warns(old, new, monkeypatch):
    for name in (old, old.rpartition(".")[0]):
        if name != "lightning_conv":
            monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.warns(DeprecationWarning, match=rf"{old} has moved to {new}"):
        module = import_module(old)
    assert module is import_module(new)
