"""Text of the standard library: the same samples in every process, each from the package that its label says."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_conv.recipes import TextDataModule, WideFC
from lightning_conv.recipes.text_data import PACKAGES, bag_of_words, pieces_of

SUM = """
from lightning_conv.recipes import TextDataModule
data = TextDataModule(n_train=60); data.setup()
x, y = data.splits.train.tensors
print(float(x.double().sum()).hex(), y.tolist())
"""


def made(**options):
    data = TextDataModule(**options)
    data.setup()
    return data


def test_a_bag_counts_the_hashed_words():
    text = "self.loop = loop  # x Loop, run"
    bag = bag_of_words(text, 64)
    import zlib

    counts = {"self": 1, "loop": 3, "run": 1}
    expected = torch.zeros(64)
    for word, count in counts.items():
        expected[zlib.crc32(word.encode()) % 64] += count
    expected = torch.tensor([math.log(1 + float(each)) for each in expected])
    assert torch.allclose(bag, expected / expected.norm())
    assert bag_of_words("", 8).tolist() == [0.0] * 8


def test_every_sample_is_a_piece_of_its_package():
    data = made(test_fraction=0.5)
    rows = {
        label: {tuple(bag_of_words(piece, 512).tolist()) for piece in pieces_of(name, 20)}
        for label, name in enumerate(PACKAGES)
    }
    x, y = data.splits.train.tensors
    assert all(tuple(row.tolist()) in rows[label] for row, label in zip(x[:50], y[:50].tolist(), strict=True))
    assert data.input_shape == (512,)
    assert data.num_classes == 6
    assert data.n_train == data.count_train()
    total = sum(len(pieces_of(name, 20)) for name in PACKAGES)
    assert data.n_train + len(data.splits.test) == total


def test_it_is_the_same_in_another_process_with_another_hash_seed():
    data = made(n_train=60)
    x, y = data.splits.train.tensors
    found = subprocess.run(
        [sys.executable, "-c", SUM],
        capture_output=True,
        text=True,
        check=True,
        env={**__import__("os").environ, "PYTHONHASHSEED": "7"},
    )
    assert found.stdout.split()[0] == float(x.double().sum()).hex()
    assert found.stdout.strip().endswith(str(y.tolist()))


def test_classes_have_their_shares_and_a_recipe_trains_on_it(quiet_trainer):
    data = made(n_train=120, packages=["json", "asyncio"])
    share = float((data.splits.train.tensors[1] == 1).double().mean())
    counts = [len(pieces_of(name, 20)) for name in ("json", "asyncio")]
    assert share == pytest.approx(counts[1] / sum(counts), abs=0.03)
    trainer = quiet_trainer(max_epochs=1, logger=False)
    trainer.fit(WideFC(hidden=[16], guard=False, diagnostics=False), datamodule=data)
    assert trainer.global_step == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"packages": ["asyncio"]}, "packages: .*at least two different"),
        ({"packages": ["asyncio", "asyncio"]}, "at least two different"),
        ({"packages": ["asyncio", "nopackage"]}, "no source of 'nopackage'.*no such package"),
        ({"packages": ["asyncio", "math"]}, "no source of 'math'"),
        ({"lines": 0}, "lines: must be at least 1"),
        ({"lines": 10**6}, "with a piece of 1000000 lines"),
        ({"test_fraction": 1.0}, "test_fraction"),
        ({"n_train": 10**6}, "training samples are left"),
    ],
)
def test_mistakes_say_what_is_wrong(options, says):
    with pytest.raises(MisconfigurationException, match=says):
        made(**options)
