"""Every torchvision data set is read from files in its own format; only torchvision's checksums are left out."""

import pickle
import struct

import numpy as np
import pytest
import scipy.io
import torch
from torchvision import datasets

from lightning_conv.recipes import TorchvisionDataModule

CLASSES = 4


def labels_of(count):
    """0, 1, 2, 3, 0, ..."""
    return np.arange(count) % CLASSES


def colour(labels):
    """Sample i of class c has the colour (10 c + 1, 10 c + 2, 10 c + 3) everywhere but in the first pixel, which is its number i."""
    return (10 * np.asarray(labels)[:, None] + np.array([1, 2, 3])).astype(np.uint8)


def write_idx(folder, name):
    raw = folder / name / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 16), ("t10k", 8)):
        labels = labels_of(count).astype(np.uint8)
        images = np.broadcast_to(colour(labels)[:, :1, None], (count, 28, 28)).copy()
        images[:, 0, 0] = np.arange(count)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">iiii", 2051, count, 28, 28) + images.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, count) + labels.tobytes())


def write_cifar(folder, name, patch):
    kind = getattr(datasets, name)
    base = folder / kind.base_folder
    base.mkdir()

    def batch(file, count, first):
        labels = labels_of(count)
        images = np.broadcast_to(colour(labels)[:, :, None, None], (count, 3, 32, 32)).copy()
        images[:, 0, 0, 0] = first + np.arange(count)
        key = "fine_labels" if name == "CIFAR100" else "labels"
        (base / file).write_bytes(pickle.dumps({"data": images.reshape(count, -1), key: labels.tolist()}))

    files = [file for file, _ in kind.train_list]
    for number, file in enumerate(files):
        batch(file, 16 // len(files) // 4 * 4 or 4, 4 * number)
    batch(kind.test_list[0][0], 8, 0)
    (base / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: ["a", "b", "c", "d"]}))
    patch.setattr(kind, "train_list", [[file, None] for file in files])
    patch.setattr(kind, "test_list", [[kind.test_list[0][0], None]])
    patch.setattr(kind, "meta", {**kind.meta, "md5": None})


def write_svhn(folder, patch):
    for split, count in (("train", 16), ("test", 8)):
        labels = labels_of(count)
        images = np.broadcast_to(colour(labels).T[None, None], (32, 32, 3, count)).copy()
        images[0, 0, 0] = np.arange(count)
        # The digit 0 is class 10 in these files.
        scipy.io.savemat(folder / f"{split}_32x32.mat", {"X": images, "y": np.where(labels == 0, 10, labels)[:, None]})
    listed = {split: [url, file, None] for split, (url, file, _) in datasets.SVHN.split_list.items()}
    patch.setattr(datasets.SVHN, "split_list", listed)


def write_semeion(folder, patch):
    count = 24
    pixels = np.zeros((count, 256))
    pixels[:, 1] = 1.0
    for number in range(count):
        pixels[number, 16:21] = [number >> bit & 1 for bit in range(5)]
    classes = np.eye(10)[labels_of(count)]
    lines = (" ".join(f"{value:.4f}" for value in row) for row in np.hstack([pixels, classes]))
    (folder / "semeion.data").write_text("\n".join(lines) + "\n")
    patch.setattr(datasets.SEMEION, "md5_checksum", None)


@pytest.fixture
def root_of(tmp_path, monkeypatch):
    """Writes a tiny copy of a data set and returns its root."""

    def write(name):
        if name in ("MNIST", "KMNIST", "FashionMNIST"):
            write_idx(tmp_path, name)
        elif name.startswith("CIFAR"):
            write_cifar(tmp_path, name, monkeypatch)
        elif name == "SVHN":
            write_svhn(tmp_path, monkeypatch)
        else:
            write_semeion(tmp_path, monkeypatch)
        return str(tmp_path)

    return write


@pytest.mark.parametrize("name", ["MNIST", "KMNIST", "FashionMNIST", "CIFAR10", "CIFAR100", "SVHN"])
def test_a_set_with_two_splits_gives_its_images_and_labels(name, root_of):
    data = TorchvisionDataModule(name, root=root_of(name))
    data.setup()
    grey = "MNIST" in name
    assert data.input_shape == ((1, 28, 28) if grey else (3, 32, 32))
    assert data.num_classes == CLASSES
    for split, least in ((data.splits.train, 16), (data.splits.test, 8)):
        images, labels = split.tensors
        assert len(images) == len(labels) >= least
        assert labels.dtype == torch.int64
        assert labels.bincount().tolist() == [len(labels) // CLASSES] * CLASSES
        expected = torch.from_numpy(colour(labels.numpy())[:, : images.shape[1]]).float() / 255
        assert torch.allclose(images[:, :, 5, 7], expected)
        numbers = (255 * images[:, 0, 0, 0]).round().long()
        assert numbers.tolist() == list(range(len(images)))  # every sample once, in the order of the files
        assert torch.equal(labels, torch.from_numpy(labels_of(len(labels))))


def test_the_one_split_of_semeion_is_divided_by_class(root_of):
    data = TorchvisionDataModule("SEMEION", root=root_of("SEMEION"))
    data.setup()
    assert data.input_shape == (1, 16, 16)
    train, test = (split.tensors for split in (data.splits.train, data.splits.test))
    assert (len(train[0]), len(test[0])) == (19, 5)
    assert test[1].bincount(minlength=CLASSES).max() <= 2
    numbers = [[int(bits @ (2 ** torch.arange(5.0))) for bits in images[:, 0, 1, :5]] for images, _ in (train, test)]
    assert sorted(numbers[0] + numbers[1]) == list(range(24))
    for found, (_, labels) in zip(numbers, (train, test), strict=True):
        assert [number % CLASSES for number in found] == labels.tolist()
    other = TorchvisionDataModule("SEMEION", root=data.root, seed=1)
    other.setup()
    assert not torch.equal(other.splits.test.tensors[0], test[0])


@pytest.mark.parametrize("name", ["CIFAR100", "KMNIST", "SEMEION", "SVHN"])
def test_a_set_that_is_not_there_names_the_folder_and_how_to_get_it_and_nothing_is_downloaded(
    name, tmp_path, monkeypatch
):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("went to the network"))
    data = TorchvisionDataModule(name, root=str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError) as raised:
        data.setup()
    message = str(raised.value)
    for word in (name, str(tmp_path / "empty"), "Nothing is downloaded here", "download=True"):
        assert word in message


@pytest.mark.parametrize("name", ["CIFAR10", "KMNIST"])
def test_normalized_channels_have_mean_0_and_standard_deviation_1_over_the_training_split(name, root_of):
    plain, normalized = (
        TorchvisionDataModule(name, root=root, normalize=on) for root in [root_of(name)] for on in (0, 1)
    )
    plain.setup()
    normalized.setup()
    for split in ("train", "test"):
        raw, scaled = (getattr(data.splits, split).tensors[0].double().numpy() for data in (plain, normalized))
        training = plain.splits.train.tensors[0].double().numpy()
        mean, std = training.mean((0, 2, 3), keepdims=True), training.std((0, 2, 3), keepdims=True)
        np.testing.assert_allclose(scaled, (raw - mean) / std, atol=1e-5)
