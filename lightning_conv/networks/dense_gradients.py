"""Embeddings with sparse gradients, computed with dense ones for a while: ``dense_gradients``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

SPARSE = {"embedding": 4, "embedding_bag": 5}
"""Position of the argument ``sparse`` in functions of torch, which ``F.embedding``, ``F.embedding_bag`` and their modules call."""

ROWS_OF_BAGS = (
    "bags of an nn.EmbeddingBag that are given by offsets into one row of tokens are no samples: give each bag a row of its own, (n, "
    "tokens), filled up with padding_idx"
)


@contextmanager
def dense_gradients() -> Iterator[None]:
    """Make embeddings and embedding bags ignore ``sparse=True`` inside this context.

    It chooses the format of the table's gradient, not its value. Few operators take that format, and neither ``vmap`` nor the
    comparison of gradients does.

    Raises:
        ValueError: from an embedding bag whose offsets do not fit its tokens, since samples of both were taken.
    """
    before = {name: getattr(torch, name) for name in SPARSE}
    try:
        for name, function in before.items():
            setattr(torch, name, _dense(function, SPARSE[name]))
        yield
    finally:
        for name, function in before.items():
            setattr(torch, name, function)


def _dense(function: Callable[..., Any], position: int) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if len(args) > position:
            args = (*args[:position], False, *args[position + 1 :])
        elif kwargs.get("sparse"):
            kwargs["sparse"] = False
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if "offsets" not in str(error):
                raise
            raise ValueError(f"inputs: {ROWS_OF_BAGS} ({error})") from error

    return call
