"""``FrozenTrunk``: the least loss that the last layer of one run can reach, where it alone is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from lightning_conv.callbacks.health.fit_of_run import FitOfRun
from lightning_conv.callbacks.run.features import LastFeatures
from lightning_conv.callbacks.run.guarded import READING, attempted
from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.health.finding import Finding
from lightning_conv.health.findings.of_head import finding_of_head
from lightning_conv.health.fit.head_floor import ITERATIONS, HeadFloor, head_floor
from lightning_conv.last_layer.problem import HeadProblem
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.head import linear_layers
from lightning_conv.networks.inputs import take
from lightning_conv.networks.state import restored
from lightning_conv.networks.undisturbed import undisturbed
from lightning_conv.networks.watched import entering

TIGHT = 0.01
"""Distance of the two ends of the floor, over the power of ten below the present loss."""

SAME = 1e-6
"""Relative change of the features up to which they are the same: what rounding does on an accelerator."""

REACH = 10.0
"""Times the norm of the present weights (plus 1) up to which the floor is to hold at least."""

COMPARED = 16
"""Samples whose features are compared between training and eval mode."""

FLOPS, OVERHEAD = 1e9, 5e-4
"""Operations in float64 in a second, and seconds of an iteration beside them, roughly: by these the solver's time is told."""


