"""What figures remember of a run stays small, and reaches over all of it."""

import math
import pickle

import numpy as np
import pytest
import torch

from lightning_conv.reporting.log_steps import MOST, LogSteps


def test_up_to_the_limit_everything_is_kept_and_beyond_it_the_ends_are():
    seen = LogSteps()
    for step in range(0, 5 * MOST, 5):
        seen.note(step, [step, 2.0 * step])
    assert seen.steps == list(range(0, 5 * MOST, 5))
    for step in range(5 * MOST, 100_000, 5):
        seen.note(step, [step, 2.0 * step])
    assert len(seen) == MOST
    assert seen.steps[0] == 0
    assert seen.steps[-1] == 99_995
    np.testing.assert_array_equal(seen.rows[:, 1], [2.0 * step for step in seen.steps])


def test_steps_are_evenly_spaced_on_a_logarithmic_scale():
    seen = LogSteps()
    for step in range(100_000):
        seen.note(step, [0.0])
    gaps = np.diff([math.log1p(step) for step in seen.steps])
    even = math.log1p(99_999) / (MOST - 1)
    assert gaps.max() < 3 * even
    assert seen.steps[:3] == [0, 1, 2]


def test_a_resumed_run_goes_on_from_its_step():
    seen = LogSteps()
    for step in (0, 5, 10, 15):
        seen.note(step, [step])
    seen.note(7, [70.0])
    assert seen.steps == [0, 5, 7]
    assert seen.rows[:, 0].tolist() == [0.0, 5.0, 70.0]


def test_the_state_is_plain_and_gives_the_same_rows():
    seen, again = LogSteps(), LogSteps()
    for step in range(100):
        seen.note(step, [step, math.nan, math.inf])
    state = torch.load(torch_saved(seen.state_dict()), weights_only=True)
    again.load_state_dict(state)
    assert again.steps == seen.steps
    np.testing.assert_array_equal(again.rows, seen.rows)
    assert len(pickle.dumps(seen.state_dict())) < 5_000
    again.load_state_dict({})
    assert len(again) == 0
    assert again.rows.shape == (0, 0)


def torch_saved(state):
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_rows_of_another_length_begin_anew_and_few_rows_are_refused():
    seen = LogSteps()
    seen.note(0, [1.0])
    seen.note(1, torch.tensor([1.0, 2.0]))
    assert seen.steps == [1]
    with pytest.raises(ValueError, match="most: 2"):
        LogSteps(2)


def test_a_row_is_a_copy():
    row = torch.zeros(2, dtype=torch.float64)
    seen = LogSteps()
    seen.note(0, row)
    row += 1
    assert seen.rows.tolist() == [[0.0, 0.0]]
