"""Values are held back until they change, and none is lost."""

from hypothesis import given
from hypothesis import strategies as st

from lightning_conv.callbacks.run.changes import Changes


def passed_on(values, at_once=()):
    changes, found = Changes(at_once), []
    for step, value in enumerate(values):
        for at, known in changes.pass_on({"a": value}, step).items():
            found.append((at, known["a"]))
    return changes, found


def test_a_constant_is_not_passed_on_and_a_change_brings_what_was_held_back():
    assert passed_on([1.0, 1.0, 1.0, 2.0, 2.0, 1.0])[1] == [(0, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 1.0)]
    changes, found = passed_on([5.0, 5.0])
    assert found == []
    assert changes.constants == {"a": 5.0}
    assert changes.single() == {}


def test_what_is_looked_at_first_is_passed_on_at_once_and_then_only_if_it_changes():
    changes, found = passed_on([1.0, 1.0], {"a"})
    assert found == [(0, 1.0)]
    assert changes.constants == {"a": 1.0}
    assert passed_on([1.0, 1.0, 2.0], {"a"})[1] == [(0, 1.0), (1, 1.0), (2, 2.0)]


def test_what_was_measured_once_is_no_constant():
    changes = Changes()
    changes.pass_on({"a": 1.0}, 7)
    assert changes.constants == {}
    assert changes.single() == {7: {"a": 1.0}}


def test_a_value_that_is_judged_again_at_its_step_replaces_the_first_one():
    changes = Changes({"b"})
    assert changes.pass_on({"a": 1.0, "b": 1.0}, 3) == {3: {"b": 1.0}}
    assert changes.pass_on({"a": 2.0, "b": 2.0}, 3) == {3: {"b": 2.0}}
    assert changes.pass_on({"a": 2.0, "b": 2.0}, 4) == {}
    assert changes.constants == {"a": 2.0, "b": 2.0}


@given(st.lists(st.integers(0, 2), max_size=12), st.booleans())
def test_a_curve_through_what_is_passed_on_is_the_curve_of_all_values(values, at_once):
    changes, found = passed_on([float(each) for each in values], {"a"} if at_once else ())
    steps = [step for step, _ in found]
    assert steps == sorted(set(steps))
    if len(set(values)) < 2:
        assert len(found) <= int(at_once)
        assert (changes.constants == {"a": float(values[0])}) if len(values) > 1 else not changes.constants
        return
    assert steps[0] == 0
    assert steps[-1] == len(values) - 1
    curve = dict(found)
    for step, value in enumerate(values):  # between two points of one value lies the same value
        before = max(each for each in steps if each <= step)
        assert curve[before] == value