class FrozenTrunk:
    """Follows one fit. The features of a frozen trunk stay, so that its floor is looked for once, and again when the loss has fallen.

    Attributes:
        undecided: Why nothing is said though the last layer alone is trained.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.undecided = ""
        self._names: frozenset[str] = frozenset()  # of the weights that are trained
        self._head = ""
        self._problem: HeadProblem | None = None
        self._floor: HeadFloor | None = None
        self._looked: tuple[int, int] | None = None  # see ``_powers``, when it was looked for
        self._features: Tensor | None = None
        self._used: Tensor | None = None  # columns of them that are not all zero

    def looks(self, run: RunView, fit: FitOfRun, augmented: str) -> bool:
        """Return whether the last layer alone is trained, and read its features.

        Args:
            run: The run at this moment.
            fit: What does not change during it.
            augmented: Why the samples are not the same in every step; empty if they are.
        """
        trained = _trained(run)
        if (names := frozenset(trained)) != self._names:
            self._clear()
            self._names = names
            self._head = _only_layer(run, trained)
            if self._head:
                self.undecided = self._read(run, fit, augmented)
        elif self._problem is not None and not self._are_known(run.features):
            self._problem, self.undecided = None, "the features change from one measurement to the next"
        return self._problem is not None

    def _are_known(self, now: LastFeatures | str) -> bool:
        before = self._features
        if before is None or not isinstance(now, LastFeatures) or now.values.shape != before.shape:
            return False
        return bool((now.values - before).norm() <= SAME * before.norm())

    def _read(self, run: RunView, fit: FitOfRun, augmented: str) -> str:
        """Read the features, and return why nothing can be said though the last layer alone is trained."""
        features = run.features
        if not isinstance(
            features, LastFeatures
        ):  # the layer that is trained may still be the last one, before a softmax
            return features if [self._head] == [*linear_layers(run.network)][-1:] else ""
        if features.head != self._head:
            return ""  # it is another layer that is trained
        if why := augmented or _changes(run) or _differs(run, self._head):
            return why
        if fit.losses is None or fit.losses.kind == "custom" or run.targets is None:
            return "the loss is none whose formula is known"
        if features.narrow:
            return f"the features are rounded to a narrower type ({features.narrow})"
        self._features, self._used = features.values, features.values.any(0)
        if not bool(self._used.any()):
            return "the features of all samples are zero"
        bias = run.parameters_of_network.get(f"{self._head}.bias")
        trains_bias = f"{self._head}.bias" in self._names
        with attempted(*READING, MemoryError) as attempt:
            self._problem = HeadProblem(
                features.values[:, self._used],
                run.targets.cpu(),
                run.loss.loss_fn,
                bias=trains_bias,
                fixed_bias=None if bias is None or trains_bias else bias.detach().cpu(),
                outputs=fit.outputs,
                max_memory=run.measurement.probe.max_memory,
            )
        return attempt.reason

    def wants(self, run: RunView) -> bool:
        """Return whether the floor is to be looked for, at first or more exactly.

        Args:
            run: The run at this moment.
        """
        now, before = self._powers(run), self._looked
        return now is not None and (before is None or now[0] < before[0] or now[1] > before[1])

    def _powers(self, run: RunView) -> tuple[int, int] | None:
        """Return the power of ten below the present loss, and the one of the root of ten above ten times the norm of the weights."""
        loss, size = self._mean_loss(run), float(self._weights(run).norm())
        if not (0 < loss < math.inf and math.isfinite(size)):
            return None
        return math.floor(math.log10(loss)), math.ceil(2 * math.log10(REACH * (1 + size)))

    @property
    def expected_seconds(self) -> float:
        """Return the seconds that ``solve`` takes, roughly: passes over the features, and the smaller Gram matrix."""
        problem = self._problem
        if problem is None:
            return 0.0
        n, d = problem.samples, problem.columns
        iterations = 0 if problem.losses.kind == "squared" else 2 * ITERATIONS  # least squares take one factor
        work = 4 * iterations * n * d * problem.outputs_each + 2 * n * d * min(n, d) + 30 * min(n, d) ** 3
        return work / FLOPS + (iterations + 10) * OVERHEAD

    def solve(self, run: RunView) -> None:
        """Look for the floor.

        Args:
            run: The run at this moment.

        Cost: see ``head_floor``.
        """
        powers = self._powers(run)
        assert self._problem is not None
        assert powers is not None
        self._looked = powers
        with attempted(*READING, MemoryError) as attempt:
            self._floor = head_floor(self._problem, tol=TIGHT * 10.0 ** powers[0], radius=10.0 ** (powers[1] / 2))
        self.undecided = attempt.reason if attempt.failed else "" if self._floor else "the least loss is not known"

    def finding(self, run: RunView) -> Finding | None:
        """Return what is said of the frozen trunk; None: nothing.

        Args:
            run: The run at this moment.
        """
        if self._problem is None or self._floor is None:
            return None
        loss = self._mean_loss(run) * (self._problem.samples if self._problem.losses.loss.summed else 1)
        return finding_of_head(self._floor, loss=loss, step=run.step) if math.isfinite(loss) else None

    def _mean_loss(self, run: RunView) -> float:
        """Return the present loss on the features."""
        assert self._problem is not None
        return self._problem.value(self._weights(run)).value

    def _weights(self, run: RunView) -> Tensor:
        """Return W, the weights of now with the bias if it is trained."""
        assert self._problem is not None
        assert self._used is not None
        named = run.parameters_of_network
        weight = named[f"{self._head}.weight"].detach().cpu()[:, self._used]
        bias = named[f"{self._head}.bias"].detach().cpu() if self._problem.bias else None
        return self._problem.stack(weight, bias)


def _changes(run: RunView) -> str:
    """Return why the features are others in every step; empty if they are not."""
    modules = run.measurement.probe.network(run.module).modules()
    moving = [each for each in modules if each.training and isinstance(each, (_BatchNorm, _DropoutNd))]
    random = [each for each in moving if isinstance(each, _BatchNorm) or each.p > 0]
    return f"the features change from step to step ({type(random[0]).__name__} in training mode)" if random else ""


def _differs(run: RunView, head: str) -> str:
    """Return why the features are others in the modes in which the run has its modules, as behind ``F.dropout``; empty if they are not.

    Args:
        run: The run at this moment.
        head: Name of the last linear layer.

    Cost: two forward passes of at most ``COMPARED`` samples.
    """
    network, seen = run.network, list[Tensor]()
    modes = {name: each.training for name, each in run.measurement.probe.network(run.module).named_modules()}
    hook = linear_layers(network)[head].register_forward_hook(
        lambda _, args, kwargs, __: seen.append(entering(args, kwargs)), with_kwargs=True
    )
    try:
        with isolated(), restored(network), undisturbed(network), torch.no_grad(), attempted(*READING) as attempt:
            module = StatelessModule(network)
            inputs = module.convert(take(run.inputs, slice(COMPARED)))
            module.call({}, inputs)
            for name, each in network.named_modules():
                each.training = modes.get(name, False)
            module.call({}, inputs)
    finally:
        hook.remove()
    if attempt.failed or len(seen) != 2:
        return attempt.reason or "the last layer is called several times"
    still, trained = seen
    same = still.shape == trained.shape and bool((trained - still).norm() <= SAME * still.norm())
    return "" if same else "the features are others in training mode than in eval mode"


def _trained(run: RunView) -> dict[str, nn.Parameter]:
    """Return the weights of the measured network that are trained by any optimizer."""
    held = {id(each) for of in run.trainer.optimizers for group in of.param_groups for each in group["params"]}
    return {name: each for name, each in run.parameters_of_network.items() if each.requires_grad and id(each) in held}


def _only_layer(run: RunView, trained: Mapping[str, nn.Parameter]) -> str:
    """Return the name of the one linear layer whose weight is trained, with its bias or without; empty: there is another one."""
    owners = {name.rpartition(".")[0] for name in trained}
    others = run.parameters_of_network.keys() - trained.keys()
    if len(owners) != 1:
        return ""
    (name,) = owners
    with attempted(AttributeError):
        layer = run.measurement.probe.network(run.module).get_submodule(name)
        rest = {each for each in others if each.rpartition(".")[0] != name}
        if isinstance(layer, nn.Linear) and f"{name}.weight" in trained and rest:
            return name
    return ""
