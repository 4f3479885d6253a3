"""Public functions and callbacks with one wrong argument: a result, or one error that names argument and value."""

from __future__ import annotations

import logging
import random

import pytest
import torch
from judged import call
from subjects import SUBJECTS
from wrong import wrong_for

CASES = 1000
OPEN = 0.05
"""Share of the cases that may end otherwise; it only falls."""
ENDLESS = ("depth", "number: huge whole")
"""A network of 10^13 layers is made as long as there is memory."""


def all_cases():
    """Return subjects, names of arguments, and names of values."""
    return [
        (subject, name, value)
        for subject, each in SUBJECTS.items()
        for name in each.names()
        for value in wrong_for(each.right().get(name))
        if (name, value) != ENDLESS
    ]


def tried(cases):
    """Return how each ended that is unclear."""
    logging.disable(logging.CRITICAL)
    try:
        for subject, name, value in cases:
            of = SUBJECTS[subject]
            right = of.right()
            ended = call(of.function, right, name, wrong_for(right.get(name))[value])
            if ended.how == "unclear":
                yield f"{subject}({name}={value}): {ended.said[:200]}"
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_arguments_that_are_replaced_are_right(subject):
    torch.manual_seed(0)
    SUBJECTS[subject].function(**SUBJECTS[subject].right())


def test_wrong_arguments_are_named():
    unclear = list(tried(random.Random(0).sample(all_cases(), CASES)))
    assert len(unclear) <= OPEN * CASES, "\n".join(unclear)


@pytest.mark.slow
def test_all_wrong_arguments_are_named():
    cases = all_cases()
    unclear = list(tried(cases))
    assert len(unclear) <= OPEN * len(cases), "\n".join(unclear)
