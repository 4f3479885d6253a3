"""A store on disk: interrupted runs, files that were changed, what is refused, and what is left untouched."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.sketches import SketchStore

LOSS = nn.CrossEntropyLoss()


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(96, 5)
    )


def data(count=22):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 6, 6, generator=generator), torch.arange(count) % 5


def loader(count=22, batch=4):
    return DataLoader(TensorDataset(*data(count)), batch_size=batch)


def create(folder, **options):
    return SketchStore.create(folder, network(), like=next(iter(loader())), loss_fn=LOSS, size=40, groups=4, **options)


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[2])
import test_store as own
import lightning_conv.sketches.collecting as collecting
collecting.PAUSE = 0.0
def killed():
    for number, batch in enumerate(own.loader()):
        if number == 4:
            os._exit(9)
        yield batch
own.create(sys.argv[1]).add(own.network(), killed(), name="a")
"""


def test_a_killed_run_is_continued_and_equals_one_that_was_not_to_the_last_bit(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), str(Path(__file__).parent)]
    assert subprocess.run(command, check=False).returncode == 9
    part = tmp_path / "killed" / "a.part"
    assert 0 < json.loads((part / "checkpoint.json").read_text())["batches"] < 6
    with (part / "rows.npy").open("ab") as file:
        file.write(b"half of a block that the journal does not know")
    store = SketchStore.open(tmp_path / "killed", loss_fn=LOSS)
    assert store.names == []
    seen = []
    store.add(network(), loader(), name="a", progress=seen.append)
    create(tmp_path / "whole").add(network(), loader(), name="a")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert not part.exists()
    assert seen[-1] == 1.0


@pytest.mark.parametrize("stops", [1, 2, 5])
def test_a_run_that_failed_is_continued(tmp_path, stops, monkeypatch):
    monkeypatch.setattr("lightning_conv.sketches.collecting.PAUSE", 0.0)
    monkeypatch.setattr("lightning_conv.sketches.sketcher.AT_ONCE", 2**15)  # less than a batch

    def failing():
        for number, batch in enumerate(loader()):
            if number == stops:
                raise OSError("the disk of the data is gone")
            yield batch

    with pytest.raises(OSError, match="the disk of the data is gone"):
        create(tmp_path / "a").add(network(), failing(), name="a")
    create(tmp_path / "a").add(network(), loader(), name="a")
    create(tmp_path / "b").add(network(), iter(list(loader())), name="a")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_run_is_not_continued_with_other_samples_or_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_conv.sketches.collecting.PAUSE", 0.0)

    def some():
        yield from list(loader())[:3]
        raise OSError("gone")

    store = create(tmp_path / "a")
    with pytest.raises(OSError, match="gone"):
        store.add(network(), some(), name="a")
    before = files(tmp_path / "a")
    for other in (DataLoader(TensorDataset(*(each.flip(0) for each in data())), 4), loader(batch=5), loader(count=7)):
        with pytest.raises(ValueError, match=r"loader: its first 3 batches are not those of the interrupted call"):
            store.add(network(), other, name="a")
    torch.manual_seed(5)
    changed = network()
    with torch.no_grad():
        changed[0].bias[0] += 1
    with pytest.raises(ValueError, match=r"name: 'a' was begun with other weights"):
        store.add(changed, loader(), name="a")
    assert files(tmp_path / "a") == before


def test_the_batches_do_not_change_the_sketches(tmp_path):
    store = create(tmp_path / "a", dtype="float32")
    for batch in (4, 22):
        store.add(network(), loader(batch=batch), name=f"by_{batch}")
    small, large = (store.sketches(name).values for name in ("by_4", "by_22"))
    torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-6 * float(large.abs().max()))


def test_two_writers_of_one_checkpoint_do_not_mix(tmp_path):
    store = create(tmp_path / "a")

    def batches():
        """A loader in whose midst another call, as of another rank, begins the same checkpoint."""
        for number, batch in enumerate(loader()):
            if number == 2:
                with pytest.raises(ValueError, match="name: 'a' is being written by another process; let one rank"):
                    create(tmp_path / "a").add(network(), loader(), name="a")
            yield batch

    store.add(network(), batches(), name="a")
    create(tmp_path / "b").add(network(), loader(), name="a")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_complete_checkpoint_is_returned_and_not_computed_again(tmp_path):
    store = create(tmp_path / "a")
    first = store.add(network(), loader(), name="a")
    assert store.add(network(), None, name="a") == first
    changed = network()
    changed[1].running_mean += 1
    with pytest.raises(ValueError, match=r"name: 'a' is complete, with other weights; take another name"):
        store.add(changed, loader(), name="a")


