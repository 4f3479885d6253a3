"""The laboratory on MNIST: the experiments that digits were the only data of take images of another size too."""

import json
import struct

import pytest
import torch

from lightning_conv.recipes.cli import main
from lightning_conv.recipes.lab.data import splits

NAMES = ["averaged-sgd", "chatterjee", "gclip", "kawaguchi-sun", "oymak", "threshold"]


@pytest.fixture
def random_mnist(tmp_path):
    """200 training and 40 test images of random pixels around a mean of their class, in MNIST's own format."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    means = 160 * torch.rand(10, 28, 28, generator=generator)
    for split, count in (("train", 200), ("t10k", 40)):
        labels = torch.arange(count, dtype=torch.uint8) % 10
        images = (means[labels.long()] + 90 * torch.rand(count, 28, 28, generator=generator)).to(torch.uint8)
        header = struct.pack(">iiii", 2051, count, 28, 28)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, count) + labels.numpy().tobytes())
    return tmp_path / "data"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in ("chatterjee", "threshold") else ()) for name in NAMES],
)
def test_an_experiment_takes_mnist_and_says_so(name, random_mnist, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_CONV_SMALL", "1")
    words = ["--source", "mnist", "--root", str(random_mnist)]
    assert main(["lab", name, *words, "--out", str(tmp_path)]) == 0
    (page,) = tmp_path.glob("*.md")
    assert "of mnist" in page.read_text()
    assert json.loads(page.with_suffix(".json").read_text())["command"].endswith(f"--out {tmp_path}")


def test_the_splits_are_those_of_the_source(random_mnist):
    found = splits("mnist", random_mnist)
    assert [tuple(each.tensors[0].shape) for each in (found.train, found.test)] == [(200, 1, 28, 28), (40, 1, 28, 28)]
    assert splits("digits", "nowhere").train.tensors[0][0].numel() == 64


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_without_mnist_gets_one_message(name, capsys, tmp_path):
    assert main(["lab", name, "--source", "mnist", "--root", str(tmp_path / "gone")]) == 2
    assert "gone" in capsys.readouterr().err
