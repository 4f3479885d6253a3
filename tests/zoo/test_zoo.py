"""Every animal of the zoo comes out as it should: left alone, and measured as its training step calls it."""

from collections import Counter

import pytest
from case import Case
from cases import CASES
from zoo_judge import judge

FAST = {
    "dict_batch",
    "named_tuple_batch",
    "target_of_the_same_shape",
    "optional_mask",
    "loss_inside",
    "trunk_and_head",
    "squeezed",
    "autoencoder",
    "manual_step",
    "iterable",
    "max_norm",
    "metric_in_forward",
}
"""Those that run in `make test`; the others are slow together."""


def marked(case: Case):
    return pytest.param(case, id=case.name, marks=[] if case.name in FAST else [pytest.mark.slow])


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_comes_out_as_it_should(case):
    outcome = judge(case)
    if outcome.kind == "not installed":
        pytest.skip(outcome.sentence)
    assert outcome.reaches(case.expected), f"{outcome.kind}: {outcome.sentence}"


def test_the_zoo_has_three_of_each_family():
    families = Counter(family for case in CASES for family in case.families)
    assert len(families) >= 30
    assert {family: count for family, count in families.items() if count < 3} == {}


def test_nearly_all_are_to_work_without_an_argument():
    without = sum(case.expected == "worked" for case in CASES)
    assert without >= 64
    assert without / len(CASES) >= 52 / 60


def test_the_fast_ones_are_in_the_zoo():
    assert {case.name for case in CASES} >= FAST
