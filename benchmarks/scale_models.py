"""Plans of large networks from the sizes of their layers alone: ResNet-50, and two language models with the layers of Llama 3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lightning_conv import NTKPlan, plan_ntk
from lightning_conv.kernels.planning.costs import Problem
from lightning_conv.kernels.planning.plan import make_plan
from lightning_conv.kernels.planning.prediction import Prediction, predict
from lightning_conv.kernels.reading.anatomy import Anatomy
from lightning_conv.kernels.reading.sites import Site
from lightning_conv.machine.devices import GPUS

WIDTH = 4
"""Bytes of a number in float32."""


@dataclass(frozen=True)
class Llama:
    """Sizes of a language model, from the table of Llama 3 (arXiv:2407.21783, table 3)."""

    layers: int
    width: int
    keys: int  # numbers of all keys of a token: 8 heads of 128
    hidden: int  # of the feed-forward network
    words: int = 128_256

    def linears(self) -> list[tuple[str, int, int]]:
        """Return the linear layers of a block: name, inputs and outputs."""
        d, k, h = self.width, self.keys, self.hidden
        return [("q", d, d), ("k", d, k), ("v", d, k), ("o", d, d), ("gate", d, h), ("up", d, h), ("down", h, d)]

    @property
    def parameters(self) -> int:
        """Number of parameters, with a table and a head of their own."""
        block = sum(inputs * outputs for _, inputs, outputs in self.linears()) + 2 * self.width
        return self.layers * block + 2 * self.words * self.width + self.width

    def block_flops(self, tokens: int) -> float:
        """Return the flops of a forward pass of a block; attention itself is not counted."""
        return 2.0 * tokens * sum(inputs * outputs for _, inputs, outputs in self.linears())

    def activations(self, tokens: int, blocks: int) -> int:
        """Return the bytes of a sample in a forward pass with a graph of the last blocks.

        In each block: the input, queries, keys, values, the output of attention, both sums, the input of the feed-forward network, and
        three times its hidden layer; attention itself is assumed to keep nothing more. At the end the logits and the head's input.
        """
        block = 6 * self.width + 2 * self.keys + 3 * self.hidden
        return WIDTH * tokens * (blocks * block + self.width + self.words)


LLAMAS = {"8B": Llama(32, 4096, 1024, 14_336), "70B": Llama(80, 8192, 1024, 28_672)}


def linear_site(name: str, inputs: int, outputs: int, tokens: int) -> Site:
    """Return a linear layer without a bias as the plan sees it, below which gradients are passed on."""
    return Site(
        layer=name,
        weight=f"{name}.weight",
        bias=None,
        uses=(),
        sizes={f"{name}.weight": inputs * outputs},
        kind="linear",
        positions=tokens,
        inputs=inputs,
        gradients=outputs,
        input_numel=tokens * inputs,
    )


def llama_plan(of: Llama, samples: int, tokens: int, memory: float, *, last_block: bool) -> NTKPlan:
    """Return the plan of the kernel of the loss gradients, over all linear layers or those of the last block.

    Args:
        of: Sizes of the model.
        samples: Number of sequences.
        tokens: Tokens of each.
        memory: Bytes that the kernel may use.
        last_block: Whether the kernel is over the linear layers of the last block.
    """
    blocks = range(of.layers - 1 if last_block else 0, of.layers)
    sites = [linear_site(f"{block}.{name}", i, o, tokens) for block in blocks for name, i, o in of.linears()]
    if not last_block:
        sites.append(linear_site("head", of.width, of.words, tokens))
    names = tuple(name for site in sites for name in site.names)
    anatomy = Anatomy(
        parameters=names,
        sites=tuple(sites),
        general={},
        unused=(),
        outputs=tokens * of.words,
        level=1.0,
        tracked=names,
        signature=tuple((name,) for name in names),
        gradient_numel=sum(site.positions * site.gradients for site in sites),
        forward_bytes=of.activations(tokens, len(blocks)),
        reading_bytes=0,
        general_sizes={},
        jacobian_error=0.0,
        narrowing=None,
        coarse=None,
        channels_last=False,
    )
    return make_plan(
        anatomy,
        Problem(samples=samples, others=None, outputs=1, trace=True, width=WIDTH),
        precision="fast",
        matrices=1,
        repeats=1,
        max_memory=memory,
        device=torch.device("cpu"),  # whose rate predicts seconds that are not used
    )


def resnet_plan(samples: int, memory: float, *, projections: int) -> NTKPlan:
    """Return the plan of the trace kernel of ResNet-50 by projections, on images of 224 x 224; the network is read on three of them."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    model = resnet50().eval()
    images = torch.zeros(1, 3, 224, 224).expand(samples, -1, -1, -1) + torch.rand(samples, 1, 1, 1)
    return plan_ntk(model, images, outputs="projected", projections=projections, precision="fast", max_memory=memory)


TOKENS, SEQUENCES, IMAGES, PROJECTIONS = 256, 64, 256, 16
LEFT = 0.9
"""Share of the device's memory, beside the parameters, that a kernel may use."""


def predictions(device: str = "h100") -> Iterator[tuple[str, int, Prediction | str]]:
    """Yield each measurement in words, the number of ranks, and what it takes, or why its plan is refused.

    Args:
        device: Name of the device.
    """
    on = GPUS[device]
    plan = resnet_plan(IMAGES, LEFT * on.memory, projections=PROJECTIONS)
    words = f"ResNet-50, trace kernel by {PROJECTIONS} projections, {IMAGES} images"
    for ranks in (1, 8):
        yield words, ranks, predict(plan, on, ranks)
    for name, ranks, sharded in (("8B", 64, False), ("70B", 1024, True)):
        of = LLAMAS[name]
        room = LEFT * (on.memory - WIDTH * of.parameters / (ranks if sharded else 1))
        for last in (False, True):
            over = "the last block" if last else "all linear layers"
            words = f"Llama {name}{', sharded' if sharded else ''}, loss kernel over {over}, {SEQUENCES} sequences of {TOKENS} tokens"
            frozen = (of.layers - 1) * of.block_flops(TOKENS) + 2 * TOKENS * of.width * of.words if last else 0.0
            try:
                plan = llama_plan(of, SEQUENCES, TOKENS, room, last_block=last)
            except MemoryError as error:
                yield words, ranks, str(error)
                continue
            others = of.parameters - sum(site.numel for site in plan.reading.sites)
            yield words, ranks, predict(plan, on, ranks, sharded=sharded, frozen=frozen, others=others)
