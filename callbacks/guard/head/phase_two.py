"""Phase 2 of a guarded run: the trunk held still, its features cached, the head moved by its rule, the loss measured."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_conv.callbacks.guard.certify.caveats import optimizer_caveats
from lightning_conv.callbacks.guard.certify.verdict import SEPARATED, HeadBounds, loss_kind
from lightning_conv.callbacks.guard.head.compared_loss import ComparedLoss
from lightning_conv.callbacks.guard.head.curvature import beyond, known_curvature
from lightning_conv.callbacks.guard.head.feature_cache import FeatureCache
from lightning_conv.callbacks.guard.head.head_steps import (
    CertifiedSteps,
    HeadSteps,
    HeadWeights,
    OptimizerSteps,
    head_problem,
)
from lightning_conv.callbacks.guard.head.known_outputs import KnownOutputs
from lightning_conv.callbacks.guard.head.plain_steps import head_rate, watched_steps
from lightning_conv.callbacks.guard.head.solved_head import SolvedHead, is_solved, memory_of, solve_and_write, solved
from lightning_conv.callbacks.guard.head.training_loss import TrainingLoss
from lightning_conv.callbacks.guard.head.trunk import FrozenTrunk
from lightning_conv.callbacks.guard.settings import GuardSettings, StepRule
from lightning_conv.callbacks.guard.state import GuardState
from lightning_conv.callbacks.run.logging import log_text, publish
from lightning_conv.callbacks.run.training_set import TrainingSet
from lightning_conv.last_layer import HeadProblem, HeadSolution
from lightning_conv.networks.head import Head


class PhaseTwo:
    """What the hooks do in phase 2.

    Args:
        trainer: of the run.
        pl_module: of the run.
        network: that takes the inputs.
        head: of the network.
        data: the training set.
        loss: on it.
        settings: of the guard.
        state: its memory.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        network: nn.Module,
        head: Head,
        data: TrainingSet,
        loss: TrainingLoss,
        settings: GuardSettings,
        state: GuardState,
    ) -> None:
        self._trainer, self._module, self._network, self._head = trainer, pl_module, network, head
        self._data, self._loss, self._settings, self._state = data, loss, settings, state
        self.trunk = FrozenTrunk(pl_module, head, data.ranks)
        self._cache: FeatureCache | None = None
        self._steps: HeadSteps = OptimizerSteps(network, loss, data)
        self._compared = ComparedLoss(trainer, network, head, data, loss, settings.input_fn)

    @property
    def rule(self) -> StepRule:
        """What moves the head: what was asked for, or the run's optimizer where that went wrong."""
        memory, asked = self._state.steps, self._settings.step_rule
        return "base" if memory.get("rule") == "base" and memory.get("asked") == asked else asked

    def begin(self) -> None:
        """Freeze, and set up the rule of the head; at the switch, and when a run resumes in phase 2."""
        self.trunk.freeze()
        self._forget_other_rules()
        if self.rule != "base":
            try:
                self._set_up_rule()
            except Exception as error:  # the run goes on by its own optimizer
                self.limit(f"step_rule={self.rule!r} could not be set up ({type(error).__name__}: {error})")
                self._fall_back()
        if self._settings.cache_features and not isinstance(self._steps, SolvedHead):
            try:
                self._cache = FeatureCache(self._trainer, self._module, self._network, self._head, self._data)
                self._know_outputs(self._cache)
            except Exception as error:  # without it the run is the same, only slower
                self._drop_cache(str(error))
        # After the cache, which was asked for: the features in float64 take what it leaves.
        if self._settings.step_rule == "base":
            self._watch_plain_steps()

    def _forget_other_rules(self) -> None:
        """What a rule remembers is about the steps since its own start: another one in between makes it untrue."""
        state, asked = self._state, self._settings.step_rule
        if not state.steps or (state.steps["rule"] == self.rule and state.steps.get("asked", self.rule) == asked):
            return
        if state.steps.get("asked", state.steps["rule"]) != asked:
            state.reason = f"{state.reason}; resumed with step_rule={asked!r}"
        state.steps = {}

    def _know_outputs(self, cache: FeatureCache) -> None:
        """Let the loss on the training set be measured without the trunk, too."""
        if not self._head.last:  # what follows the head is only known by running the network
            return
        try:
            self._loss.known_outputs = KnownOutputs(self._trainer, self._network, self._head, self._data, cache)
        except MemoryError as error:
            rank_zero_warn(
                f"ExpressivityGuard: cache_features: the loss on the training set is measured without: {error}"
            )

    def _set_up_rule(self) -> None:
        problem = head_problem(self._network, self._head, self._data, self._loss)
        weights, memory, state = HeadWeights(self._head), self._state.steps, self._state
        if self.rule == "certified":
            self._steps = CertifiedSteps(self._trainer, problem, weights, self._data, memory, state.certificate)
            return
        if not memory:
            tol = self._settings.tol
            solution = solve_and_write(problem, weights, self._data.ranks, tol)
            if not is_solved(solution, tol):
                self._judge_by(problem, solution)
                said = f"the last layer could not be solved by {solution.method}: {solution.reason}; the run goes on by its own optimizer"
                state.reason = f"{state.reason}; {said}"
                rank_zero_warn(f"ExpressivityGuard: step_rule='solve': {said}")
                self._fall_back()
                return
            memory |= memory_of(solution)
            state.reason = f"{state.reason}; {memory['reason']}"
            self._judge_by(problem, solution)
        self._steps = SolvedHead(problem, weights, memory)
        self._trainer.should_stop = True

    def _watch_plain_steps(self) -> None:
        """The run's own steps have a proven bound, too, where they are plain gradient descent."""
        state = self._state
        found = watched_steps(self._trainer, self._network, self._head, self._data, self._loss, state)
        if isinstance(found, str):
            state.steps = {"rule": "base", "asked": "base", "no_bound": found}
        else:
            self._steps = found

    def note_curvature(self) -> None:
        """L_H, and whether a rate of plain SGD is beyond 2 / L_H."""
        state = self._state
        try:
            state.curvature = self._data.ranks.broadcast(
                known_curvature(state.steps, state.certificate, self._head, self._loss, self._data)
            )
        except Exception as error:  # a figure for the log
            rank_zero_warn(f"ExpressivityGuard: no curvature of the head's loss: {error}")
            return
        if self.rule == "base" and state.curvature is not None:
            said = beyond(head_rate(self._trainer.optimizers[0], self._head), state.curvature)
            if said:
                state.reason = f"{state.reason}; {said}"
                rank_zero_warn(f"ExpressivityGuard: {said}")

    def _fall_back(self) -> None:
        """Go on by the run's own optimizer: nothing is proven of its steps, and what it minimises counts."""
        self._state.steps = {"rule": "base", "asked": self._settings.step_rule}
        self._steps = OptimizerSteps(self._network, self._loss, self._data)
        if "guard/bound" in self._trainer.callback_metrics:
            publish(self._trainer, {"guard/bound": math.inf})
        for caveat in optimizer_caveats(self._trainer, self._head):
            self.limit(caveat)

    def note_best_loss(self) -> None:
        """Of a head that does not reach the targets: what its own problem can come down to, on this trunk."""
        if self._settings.step_rule == "solve" or self._loss.loss_fn is None or not self._head.last:
            return
        try:
            problem = head_problem(self._network, self._head, self._data, self._loss)
            found = self._data.ranks.gather(lambda: solved(problem, HeadWeights(self._head), self._settings.tol))[0]
        except Exception as error:  # a figure for the log
            self._state.reason += f"; the best loss of this trunk is not known ({type(error).__name__}: {error})"
            return
        state, dual = self._state, found.head_infimum
        state.best_loss = found.loss.value
        known = "" if dual is None or math.isinf(dual.lower) else f"{dual.lower:.6g}"
        if dual is not None and known and math.isfinite(dual.radius):  # a statement about these heads only
            known += f" (heads with |W|_F <= {dual.radius:.3g})"
        least = f"at least {known} and " if known else ""
        state.reason += f"; the best loss of this trunk is {least}at most {found.loss.upper:.6g}"
        self._judge_by(problem, found)

    def _judge_by(self, problem: HeadProblem, solution: HeadSolution) -> None:
        """Take in what the solved problem of the head proves."""
        state = self._state
        state.loss_kind = loss_kind(self._loss.loss_fn, problem.losses.targets)
        state.bounds = HeadBounds.of(problem, solution, state.loss_kind)
        before = state.verdict, state.why
        state.judge()
        if state.verdict == "certified" and before[0] != "certified":
            state.reason += f"; {SEPARATED}"
        elif state.why and state.why != before[1]:
            state.reason += f"; {state.why}"

    def before_batch(self, batch: Any) -> None:
        """Nothing is in train mode; before the first batch of an epoch its loss is computed by ``loss_fn``."""
        self.trunk.keep_still()
        self._compared.before(batch)

    def before_step(self, optimizer: Optimizer) -> None:
        """The gradients are there."""
        self._steps.before_step(optimizer)

    def after_batch(self, loss: torch.Tensor | None) -> None:
        """Check what was done.

        Args:
            loss: of the training step.
        """
        stepped = self._steps.after_step()
        if self._cache is not None and (why := self._cache.give_up()) is not None:
            self._drop_cache(why)
        if (said := self._compared.after(loss)) is not None:
            self.limit(said)
            if self.rule != "base":
                self._give_up_rule()
        elif stepped is not None:  # another loss has another gradient, which need not be said, too
            self.limit(stepped)

    def _give_up_rule(self) -> None:
        """The rule was made for another loss than that of the training step: take the step back, and go on without."""
        self._compared.take_back()
        said = f"step_rule={self.rule!r} is for that loss, so the optimizer of the run goes on, and no bound holds"
        self._state.reason = f"{self._state.reason}; {said}"
        rank_zero_warn(f"ExpressivityGuard: {said}")
        self._fall_back()

    def limit(self, caveat: str) -> None:
        """Take in a caveat that shows in the run."""
        state = self._state
        if caveat in state.caveats:
            return
        state.caveats.append(caveat)
        self._steps.give_up(caveat)
        state.judge()
        state.reason = f"{state.reason}; {caveat}"
        rank_zero_warn(f"ExpressivityGuard: the guarantee is limited: {caveat}")
        log_text(self._trainer, "guard/reason", state.reason, self._trainer.global_step)

    def measure(self) -> None:
        """Add loss, gap and bound to the history; the next batch is one whose loss is compared."""
        self._compared.again()
        step = self._trainer.global_step
        try:
            measured = self._steps.measure()
        except Exception as error:  # a figure for the log must not end a training run
            rank_zero_warn(f"ExpressivityGuard: no training loss at step {step}: {error}")
            return
        if "bound" not in measured and "guard/bound" in self._trainer.callback_metrics:
            publish(self._trainer, {"guard/bound": math.inf})
        if measured := self._data.ranks.broadcast(measured):
            place = {"step": float(step), "epoch": float(self._trainer.current_epoch)}
            self._state.history.append(place | measured)

    def warn_if_moved(self) -> None:
        """Compare the trunk with what it was at the switch."""
        state = self._state
        if moved := self.trunk.moved_since(state.fingerprints):
            state.verdict = "undecided"
            state.reason = f"the trunk moved during phase 2 ({', '.join(moved)}), so the guarantee is void"
            if state.steps:
                state.steps.setdefault("given_up", state.reason)
            rank_zero_warn(f"ExpressivityGuard: {state.reason}")
            log_text(self._trainer, "guard/reason", state.reason, self._trainer.global_step)

    def _drop_cache(self, why: str) -> None:
        if self._cache is not None:
            self._cache.release()
        self._cache = self._loss.known_outputs = None
        rank_zero_warn(f"ExpressivityGuard: cache_features: phase 2 goes on without cached features: {why}")

    def release(self) -> None:
        """Hand the module back as it was."""
        if self._cache is not None:
            self._cache.release()
        self._cache = self._loss.known_outputs = None
        self._compared.release()
        self.trunk.release()
