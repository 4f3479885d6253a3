"""Every example in a docstring runs and prints what it says."""

import doctest
from importlib import import_module

import pytest
import torch


def test_doctests_pass(module_name: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    # By public name: pytest's own --doctest-modules would import the rooms a second time, under bare names.
    module = import_module(module_name)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples failed"
