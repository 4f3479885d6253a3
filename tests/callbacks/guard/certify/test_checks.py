"""``certified`` needs every check on the list, and the documentation has the list."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_conv.callbacks.guard.certify.checks import NEEDED, Check, caveats, of_reasons, replaced, settle

ALL = [Check(name, True) for name in NEEDED]


@pytest.mark.parametrize("verdict", ["certified", "refuted"])
def test_a_verdict_stands_where_every_check_held(verdict):
    assert settle(verdict, "why", ALL) == (verdict, "why")


@pytest.mark.parametrize("verdict", ["certified", "refuted"])
@pytest.mark.parametrize("name", NEEDED)
def test_a_check_that_is_missing_failed_or_was_not_made_leaves_it_undecided(name, verdict):
    others = [check for check in ALL if check.name != name]
    assert settle(verdict, "", others) == ("undecided", f"not checked: {name}")
    assert settle(verdict, "", [*others, Check(name, None, "no copy")]) == (
        "undecided",
        f"not checked: {name} (no copy)",
    )
    assert settle(verdict, "", [*others, Check(name, False, "seen")]) == ("undecided", "")
    # Of two of one name both count.
    assert settle(verdict, "", [*ALL, Check(name, False, "seen")]) == ("undecided", "")
    assert settle(verdict, "", [*ALL, Check(name, None)])[0] == "undecided"


def test_other_verdicts_need_no_checks():
    assert settle("undecided", "too narrow", []) == ("undecided", "too narrow")
    assert settle("not applicable", "", []) == ("not applicable", "")


def test_what_failed_once_stays():
    failed, made = Check("own loss", False, "said"), Check("own loss", True)
    assert replaced([failed, ALL[0]], [made]) == [failed, ALL[0], made]
    assert replaced([made, ALL[0]], [made]) == [ALL[0], made]
    assert caveats([failed, failed, made]) == ["said"]


def test_reasons_become_checks():
    assert of_reasons("own loss", ["", "a", "b"]) == [Check("own loss", False, "a"), Check("own loss", False, "b")]
    assert of_reasons("own loss", [""]) == [Check("own loss", True)]


def test_the_documentation_lists_every_check():
    page = (Path(__file__).parents[4] / "docs" / "guard.md").read_text()
    assert [name for name in NEEDED if f"| `{name}` |" not in page] == []
