"""``own_loss``: the network is called on every training sample, and its outputs and its loss are compared with those of W h + b."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_conv.callbacks.guard.certify.checks import Check
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.losses.of_outputs import ULPS, evaluate
from lightning_conv.networks.evaluation import Inputs, StatelessModule
from lightning_conv.networks.head_probe import departure
from lightning_conv.networks.watched import entering, watched_forward


def own_loss(view: GuardView, logged: float | None = None) -> Check:
    r"""Compare, on the whole training set, what the network computes with what the guard says of it.

    In float64, through the network itself: every output must be W h + b up to rounding, as in ``probe_head``. And its loss L must be the
    logged one, up to what rounding explains:

    .. math:: |L_\text{logged} - L_{64}| \le 4 |L_{32} - L_{64}| + 64\, \epsilon\, (|L_{64}| + \sum |s u|)
        + \max_r |L(u + 64\, \epsilon\, |u|_\infty r) - L(u)|,

    where L_32 is the network's loss in its own precision, epsilon that of the head's type, s the gradient of the loss by u, and r are some
    random signs (at an optimum the first order vanishes).

    Args:
        view: The run.
        logged: Loss that the guard says the network has, where it was not measured by calling the network; None: it was.

    Returns:
        The check ``own loss``; all ranks get the same.

    Cost: a pass over the training set in float64, and with ``logged`` one in the network's own precision.
    """
    with attempted(Exception) as attempt:
        said = _departure(view, logged)
        return Check("own loss", not said, said)
    return Check("own loss", None, f"the network could not be called on the training set in float64: {attempt.reason}")


def _departure(view: GuardView, logged: float | None) -> str:
    module, head = StatelessModule(view.network, dtype=torch.float64), view.head.module
    scored = logged is not None and view.loss.loss_fn is not None

    def look(inputs: Inputs, batch: Any) -> tuple[str, Tensor | None, Tensor | None]:
        seen: list[tuple[Tensor, Tensor, list[Tensor]]] = []

        def record(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            weights = [each.detach() for each in (layer.weight, layer.bias) if isinstance(each, Tensor)]
            seen.append((entering(args, kwargs), output.detach().clone(), weights))

        result = watched_forward(module, inputs, [head.register_forward_hook(record, with_kwargs=True)])
        if len(seen) != 1 or not isinstance(result, Tensor):
            return f"the network calls {view.head_name!r} {len(seen)} times on some training samples", None, None
        features, output, weights = seen[0]
        said = departure(output, features, *weights)
        if not said and view.head.last and not torch.equal(result.reshape(output.shape), output):
            said = f"the network's result is not that of {view.head_name!r} on some training samples"
        if not scored:
            return said, None, None
        return said, result.double().cpu(), view.loss.targets_of(batch).cpu()

    found = view.data.collect(look)
    if said := next((said for said, _, _ in found if said), ""):
        return said
    if not scored:
        return ""
    assert logged is not None
    outputs, targets = (torch.cat([row[k] for row in found]) for k in (1, 2))  # type: ignore[misc]
    exact = view.loss.of(outputs, targets)["loss"]
    coarse = view.loss.measure(view.network, cached=False)["loss"]
    point = evaluate(lambda u: view.loss.mean(u, targets), outputs)
    unit = ULPS * torch.finfo(head.weight.dtype).eps
    generator, stride = torch.Generator().manual_seed(0), unit * float(outputs.abs().max())
    signs = [torch.randn(outputs.shape, generator=generator).sign().double() for _ in range(4)]
    nearby = max(abs(view.loss.of(outputs + stride * r, targets)["loss"] - exact) for r in signs)
    allowed = 4 * abs(coarse - exact) + unit * point.size + nearby
    if abs(logged - exact) <= allowed:
        return ""
    return (
        f"the network's own loss on the training set is {exact:.9g}, and that of W h + b was said to be {logged:.9g}; rounding explains "
        f"{allowed:.1g}"
    )
