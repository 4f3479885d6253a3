"""What augmentation promises: a draw that depends on (seed, epoch, sample) alone, and a guard that says what it is about."""

import itertools

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_conv.callbacks import ExpressivityGuard
from lightning_conv.recipes import DigitsDataModule, WideFC
from lightning_conv.recipes.augmentation import RandomCrops


def dataset(mirror=False, seed=0):
    images = torch.arange(6 * 2 * 4 * 5, dtype=torch.float32).reshape(6, 2, 4, 5) + 1
    return images, RandomCrops(
        images, torch.arange(6), padding=1, fill=torch.tensor([-1.0, -2.0]), mirror=mirror, seed=seed
    )


def shifted(image, down, right, fill):
    """By a loop over the pixels."""
    moved = torch.empty_like(image)
    _, height, width = image.shape
    for c, y, x in itertools.product(range(2), range(height), range(width)):
        inside = 0 <= y + down < height and 0 <= x + right < width
        moved[c, y, x] = image[c, y + down, x + right] if inside else fill[c]
    return moved


@pytest.mark.parametrize("mirror", [False, True])
def test_an_augmented_image_is_a_shift_and_maybe_the_mirror_image_of_one(mirror):
    images, augmented = dataset(mirror)
    seen = set()
    for epoch, index in itertools.product(range(60), range(6)):
        image, label = augmented[epoch, index]
        assert int(label) == index
        shifts = {s: shifted(images[index], *s, [-1.0, -2.0]) for s in itertools.product((-1, 0, 1), repeat=2)}
        found = [(s, False) for s, moved in shifts.items() if torch.equal(moved, image)]
        found += [(s, True) for s, moved in shifts.items() if torch.equal(moved.flip(-1), image)]
        assert len(found) == 1
        seen |= set(found)
    assert len(seen) == (18 if mirror else 9)  # all of them come


def test_the_draw_is_a_function_of_seed_epoch_and_sample():
    def draw(augmented, epoch):
        return torch.stack([augmented[epoch, index][0] for index in range(6)])

    _, first = dataset()
    _, again = dataset()
    _, other = dataset(seed=1)
    late = draw(first, 5)
    torch.rand(3)
    assert torch.equal(late, draw(again, 5))  # without the epochs before
    assert not torch.equal(late, draw(first, 6))
    assert not torch.equal(late, draw(other, 5))
    before = torch.get_rng_state()
    draw(first, 7)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sample_asked_for_by_its_index_is_drawn_from_the_global_random_state():
    _, augmented = dataset()
    torch.manual_seed(3)
    first = [augmented[2][0] for _ in range(8)]
    torch.manual_seed(3)
    assert all(torch.equal(augmented[2][0], image) for image in first)
    assert any(not torch.equal(first[0], image) for image in first)


def test_only_training_batches_are_augmented():
    data = DigitsDataModule(test_fraction=0.9, augment=True, normalize=True)
    data.setup()
    plain = data.splits.train.tensors[0]
    batches = torch.cat([batch[0] for batch in data.train_dataloader()])
    order = list(data.train_dataloader().sampler)
    assert sorted(index for _, index in order) == list(range(len(plain)))
    assert not torch.equal(batches, plain[[index for _, index in order]])
    assert torch.equal(torch.cat([batch[0] for batch in data.val_dataloader()]), data.splits.test.tensors[0])
    # The border is as black as the digits' own background: no new value comes in.
    assert float(batches.min()) == float(plain.min())


def test_a_resumed_run_sees_the_same_draws_and_the_guard_says_what_its_certificate_is_about(quiet_trainer, tmp_path):
    def run(**fit):
        checkpoints = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        trainer = quiet_trainer(max_epochs=4, callbacks=[checkpoints], enable_checkpointing=True)
        module = WideFC(hidden=[16], diagnostics=False)
        trainer.fit(module, DigitsDataModule(test_fraction=0.9, augment=True), **fit)
        (guard,) = [callback for callback in trainer.callbacks if isinstance(callback, ExpressivityGuard)]
        return module, guard

    seed_everything(0, verbose=False)
    whole, guard = run()
    assert "inputs or targets are random when they are read" in guard.reason
    assert "one draw" in guard.reason
    assert "leave some out" not in guard.reason  # the sampler is a declared one
    torch.manual_seed(1)
    resumed, _ = run(ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
