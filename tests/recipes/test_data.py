"""What the data modules promise: splits, an order that depends on (seed, epoch) alone, and clear refusals."""

import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_conv.recipes import DigitsDataModule, TorchvisionDataModule, WideFC
from lightning_conv.recipes.data import channel_moments, stratified_order


class BatchRecorder(Callback):
    """Keeps the inputs of every training batch, by epoch."""

    def __init__(self):
        self.epochs = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.epochs.setdefault(trainer.current_epoch, []).append(batch[0].clone())

    def order(self, epoch):
        return torch.cat(self.epochs[epoch])


def small_model():
    return WideFC(hidden=[8], width=16, guard=False, diagnostics=False)


def test_digits_are_split_by_class_without_overlap():
    data = DigitsDataModule()
    data.setup()
    train, test = (split.tensors for split in (data.splits.train, data.splits.test))
    assert (data.n_train, len(test[0]), data.num_classes, data.input_shape) == (1437, 360, 10, (1, 8, 8))
    assert train[0].dtype == torch.float32
    assert train[0].min() == 0.0
    assert train[0].max() == 1.0
    assert test[1].bincount().float().std() < 1.0
    together = torch.cat([train[0], test[0]]).flatten(1)
    assert len(torch.unique(together, dim=0)) == len(together) == 1797


def test_every_prefix_of_a_stratified_order_holds_the_classes_in_their_shares():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    order = stratified_order(labels, seed=3)
    assert torch.equal(order.sort().values, torch.arange(100))
    for size in (10, 20, 50, 90):
        counts = labels[order[:size]].bincount(minlength=3)
        assert (counts - size * torch.tensor([0.6, 0.3, 0.1])).abs().max() <= 1.0


def test_the_batches_are_a_function_of_seed_and_epoch(quiet_trainer):
    recorders = [BatchRecorder(), BatchRecorder(), BatchRecorder()]
    for recorder, seed in zip(recorders, (0, 0, 1), strict=True):
        torch.rand(7)  # another state of the global generator for every run
        trainer = quiet_trainer(max_epochs=2, callbacks=[recorder], limit_val_batches=0)
        trainer.fit(small_model(), DigitsDataModule(seed=seed, test_fraction=0.5))
    first, again, other_seed = recorders
    for epoch in (0, 1):
        assert torch.equal(first.order(epoch), again.order(epoch))
        assert not torch.equal(first.order(epoch), other_seed.order(epoch))
    assert not torch.equal(first.order(0), first.order(1))


def test_iterating_the_loaders_leaves_the_global_random_state_alone():
    data = DigitsDataModule()
    data.setup()
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert len(list(loader)) == len(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_resumed_at_the_end_of_an_epoch_equals_the_uninterrupted_one(quiet_trainer, tmp_path):
    def data():
        return DigitsDataModule(test_fraction=0.7)

    recorder, resumed_recorder = BatchRecorder(), BatchRecorder()
    torch.manual_seed(0)
    whole = small_model()
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    quiet_trainer(max_epochs=4, callbacks=[recorder, checkpoint], enable_checkpointing=True).fit(whole, data())

    torch.manual_seed(1)
    resumed = small_model()
    trainer = quiet_trainer(max_epochs=4, callbacks=[resumed_recorder])
    trainer.fit(resumed, data(), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)
    assert sorted(resumed_recorder.epochs) == [2, 3]
    assert torch.equal(resumed_recorder.order(3), recorder.order(3))
    for name, parameter in whole.state_dict().items():
        assert torch.equal(parameter, resumed.state_dict()[name])


def test_a_torchvision_set_is_read_from_disk_and_scaled(mnist_root: Path):
    data = TorchvisionDataModule("MNIST", root=str(mnist_root))
    data.setup()
    images, labels = data.splits.train.tensors
    assert (data.n_train, data.num_classes, data.input_shape) == (60, 3, (1, 28, 28))
    assert torch.allclose(images[:, 0, 0, 0], 25 * labels / 255)


def test_a_subset_is_stratified_and_seeded(mnist_root: Path):
    def read(seed: int) -> torch.Tensor:
        data = TorchvisionDataModule("MNIST", root=str(mnist_root), n_train=9, n_test=6, seed=seed)
        data.setup()
        assert data.splits.train.tensors[1].bincount().tolist() == [3, 3, 3]
        assert len(data.splits.test) == 6
        return data.splits.train.tensors[1]

    assert torch.equal(read(0), read(0))
    assert not torch.equal(read(0), read(1))


def test_missing_data_are_refused_with_the_folder_and_the_cure(tmp_path):
    data = TorchvisionDataModule("SVHN", root=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="download=True") as raised:
        data.setup()
    assert str(tmp_path / "nowhere") in str(raised.value)
    assert "SVHN" in str(raised.value)


def test_an_unknown_data_set_is_refused_with_near_matches():
    with pytest.raises(MisconfigurationException, match=r"dataset: 'mnst'.*did you mean MNIST or "):
        TorchvisionDataModule("mnst")


def test_a_subset_larger_than_the_split_is_refused(mnist_root: Path):
    with pytest.raises(MisconfigurationException, match="n_train: MNIST has 60 samples"):
        TorchvisionDataModule("MNIST", root=str(mnist_root), n_train=61).setup()


def test_a_subset_of_the_digits_leaves_the_test_split_as_it_is():
    whole, part = DigitsDataModule(), DigitsDataModule(n_train=200)
    whole.setup()
    part.setup()
    assert part.n_train == 200
    assert part.splits.train.tensors[1].bincount().min() >= 18
    assert torch.equal(part.splits.test.tensors[0], whole.splits.test.tensors[0])
    with pytest.raises(MisconfigurationException, match="n_train: 1437 training samples are left"):
        DigitsDataModule(n_train=1438).setup()
    with pytest.raises(MisconfigurationException, match="n_train: must be at least 1"):
        DigitsDataModule(n_train=0)


def test_a_constant_channel_is_centred_and_not_scaled():
    images = torch.rand(50, 2, 3, 3)
    images[:, 1] = 0.25
    mean, std = channel_moments(images)
    assert mean.tolist() == pytest.approx([float(images[:, 0].mean()), 0.25])
    assert std.tolist() == pytest.approx([float(images[:, 0].std(correction=0)), 1.0])


def test_sizes_before_setup_are_refused():
    with pytest.raises(MisconfigurationException, match="call `setup"):
        _ = DigitsDataModule().n_train


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match="run: pip install scikit-learn"):
        DigitsDataModule().setup()
