"""A tiny MNIST on disk, and a quiet trainer."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_conv.callbacks.run.guarded import set_strict

set_strict(True)  # an error that nobody expects fails the test; the fixture `lenient` is for tests that inject one


@pytest.fixture
def mnist_root(tmp_path: Path) -> Path:
    """A root with 60 training and 30 test images in MNIST's own idx format; class c has the constant colour 25 c."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 60), ("t10k", 30)):
        labels = torch.arange(count, dtype=torch.uint8) % 3
        images = (25 * labels).reshape(-1, 1, 1).expand(count, 28, 28).contiguous()
        header = struct.pack(">iiii", 2051, count, 28, 28)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, count) + labels.numpy().tobytes())
    return tmp_path / "data"


@pytest.fixture
def quiet_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """Makes trainers that write into a temporary folder and say little."""

    def make(**settings: Any) -> Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "default_root_dir": tmp_path,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        return Trainer(**{**defaults, **settings})

    return make