def test_the_model_and_the_run_are_untouched(tmp_path, snapshot):
    model = network().train()
    model(data()[0]).sum().backward()
    model[0].weight.requires_grad_(False)
    before = snapshot(model)
    store = SketchStore.create(tmp_path / "b", model, like=data(), loss_fn=LOSS, size=40, groups=4)
    store.add(model, [data()], name="a")
    store.sketch(model, data())
    with pytest.raises(ValueError, match="NaN"):
        store.sketch(model, (data()[0] * torch.nan, data()[1]))
    assert snapshot(model) == before
    assert store.settings.layout.blocks[0].names == ("0.bias",)


def test_files_are_plain_arrays_that_numpy_maps(tmp_path):
    store = create(tmp_path / "a")
    store.add(network(), loader(), name="a")
    rows = np.load(tmp_path / "a" / "a" / "rows.npy", mmap_mode="r", allow_pickle=False)
    exponents = np.load(tmp_path / "a" / "a" / "exponents.npy", mmap_mode="r", allow_pickle=False)
    assert rows.shape == (22, store.size)
    assert rows.dtype == np.float16
    expected = torch.from_numpy(rows.astype(np.float64) * 2.0 ** exponents.astype(np.float64)[:, None])
    assert torch.equal(expected, store.sketches("a").values)
    assert (tmp_path / "a" / "a" / "rows.npy").stat().st_size == 128 + 22 * 2 * store.size
    assert 22 * store.bytes_per_sample == rows.nbytes + exponents.nbytes


def test_the_meta_file_says_what_the_sketches_are(tmp_path):
    store = create(tmp_path / "a", seed=3)
    meta = json.loads((tmp_path / "a" / "meta.json").read_text())
    assert (meta["version"], meta["seed"], meta["size"], meta["dtype"]) == (1, 3, 40, "float16")
    assert meta["loss"] == "CrossEntropyLoss"
    assert meta["parameters"]["0.weight"] == [6, 1, 3, 3]
    assert SketchStore.open(tmp_path / "a").settings == store.settings


def damaged(kind, folder):
    path = folder / "a" / "rows.npy"
    if kind == "a shorter array":
        path.write_bytes(path.read_bytes()[:-2])
    elif kind == "no array":
        path.unlink()
    elif kind == "another header":
        path.write_bytes(path.read_bytes().replace(b"'<f2'", b"'<i2'"))
    elif kind == "another setting":
        text = (folder / "meta.json").read_text()
        (folder / "meta.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    elif kind == "no settings":
        (folder / "meta.json").unlink()
    elif kind == "half of the settings":
        text = (folder / "meta.json").read_text()
        (folder / "meta.json").write_text(text[: len(text) // 2])
    elif kind == "a later version":
        text = (folder / "meta.json").read_text()
        (folder / "meta.json").write_text(text.replace('"version": 1', '"version": 2'))
    elif kind == "a checkpoint of another store":
        create(folder.parent / "other", seed=9).add(network(), loader(), name="a")
        shutil.rmtree(folder / "a")
        shutil.copytree(folder.parent / "other" / "a", folder / "a")
    elif kind == "no record":
        (folder / "a" / "checkpoint.json").write_text("{}")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("a shorter array", r"name: 'a': .*rows.npy has \d+ bytes, need \d+ for 22 samples; remove"),
        ("no array", r"name: 'a': .*rows.npy is missing"),
        ("another header", r"the header of .*rows.npy was changed"),
        ("another setting", r"folder: .*meta.json was changed after it was written"),
        ("no settings", r"folder: .*meta.json cannot be read \(FileNotFoundError"),
        ("half of the settings", r"folder: .*meta.json cannot be read \(JSONDecodeError"),
        ("a later version", r"folder: .*meta.json has version 2, this is 1"),
        ("a checkpoint of another store", r"name: 'a' was written with other settings than meta.json"),
        ("no record", r"folder: .*checkpoint.json is not a file of a store"),
    ],
)
def test_a_folder_that_was_changed_gives_one_clear_error(tmp_path, kind, says):
    create(tmp_path / "a").add(network(), loader(), name="a")
    damaged(kind, tmp_path / "a")
    with pytest.raises(ValueError, match=says):
        SketchStore.open(tmp_path / "a")


def test_a_single_changed_bit_is_found_by_verify(tmp_path):
    store = create(tmp_path / "a")
    store.add(network(), loader(), name="a")
    store.verify("a")
    path = tmp_path / "a" / "a" / "rows.npy"
    raw = bytearray(path.read_bytes())
    raw[200] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(ValueError, match=r"rows.npy was changed after it was written"):
        store.verify("a")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"dtype": "int8"}, ValueError, "dtype: 'int8' is not one of 'float16', 'float32'"),
        ({"groups": 2}, ValueError, "groups: 2; need a whole number of at least 3"),
        ({"size": 3}, ValueError, "size: 3; need a whole number of at least 4"),
        ({"size": 2.5}, TypeError, "size: 2.5"),
        ({"seed": "a"}, TypeError, "seed: 'a'"),
        ({"parameters": "nothing*"}, ValueError, r"parameters: \['nothing\*'\]"),
        ({"loss_fn": nn.MSELoss}, TypeError, "loss_fn: the class MSELoss"),
        ({"like": data()[0]}, TypeError, "loader: its targets are None; need a tensor for loss_fn"),
        ({"like": "batch"}, TypeError, r"loader: yields 'batch' \(str\); need \(inputs, targets\)"),
    ],
)
def test_bad_options_are_named(tmp_path, options, error, says):
    options = {"like": data(), "loss_fn": LOSS, "size": 40, "groups": 4, **options}
    with pytest.raises(error, match=says):
        SketchStore.create(tmp_path / "a", network(), **options)
    assert not (tmp_path / "a").exists()


