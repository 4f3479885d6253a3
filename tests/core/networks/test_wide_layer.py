"""Wide layers: inserted into every torchvision classifier, and recognised where the theorem applies."""

import pytest
import torch
import torchvision
from torch import nn

from lightning_conv import certify_expressivity, find_head, last_hidden_features
from lightning_conv.networks.wide_layer import find_wide_layer, wide_layer_width, widen_head

CLASSIFIERS = ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "regnet_y_400mf", "mnasnet0_5"]
LARGE = ["alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "swin_t", "vgg11_bn", "vit_b_16"]


@pytest.mark.parametrize("name", [*CLASSIFIERS, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_any_torchvision_classifier_is_widened(name):
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, num_classes=4, **options).eval()
    wide = widen_head(model, 30)
    images = torch.randn(2, 3, 224, 224)
    head = find_head(wide, images)
    assert head.name.endswith(".head")
    assert (head.module.in_features, head.module.out_features) == (33, 4)
    layer = find_wide_layer(wide, head, images)
    assert not isinstance(layer, str), layer
    assert layer.name == head.name.removesuffix("head") + "wide"
    assert not any(isinstance(module, nn.Softplus) for module in model.modules())


def test_the_rest_of_the_network_is_the_same():
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2, bias=False)).double()
    wide = widen_head(model, 10, factor=2)
    assert wide[2].wide.weight.dtype == torch.float64
    assert wide[2].wide.out_features == 20
    assert wide[2].head.bias is None
    assert torch.equal(wide[0].weight, model[0].weight)
    assert isinstance(model[2], nn.Linear)


def test_a_linear_model_and_a_named_head():
    assert isinstance(widen_head(nn.Linear(4, 2), 6), nn.Sequential)
    model = nn.ModuleDict({"head": nn.Linear(4, 2), "other": nn.Linear(4, 4)})
    assert isinstance(widen_head(model, 6, head="head")["head"], nn.Sequential)


def test_random_wide_features_have_full_rank():
    torch.manual_seed(0)
    wide = widen_head(nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 3)).double(), 50)
    x = 3 * torch.randn(50, 8, dtype=torch.float64)
    assert certify_expressivity(last_hidden_features(wide, find_head(wide, x), x)).verdict == "certified"


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="n: 0"):
        widen_head(nn.Linear(2, 2), 0)
    with pytest.raises(ValueError, match="no linear layer"):
        widen_head(nn.Conv2d(1, 1, 1), 5)
    with pytest.raises(
        ValueError, match=r"ends in a convolution \('classifier.1'\?\), as SqueezeNet does, end it in pooling"
    ):
        widen_head(torchvision.models.squeezenet1_1(num_classes=4), 30)
    with pytest.raises(ValueError, match="head: 'fc'"):
        widen_head(nn.Linear(2, 2), 5, head="fc")
    with pytest.raises(ValueError, match="width_factor"):
        wide_layer_width(10, 0)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.act, self.head = nn.Linear(4, 4), nn.Softplus(), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.act(self.wide(torch.tanh(self.wide(x)))))


class Tied(nn.Module):
    """An earlier layer has the wide layer's weight (or bias), through another module."""

    def __init__(self, what):
        super().__init__()
        self.first, self.wide, self.act, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Softplus(), nn.Linear(4, 2)
        setattr(self.first, what, getattr(self.wide, what))

    def forward(self, x):
        return self.head(self.act(self.wide(torch.tanh(self.first(x)))))


def frozen():
    model = nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 2))
    model[0].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), "not the result of an activation"),
        (nn.Sequential(nn.Linear(4, 6, bias=False), nn.Softplus(), nn.Linear(6, 2)), "no bias"),
        (
            nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Softplus(), nn.Linear(6, 2)),
            "not the result of one linear layer",
        ),
        (
            nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.LayerNorm(6), nn.Linear(6, 2)),
            "not the result of an activation",
        ),
        (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Softplus(), nn.Linear(6, 2)),
            "reparametrized",
        ),
        (Twice(), "several times"),
        (frozen(), "frozen"),
        (Tied("weight"), "'wide' shares a parameter with 'first'"),
        (Tied("bias"), "'wide' shares a parameter with 'first'"),
    ],
)
def test_what_the_theorem_does_not_cover_is_said(model, why):
    x = torch.randn(3, 4)
    assert why in find_wide_layer(model, find_head(model, x), x)


def test_dropout_between_activation_and_head_is_nothing_in_eval_mode():
    model = nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.Dropout(0.5), nn.Linear(6, 2))
    x = torch.randn(3, 4)
    assert find_wide_layer(model, find_head(model, x), x).name == "0"
