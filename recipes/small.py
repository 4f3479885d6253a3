"""The switch that makes every command take seconds: the environment variable ``LIGHTNING_CONV_SMALL=1``.

It is for trying a command, and for the test that runs every command of the documentation: the numbers mean nothing. An
experiment of the laboratory then starts from the settings in its ``SMALL``, `fit` and `compare` stop after ``EPOCHS``
epochs, and `tables` runs one seed on ``SAMPLES`` samples.
"""

import os

VARIABLE = "LIGHTNING_CONV_SMALL"
EPOCHS = 2
SAMPLES = 40


def is_small() -> bool:
    """Return whether ``LIGHTNING_CONV_SMALL`` is set, other than to 0."""
    return os.environ.get(VARIABLE, "0") not in ("", "0")
