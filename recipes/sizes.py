"""Checks of the sizes that data modules take."""

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_conv.arguments import require_type


def require_size(name: str, size: int | None) -> None:
    """Refuse a number of samples that is no whole number, or not positive.

    Args:
        name: of the argument.
        size: the number; None: all samples.

    Raises:
        MisconfigurationException: if it is below 1, or of another type.
    """
    if size is not None:
        with misconfigured():
            require_type(name, size, Integral, "a whole number, or None for all samples")
        if size < 1:
            raise MisconfigurationException(f"{name}: must be at least 1, or None for all samples; got {size}")


def require_share(name: str, share: float) -> None:
    """Refuse a share of the samples outside (0, 1).

    Args:
        name: of the argument.
        share: the share.

    Raises:
        MisconfigurationException: if it is outside, or no number.
    """
    with misconfigured():
        require_type(name, share, Real, "a share of the samples in (0, 1)")
    if not 0.0 < share < 1.0:
        raise MisconfigurationException(f"{name}: must lie in (0, 1), got {share}")


@contextmanager
def misconfigured() -> Iterator[None]:
    """Turn an argument of another type into the error that the command line shows in one line.

    Raises:
        MisconfigurationException: in place of a TypeError.
    """
    try:
        yield
    except TypeError as error:
        raise MisconfigurationException(str(error)) from None
