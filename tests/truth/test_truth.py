"""No false word on generated cases of every kind: a few of each in ``make test``, all of them in ``make test-all``."""

import pytest
from all_kinds import KINDS

HUNT = [pytest.param(kind, variant, id=f"{kind.name}-{variant}") for kind in KINDS for variant in kind.variants]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_few_cases_of_every_kind_hear_no_false_word(kind, note):
    note(kind.name, kind.sample())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "variant"), HUNT)
def test_no_case_hears_a_false_word(kind, variant, note):
    note(kind.name, kind.all(variant))


def test_the_hunt_is_as_large_as_promised():
    sizes = {kind.name: kind.each * len(kind.variants) for kind in KINDS}
    assert len(sizes) >= 10
    assert min(sizes.values()) >= 100
    assert sum(sizes.values()) >= 2000
