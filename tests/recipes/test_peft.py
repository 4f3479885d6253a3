"""Adapters of ``peft``: the kernel of the trainable parameters is that of dense gradients (``pip install -e ".[peft]"``)."""

import pytest
import torch
from dense_kernels import assert_same, naive_gram
from torch import nn

from lightning_conv import NTKOperator, ntk_gram
from lightning_conv.recipes import GPT

peft = pytest.importorskip("peft", reason='needs peft: pip install -e ".[peft]"')


class Logits(nn.Module):
    """A language model of ``transformers``, whose output is an object, as a module that returns logits."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, tokens):
        return self.network(input_ids=tokens).logits


def own(**options):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["qkv", "proj", "fc"], **options)
    return peft.get_peft_model(GPT(11, 8, width=8, depth=2, heads=2), config)


def of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
    network = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, attn_implementation="eager"))
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    return Logits(peft.get_peft_model(network, config))


def trained(model):
    """Give the second factors, which are zero at first, other values."""
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                each.add_(0.1 * torch.randn_like(each))
    return model.double().eval()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("make", [own, lambda: own(use_rslora=True), lambda: own(use_dora=True), of_transformers])
@pytest.mark.parametrize("start", [True, False])
def test_the_kernel_of_the_adapters_is_that_of_dense_gradients(make, start):
    model = make().double().eval() if start else trained(make())
    trainable = {name for name, each in model.named_parameters() if each.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    tokens = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(1))
    gram = ntk_gram(model, tokens, parameters="*lora_*")
    assert set(gram.parameters) | set(gram.unused) == trainable
    truth = naive_gram(model, tokens, "trace")
    assert_same(gram.matrix, truth)
    assert_same(ntk_gram(model, tokens).matrix, truth)  # without parameters=: what is trainable
    operator = NTKOperator(model, tokens, parameters="*lora_*", outputs="trace")
    assert_same(operator @ torch.eye(4, dtype=torch.float64), truth)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_low_rank_adapters_have_the_layer_rule_of_linear_layers():
    model = trained(own())
    tokens = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(1))
    assert not ntk_gram(model, tokens).general
