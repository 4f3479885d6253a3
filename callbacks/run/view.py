"""``RunView``: all that is known of a run at one moment, as the criteria and monitors see it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_conv.callbacks.run.assumptions import Assumption, Violation, violated
from lightning_conv.callbacks.run.data.batch import to_device
from lightning_conv.callbacks.run.data.sampling import Sampling, describe_sampling
from lightning_conv.callbacks.run.features import LastFeatures
from lightning_conv.callbacks.run.layer_norms import LayerNorms
from lightning_conv.callbacks.run.losses.loss_modules import LossFn
from lightning_conv.callbacks.run.losses.run_loss import RunLoss
from lightning_conv.callbacks.run.measurement import Measurement
from lightning_conv.callbacks.run.moment import Seen
from lightning_conv.callbacks.run.steps import Steps, describe_steps
from lightning_conv.losses.gradient import SampleLoss
from lightning_conv.losses.kind import LossKind
from lightning_conv.losses.scale import LossScale
from lightning_conv.networks.batch_norm import has_batch_norm
from lightning_conv.networks.evaluation import BatchNormMode
from lightning_conv.networks.inputs import Inputs, sample_count
from lightning_conv.theory.tools.hidden_states import activity
from lightning_conv.theory.tools.observation import Observation


@dataclass(frozen=True)
class RunView:
    """The run at one moment: before an optimizer step or after it, with the weights of that moment.

    What takes computing is a cached property: it is computed when it is first read, and once however many criteria read it. A view
    must therefore not outlive its moment.
    """

    trainer: pl.Trainer
    measurement: Measurement
    given_loss: LossFn | None = None  # loss_fn= of the callback; None: the one that was observed in the training step
    start: Mapping[str, Tensor] = field(default_factory=dict)  # w_0 by name; empty: not known yet
    history: Sequence[Observation] = ()  # what was observed so far, in order
    look_for_violations: Callable[[RunView], Sequence[Violation]] = lambda _: ()
    infimum: float = 0.0  # of the loss on the probe; 0 where it is not known
    largest_rate: float = math.nan  # of all steps of plain descent so far, on the run's loss; NaN: there was none
    layer_norms: LayerNorms = field(default_factory=LayerNorms)

    @property
    def module(self) -> pl.LightningModule:
        """The LightningModule."""
        return self.trainer.lightning_module

    @property
    def step(self) -> int:
        """Number of optimizer steps done."""
        return self.trainer.global_step

    @cached_property
    def network(self) -> nn.Module:
        """The network whose kernel and loss are meant, over a copy of the weights of this moment."""
        return self.measurement.network()

    @cached_property
    def inputs(self) -> Inputs:
        """The inputs of the probe, on the module's device."""
        return to_device(self.measurement.inputs, self.module.device)

    @property
    def targets(self) -> Tensor | None:
        """The targets of the probe; None: not known."""
        return self.measurement.targets

    @property
    def samples(self) -> int:
        """Number n of samples in the probe."""
        return sample_count(self.measurement.inputs)

    @property
    def loss_targets(self) -> Tensor | None:
        """What the loss takes beside the outputs: the targets, or the numbers of the samples for the step's own; None: not known."""
        return self.targets if self.run_loss.own is None else self.measurement.rows

    @property
    def step_batch_norm(self) -> BatchNormMode:
        """How a training step takes BatchNorm: it differentiates through the statistics of its batch, unless the probe has running ones.

        Held constant, the statistics leave directions that BatchNorm removes.
        """
        return "batch" if self.measurement.probe.batch_norm == "frozen" and has_batch_norm(self.network) else "eval"

    @cached_property
    def outputs(self) -> Tensor:
        """The outputs u on the probe, (n, C), in the network's type and the probe's BatchNorm mode."""
        return self.measurement.moment().outputs

    @cached_property
    def shaped_outputs(self) -> Tensor:
        """The same in the shape that the network gives, (n, ...), as losses take it."""
        return self.measurement.moment().shaped_outputs

    def seen_by(self, look: Callable[..., Seen]) -> Seen:
        """Return what a function of network and samples sees at the weights of now (``Moment.seen_by``).

        Args:
            look: The function.
        """
        return self.measurement.moment().seen_by(look)

    @cached_property
    def exact_outputs(self) -> Tensor:
        """The outputs in float64; for the forward pass a float64 copy of the weights is made."""
        return self.sample_loss(dtype=torch.float64).outputs()

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the run that the kernel is over, by their names in the network."""
        named = self.parameters_of_network
        return {name: named[name] for name in self.measurement.parameters}

    @property
    def parameters_of_network(self) -> dict[str, nn.Parameter]:
        """All parameters of the run's network, by their names in it."""
        return dict(self.measurement.probe.network(self.module).named_parameters())

    @cached_property
    def run_loss(self) -> RunLoss:
        """The loss of the training step, and how it was found."""
        return self.measurement.loss(self.given_loss)

    @property
    def loss(self) -> LossKind:
        """The facts about it."""
        return self.run_loss.kind

    @property
    def loss_unknown(self) -> str:
        """Why the loss is not known; empty if it is."""
        return self.run_loss.reason

    @property
    def scale(self) -> LossScale | None:
        """The scale k of a squared loss k S on the probe; None: another loss, or no targets."""
        outputs = self.measurement.n_outputs
        if outputs is None or self.targets is None:
            return None
        return self.loss.scale(self.samples, outputs)

    def sample_loss(self, *, dtype: torch.dtype | None = None, as_trained: bool = False) -> SampleLoss:
        """Return the loss on the probe as a function of the weights.

        Args:
            dtype: to compute in; None: the network's own type.
            as_trained: whether the statistics of BatchNorm follow the weights, as in a training step on the probe (``step_batch_norm``);
                otherwise the probe's own are those of the weights of now.
        """
        assert self.loss.loss_fn is not None
        assert self.loss_targets is not None
        targets, loss_fn = self.loss_targets, self.loss.loss_fn
        batch_norm = self.step_batch_norm if as_trained else self.measurement.probe.batch_norm
        if dtype is None and batch_norm == self.measurement.probe.batch_norm:
            return self.measurement.moment().sample_loss(targets, loss_fn)
        loss = partial(SampleLoss, self.network, self.inputs, targets, loss_fn, batch_norm=batch_norm, dtype=dtype)
        return loss(chunk=self.samples) if batch_norm == "batch" else loss()

    def loss_now(self) -> float:
        """Return the loss on the probe; without a forward, where the outputs are known."""
        return self.sample_loss().of_outputs(self.shaped_outputs)

    @cached_property
    def steps(self) -> Steps:
        """What the next step does by the run's settings; clipping by ``RegularizedGradientClipping`` is allowed for."""
        return describe_steps(self.trainer, self.measurement.trained(self.module), clipped=True, compared=True)

    @property
    def unclipped_steps(self) -> Steps:
        """The same for a step that nothing clips."""
        return describe_steps(self.trainer, self.measurement.trained(self.module))

    @cached_property
    def sampling(self) -> Sampling:
        """How the run draws its training samples."""
        return describe_sampling(self.trainer)

    @property
    def step_samples(self) -> int | None:
        """Number of samples in an optimizer step, of all processes together; None: not known."""
        try:
            sampling = self.sampling
        except MisconfigurationException:
            return None
        if sampling.largest_batch is None or sampling.accumulated is None:
            return None
        return sampling.largest_batch * sampling.accumulated * sampling.world

    @property
    def processes_averaged(self) -> int:
        """Number of processes that the gradient is averaged over where f is the sum over all of them; otherwise 1."""
        processes = self.trainer.world_size
        return processes if processes > 1 and self.loss.summed else 1

    @cached_property
    def violations(self) -> Sequence[Violation]:
        """The assumptions that the run violates."""
        return self.look_for_violations(self)

    def violated(self, assumed: Sequence[Assumption] | frozenset[Assumption]) -> str:
        """Return why a theorem with these assumptions does not apply to the run; empty if it does."""
        return violated(self.violations, assumed)

    @property
    def whole_set(self) -> bool:
        """Whether the probe holds the whole training set."""
        return not self.violated(["whole set"])

    @property
    def from_the_start(self) -> bool:
        """Whether the run was observed from its first step on."""
        return bool(self.history) and self.history[0].step == 0

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The weights of now that ``start`` has, on a device with float64."""
        named = self.parameters
        found = {name: named[name].detach() for name in self.start or named}
        # Apple's GPUs do not have float64.
        return {name: value.cpu() if value.device.type == "mps" else value for name, value in found.items()}

    @cached_property
    def start_weights(self) -> dict[str, Tensor]:
        """The weights of the start, where ``weights`` are; those of now before the first observation."""
        start = self.start or self.weights
        return {name: value.to(self.weights[name]) for name, value in start.items()}

    @cached_property
    def features(self) -> LastFeatures | str:
        """The last hidden features on the probe; a string says why there are none."""
        return self.measurement.moment().features

    @cached_property
    def layers(self) -> dict[str, float]:
        """Distances of the layers from their start, and their stable ranks, as scalars."""
        return self.layer_norms.measure(self.weights, self.start_weights)

    @cached_property
    def activity(self) -> dict[str, float]:
        """Active units, units that have switched since the start, and movement of the hidden states, as scalars."""
        batch_norm = self.measurement.probe.batch_norm
        found = activity(self.network, self.inputs, self.start_weights, batch_norm=batch_norm)
        return {} if found is None else found.quantities()
