"""``PaidParts``: what is said of a part that is not looked at."""

from lightning_conv.callbacks.health.paid_parts import PaidParts


def test_a_part_that_was_looked_at_before_is_not_said_to_have_never_been():
    parts = PaidParts()
    assert parts.afford("forecast", 0, lambda seconds: False, lambda: 1) is None
    never = parts.undecided["forecast"]
    assert parts.afford("forecast", 1, lambda seconds: True, lambda: 2) == 2
    assert "forecast" not in parts.undecided
    assert parts.afford("forecast", 2, lambda seconds: False, lambda: 3) is None
    assert never == "a look takes longer than the run allows for; every_n_steps= asks for it"
    assert parts.undecided["forecast"] == f"not again after an earlier measurement: {never}"
