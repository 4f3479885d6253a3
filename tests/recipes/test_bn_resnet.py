"""What the network of the recipe `bn_resnet` is, and what the recipe refuses."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import seed_everything
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.models import resnet18

from lightning_conv import find_head
from lightning_conv.callbacks import ExpressivityGuard
from lightning_conv.networks.analytic import find_kinks
from lightning_conv.networks.wide_layer import find_wide_layer
from lightning_conv.recipes import BNResNet, DigitsDataModule, bn_resnet
from lightning_conv.recipes.data import InMemoryDataModule, Splits


@pytest.mark.parametrize(
    ("arch", "layers", "first", "pooled"),
    [("resnet8", 8, 16, 64), ("resnet14", 14, 16, 64), ("resnet20", 20, 16, 64), ("resnet18", 18, 64, 512)],
)
def test_an_architecture_has_the_layers_of_its_name(arch, layers, first, pooled):
    network = bn_resnet(3, 10, width=30, arch=arch)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    # He et al. count the 3 x 3 convolutions and one linear layer; the wide layer is extra.
    assert sum(module.kernel_size == (3, 3) for module in convolutions) + 1 == layers
    assert network.conv1.out_channels == first
    assert [network.fc.wide.in_features, network.fc.wide.out_features, network.fc.head.out_features] == [pooled, 30, 10]


def test_the_blocks_of_torchvisions_resnet18_compute_the_same():
    """Against torchvision's own network with the same weights, its stem exchanged, where softplus is nearly ReLU."""
    torch.manual_seed(0)
    ours = bn_resnet(3, 5, width=40, arch="resnet18", feature_norm=False, beta=1e6).eval()
    theirs = resnet18(num_classes=5)
    theirs.conv1, theirs.maxpool, theirs.fc = ours.conv1, nn.Identity(), ours.fc
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean)
    missing = ours.load_state_dict(theirs.state_dict(), strict=True)
    assert not missing.missing_keys
    images = torch.rand(4, 3, 20, 20)
    assert torch.allclose(ours(images), theirs.eval()(images), rtol=1e-4, atol=1e-4)


def test_initial_weights_have_torchvisions_spread():
    torch.manual_seed(0)
    ours, theirs = bn_resnet(3, 10, width=10, arch="resnet18"), resnet18()
    for name in ("layer1.0.conv1", "layer3.0.downsample.0", "layer4.1.conv2"):
        spreads = [float(network.get_submodule(name).weight.std()) for network in (ours, theirs)]
        assert spreads[0] == pytest.approx(spreads[1], rel=0.05)


@pytest.mark.parametrize("arch", ["resnet8", "resnet18"])
def test_the_network_is_real_analytic_and_its_wide_layer_is_one_to_which_the_theorem_on_distinct_inputs_applies(arch):
    network = bn_resnet(2, 3, width=20, arch=arch, channels=4).eval()
    images = torch.rand(2, 2, 9, 11)
    assert find_kinks(network, images) == []
    head = find_head(network, images)
    assert head.name == "fc.head"
    layer = find_wide_layer(network, head, images)
    assert not isinstance(layer, str), layer
    assert layer.name == "fc.wide"


@pytest.mark.parametrize("beta", [10.0, 100.0])
def test_every_activation_has_the_given_sharpness(beta):
    network = bn_resnet(1, 3, width=20, arch="resnet8", beta=beta)
    assert {module.beta for module in network.modules() if isinstance(module, nn.Softplus)} == {beta}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arch": "resnet50"}, "arch: 'resnet50' is not one of 'resnet8', 'resnet14'"),
        ({"channels": 0}, "channels: 0; need a whole number of at least 1"),
        ({"width": 0}, "width: 0; need a whole number of at least 1"),
        ({"beta": -1.0}, "beta: -1.0"),
    ],
)
def test_what_makes_no_network_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        bn_resnet(1, 3, **{"width": 20, **settings})


def test_inputs_that_are_no_images_are_refused(quiet_trainer):
    data = DigitsDataModule(test_fraction=0.9)
    data.setup()
    for shape in [(64,), (1, 7, 8)]:
        with pytest.raises(ValueError, match="BNResNet takes images"):
            BNResNet().input_size(shape)


def test_a_last_batch_of_one_sample_is_refused_before_the_first_epoch(quiet_trainer):
    data = DigitsDataModule(test_fraction=0.9, batch_size=89)  # 179 = 2 * 89 + 1
    with pytest.raises(
        MisconfigurationException, match="batch_size: 89 leaves a last batch of a single one of the 179"
    ):
        quiet_trainer(max_epochs=1).fit(BNResNet(arch="resnet8", channels=4), data)
    data = DigitsDataModule(test_fraction=0.9, batch_size=90)
    quiet_trainer(max_epochs=1).fit(BNResNet(arch="resnet8", channels=4, guard=False, diagnostics=False), data)


class ColourImages(InMemoryDataModule):
    """Random images that are not square."""

    def count_train(self):
        return 40

    def read(self):
        generator = torch.Generator().manual_seed(0)
        images, labels = torch.rand(50, 3, 10, 12, generator=generator), torch.arange(50) % 4
        return Splits(TensorDataset(images[:40], labels[:40]), TensorDataset(images[40:], labels[40:]), 4)


@pytest.mark.slow
def test_colour_images_of_any_shape_are_trained_on_and_certified(quiet_trainer):
    seed_everything(0, verbose=False)
    trainer = quiet_trainer(max_epochs=4)
    module = BNResNet(arch="resnet8", channels=4, probe_size=8)
    trainer.fit(module, ColourImages(batch_size=8, seed=0, normalize=True))
    (guard,) = [callback for callback in trainer.callbacks if isinstance(callback, ExpressivityGuard)]
    assert (module.hparams["in_channels"], module.hparams["num_classes"], module.hparams["width"]) == (3, 4, 44)
    assert (guard.phase, guard.certificate.verdict, guard.certificate.rank_lower) == (2, "certified", 40)
    assert guard.history[-1]["loss"] < guard.history[0]["loss"]
