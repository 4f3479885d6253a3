"""BackPACK and Opacus: per-sample gradients of one output at a time, then products of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peers.torch_networks import blocked_gram, load


def prepare(
    case: Mapping[str, Any], arrays: Mapping[str, np.ndarray], dtype: str, *, peer: str
) -> Callable[[], Tensor]:
    """Return the computation that is timed."""
    model, inputs = load(case, arrays, dtype)
    rows = {"backpack": backpack_rows, "opacus": opacus_rows}[peer](model)
    classes = case["classes"]

    def jacobian(tile: slice, output: int | None) -> list[Tensor]:
        chosen = range(classes) if output is None else [output]
        by_output = list(rows(inputs[tile], chosen))
        return [torch.stack(leaves, 1) for leaves in zip(*by_output, strict=True)]

    def gram() -> Tensor:
        return blocked_gram(
            jacobian,
            samples=len(inputs),
            classes=classes,
            parameters=sum(p.numel() for p in model.parameters()),
            outputs=case["outputs"],
            itemsize=inputs.element_size(),
            loop=True,
        )

    return gram


def backpack_rows(model: nn.Module) -> Callable[..., Any]:
    """Return a function (inputs, outputs) -> for each output one (t, p) tensor per parameter, by BackPACK's BatchGrad."""
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    extend(model)

    def rows(inputs: Tensor, outputs: range | list[int]) -> Any:
        result = model(inputs)
        for k in outputs:
            model.zero_grad()
            with backpack(BatchGrad(), retain_graph=True):
                result[:, k].sum().backward(retain_graph=True)
            without = [name for name, p in model.named_parameters() if not hasattr(p, "grad_batch")]
            if without:
                raise NotImplementedError(f"BatchGrad leaves no per-sample gradients for {', '.join(without)}")
            yield [p.grad_batch.flatten(1) for p in model.parameters()]
            for p in model.parameters():
                del p.grad_batch

    return rows


def opacus_rows(model: nn.Module) -> Callable[..., Any]:
    """Return the same function by Opacus' GradSampleModule."""
    from opacus import GradSampleModule
    from opacus.layers import DPLSTM

    for name, child in model.named_children():
        if isinstance(child, nn.LSTM):
            replacement = DPLSTM(child.input_size, child.hidden_size, batch_first=child.batch_first)
            replacement.load_state_dict(child.state_dict())
            setattr(model, name, replacement)
    # Strict mode refuses every buffer, but running statistics that are only read do not couple samples.
    sampler = GradSampleModule(model, loss_reduction="sum", strict=False)
    sampler.train()  # its hooks are inactive in eval mode
    parameters = list(sampler.parameters())

    def rows(inputs: Tensor, outputs: range | list[int]) -> Any:
        for k in outputs:
            sampler.zero_grad(set_to_none=True)
            sampler(inputs)[:, k].sum().backward()
            yield [p.grad_sample.flatten(1) for p in parameters]
        sampler.zero_grad(set_to_none=True)

    return rows