def test_other_uses_that_make_no_sense_are_refused(tmp_path):
    store = create(tmp_path / "a")
    store.add(network(), loader(), name="a")
    store.add(network(), loader(count=10), name="b")
    other = create(tmp_path / "b", seed=1)
    queries = other.sketch(network(), data(4))
    (tmp_path / "a" / "notes").mkdir()
    for action, error, says in (
        (lambda: store.lambda_min(), ValueError, "lambda_min: not estimated from sketches"),
        (lambda: store.kernel(name="a").lambda_min, ValueError, "lambda_min: not estimated from sketches"),
        (lambda: store.kernel(name="c"), ValueError, "name: 'c'; the store has 'a', 'b'"),
        (lambda: store.kernel([0]), ValueError, "name: None; need that of the checkpoint"),
        (lambda: store.kernel([22], name="a"), ValueError, "need numbers from 0 to 21"),
        (lambda: store.kernel(queries, name="a"), ValueError, "rows: sketches of a store with other settings"),
        (lambda: store.kernel(name="a", max_memory=100), MemoryError, "max_memory"),
        (lambda: store.nearest(queries, name="a"), ValueError, "queries: sketches of a store with other settings"),
        (lambda: store.nearest([0], name="a"), TypeError, "queries: "),
        (lambda: store.nearest(store.sketches("a"), 0, name="a"), ValueError, "most: 0"),
        (lambda: store.nearest(store.sketches("a"), name="a", by="size"), ValueError, "by: 'size'"),
        (lambda: store.drift("a", "b"), ValueError, "reference: 'b' and 'a' are of different samples"),
        (lambda: store.add(network(), loader(), name="../a"), ValueError, "name: '../a'; need letters"),
        (lambda: store.add(network(), [], name="c"), ValueError, "loader: yields no batch"),
        (lambda: store.add(network(), loader(), name="notes"), ValueError, "name: 'notes': .* is no checkpoint"),
        (lambda: store.add(nn.Linear(2, 2), loader(), name="c"), ValueError, "model: '0.weight' is missing"),
        (lambda: store.add(network(), loader(), name="c", engine="fast"), ValueError, "engine: 'fast'"),
        (lambda: SketchStore.open(tmp_path / "a").add(network(), loader(), name="c"), ValueError, "loss_fn: None"),
        (lambda: SketchStore.open(tmp_path / "a", loss_fn=nn.MSELoss()), ValueError, "loss_fn: MSELoss, but the store"),
        (lambda: create(tmp_path / "a", seed=4), ValueError, "has a store with another seed"),
        (lambda: create(tmp_path / "a" / "a"), ValueError, "is not empty and has no store"),
    ):
        with pytest.raises(error, match=says):
            action()
    assert store.names == ["a", "b"]


def test_samples_that_couple_are_refused(tmp_path):
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(x - x.mean(0))

    with pytest.raises(ValueError, match="samples couple or the forward is random"):
        SketchStore.create(tmp_path / "a", Centred(), like=torch.randn(8, 3))


def test_any_batch_is_taken_apart_by_split(tmp_path):
    x, y = data()
    batches = [{"image": x[rows], "label": y[rows]} for rows in (slice(0, 9), slice(9, 22))]
    store = SketchStore.create(
        tmp_path / "a",
        network(),
        like=batches[0],
        loss_fn=LOSS,
        size=40,
        groups=4,
        split=lambda batch: (batch["image"], batch["label"]),
    )
    store.add(network(), (batch for batch in batches), name="a")
    plain = create(tmp_path / "b")
    plain.add(network(), [(x, y)], name="a")
    torch.testing.assert_close(store.kernel(name="a").matrix, plain.kernel(name="a").matrix, rtol=1e-3, atol=1e-6)
