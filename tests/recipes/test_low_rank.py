"""Low-rank adapters: the network is what it was at the start, trains in the adapters alone, and can be merged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_conv import ntk_gram
from lightning_conv.recipes import GPT, LoRALinear, add_adapters, merge_adapters


@pytest.fixture
def gpt():
    torch.manual_seed(0)
    return GPT(11, 6, width=8, depth=2, heads=2)


TOKENS = torch.arange(20).reshape(4, 5) % 11


def test_the_output_is_w_x_plus_b_plus_the_scaled_product():
    layer = LoRALinear(5, 3, rank=2, alpha=6.0)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 7, 5)
    expected = x @ (layer.weight + 3.0 * layer.lora_B @ layer.lora_A).T + layer.bias
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert torch.allclose(layer.merged()(x), expected, atol=1e-6)


def test_adapters_leave_the_network_as_it_is_and_are_all_that_trains(gpt):
    before, names = gpt(TOKENS), {name for name, _ in gpt.named_parameters()}
    chosen = add_adapters(gpt, ["*attn*", "*mlp.fc"], rank=2, alpha=4.0)
    assert torch.equal(gpt(TOKENS), before)
    assert chosen == tuple(f"h.{i}.{layer}" for i in range(2) for layer in ("attn.qkv", "attn.proj", "mlp.fc"))
    trained = {name for name, each in gpt.named_parameters() if each.requires_grad}
    assert trained == {f"{name}.lora_{side}" for name in chosen for side in "AB"}
    assert names <= {name for name, _ in gpt.named_parameters()}
    loss = gpt(TOKENS).square().sum()
    loss.backward()
    assert all(bool(gpt.get_parameter(f"{name}.lora_B").grad.any()) for name in chosen)
    assert not any(bool(gpt.get_parameter(f"{name}.lora_A").grad.any()) for name in chosen)  # since B is zero


def test_merged_adapters_compute_the_same(gpt):
    chosen = add_adapters(gpt, ["*mlp*"], rank=2)
    for name in chosen:
        nn.init.normal_(gpt.get_parameter(f"{name}.lora_B"))
    before = gpt(TOKENS)
    merged = merge_adapters(gpt)
    assert merged is gpt
    assert not any(isinstance(each, LoRALinear) for each in gpt.modules())
    assert torch.allclose(gpt(TOKENS), before, atol=1e-5)


@pytest.mark.parametrize("drawn", [False, True])
def test_the_kernel_over_the_adapters_is_that_of_autograd_and_needs_no_argument(gpt, drawn):
    add_adapters(gpt, ["*attn*", "*mlp*"], rank=2)
    gpt.double()
    if drawn:
        for name, each in gpt.named_parameters():
            if name.endswith("lora_B"):
                nn.init.normal_(each)
    adapters = [each for name, each in gpt.named_parameters() if "lora_" in name]
    outputs = gpt(TOKENS).flatten(1)
    rows = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(u, adapters, retain_graph=True)])
            for u in outputs.flatten()
        ]
    )
    full = (rows @ rows.T).view(4, outputs.shape[1], 4, outputs.shape[1])
    expected = full.diagonal(dim1=1, dim2=3).sum(-1)
    found, named = ntk_gram(gpt, TOKENS), ntk_gram(gpt, TOKENS, parameters="*lora_*")
    assert torch.allclose(found.matrix, expected, rtol=1e-10, atol=1e-12 * float(expected.max()))
    assert torch.equal(found.matrix, named.matrix)
    assert found.parameters == tuple(name for name, _ in gpt.named_parameters() if "lora_" in name)
    assert found.general == ()  # also at the start, where the derivative by A is zero


def test_the_gpt_has_the_size_of_gpt_2():
    with torch.device("meta"):
        network = GPT(50_257, 1024, width=768, depth=12, heads=12)
    assert sum(each.numel() for each in network.parameters()) == 124_439_808  # as OpenAI's model "gpt2" on Hugging Face


def test_no_position_sees_those_behind_it(gpt):
    others = TOKENS.clone()
    others[:, 3:] = (others[:, 3:] + 1) % 11
    assert torch.allclose(gpt(TOKENS)[:, :3], gpt(others)[:, :3], atol=1e-6)
    assert not torch.allclose(gpt(TOKENS)[:, 3:], gpt(others)[:, 3:], atol=1e-3)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda gpt: add_adapters(gpt, ["*attention*"]),
            "names: '\\*attention\\*' matches no linear layer; there are h.0",
        ),
        (lambda gpt: add_adapters(gpt, ["*attn*"], rank=9), "rank: got 9; need 1 to 8"),
        (lambda gpt: add_adapters(gpt, ["*"], rank=0), "rank: 0; need a whole number of at least 1"),
        (lambda gpt: [add_adapters(gpt, ["*mlp*"], rank=2) for _ in range(2)], "h.0.mlp.fc has an adapter already"),
        (
            lambda gpt: gpt(torch.zeros(1, 7, dtype=torch.int64)),
            "tokens: 7 positions, and the network has embeddings of 6",
        ),
        (lambda gpt: GPT(5, 4, width=6, heads=4), "width: 6 is no multiple of heads=4; take 8"),
        (lambda gpt: GPT(5, 4, depth=0), "depth: 0; need a whole number of at least 1"),
    ],
)
def test_mistakes_say_what_is_wrong(gpt, make, says):
    with pytest.raises(ValueError, match=says):
        make(gpt)
