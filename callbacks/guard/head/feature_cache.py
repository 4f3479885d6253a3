"""``FeatureCache``: phase 2 on features that were computed once; the trunk is not called where the run would compute known rows again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.data.sample_keys import sample_keys
from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.machine.memory import available_memory, mebibytes
from lightning_conv.networks.inputs import Inputs, take

TRIAL = 3  # batches of phase 2 after which a cache that was never used is given up


class NotCachedError(Exception):
    """Cached features would not be provably the same training; the message says why."""


@dataclass(frozen=True)
class Recorded:
    """One batch of the training set, as the run computes it."""

    rows: Tensor  # what enters the head
    keys: dict[str, list[bytes]]  # of the samples, by the module that they enter
    ends_in_head: dict[str, bool]  # whether the module's result is the head's result, or else what enters it
    shape: tuple[int, ...]  # of the network's result for one sample


class FeatureCache:
    """What enters the head, for every training sample, and modules that look it up instead of computing it.

    Once, in the order of the training set and in the precision of the run, all samples go through the network. Every module whose
    result *is* (the same tensor) what enters the head, or the head's own result, can be replaced by a look-up: called on
    samples that are known it gives ``rows``, or ``head(rows)``. A sample is recognised by a 128-bit BLAKE2b hash of its bytes as they
    enter the module; a batch with a sample that is not known is computed. So the training step, the sampler and the
    loader stay as they are, augmented samples are never confused, and a resumed run fills the same cache.

    The look-up takes the place of the module's ``forward``, until ``release`` puts that back. Torch has no hook that would do: a forward
    pre-hook can change the inputs of a forward and a forward hook its result, but neither can leave it out, and another module
    in its place would have another name in the state dict.

    The features of a sample depend on the batch it is in by rounding only (checked), so the weights are those of the run without a
    cache up to rounding. What the forward of the trunk does beside its result (counters, printing) does not happen.

    Args:
        view: The run, in phase 2: the trunk is frozen, and everything is in eval mode.

    Attributes:
        rows: What enters the head, (n, m_H), in the order of the training set, on the head's device.
        shape: Shape of the network's result for one sample.

    Raises:
        NotCachedError: The module is compiled or has hooks, the inputs or the features are random, samples couple, no module ends in
            the head, or the features take more than a quarter of the free memory, of the CPU or of the head's device.

    Cost: one forward pass; n m_H numbers.
    """

    def __init__(self, view: GuardView) -> None:
        self._view, self._weight, self._replaced = view, view.head.module.weight, ExitStack()
        self._network = view.found.direct
        self._names = {module: name for name, module in view.module.named_modules()}
        self._own: list[
            tuple[nn.Module, Callable[..., Any] | None]
        ] = []  # modules with a look-up, and what it replaced
        self._batches = self._hits = 0
        self._checked, self._checking, self._wrong = False, False, ""
        if reason := next(filter(None, view.ranks.gather(self._obstacle)), None):
            raise NotCachedError(reason)
        recorded = view.data.collect(lambda inputs, _: self._record(inputs))
        places = [name for name in recorded[0].keys if all(name in batch.keys for batch in recorded)]
        if not places:
            raise NotCachedError(f"no module's result is what enters {view.head.name!r} or what it returns")
        self.rows = torch.cat([batch.rows for batch in recorded]).to(self._weight.device)
        self.shape, ends_in_head = recorded[0].shape, recorded[0].ends_in_head
        for name in _outermost(places, ends_in_head):
            keys = [key for batch in recorded for key in batch.keys[name]]
            known = {key: row for row, key in reversed(list(enumerate(keys)))}
            module = view.module.get_submodule(name)
            own = vars(module).get("forward")
            self._replaced.callback(_restore, module, own)
            module.forward = self._look_up(module.forward, known, ends_in_head[name])
            self._own.append((module, own))

    def release(self) -> None:
        """Give the modules their own forward back."""
        self._replaced.close()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Give the modules their own forward back for a while, as a copy of the module needs it."""
        looked_up = [(module, vars(module).get("forward")) for module, _ in self._own]
        try:
            for module, own in self._own:
                _restore(module, own)
            yield
        finally:
            for module, function in looked_up:
                _restore(module, function)

    def give_up(self) -> str | None:
        """Return, after a batch, why the cache is of no use; None if it is."""
        self._batches += 1
        if self._wrong:
            return self._wrong
        if self._batches == TRIAL and not self._hits:
            return (
                f"{TRIAL} batches held a sample that the training set does not give, or the training step does not call the network as "
                "it is called on the training set"
            )
        return None

    def _look_up(self, forward: Callable[..., Any], known: dict[bytes, int], ends_in_head: bool) -> Callable[..., Any]:
        head = self._view.layer

        def cached(*args: Any, **kwargs: Any) -> Any:
            # Whoever evaluates the network as a function brings its own weights, and wants all of it.
            if head.weight is not self._weight or self._checking or not self._view.trainer.training:
                return forward(*args, **kwargs)
            places = [known.get(key, -1) for key in sample_keys((args, kwargs)) or []]
            if not places or min(places) < 0:
                return forward(*args, **kwargs)
            rows = self.rows[torch.tensor(places, device=self.rows.device)]
            result = head(rows) if ends_in_head else rows
            if not self._checked:
                self._checked = self._checking = True  # what is inside this module is not looked up either
                with isolated(), torch.no_grad():
                    computed = forward(*args, **kwargs)
                self._checking = False
                if not _agree(result, computed):
                    self._wrong = "the training step computes other features than the pass over the training set"
                    self.release()
                    return forward(*args, **kwargs)
            self._hits += 1
            return result

        return cached

    def _obstacle(self) -> str | None:
        if getattr(self._view.module, "_compiler_ctx", None) is not None or any(map(_is_compiled, self._names)):
            return "the module is compiled, and nothing can be left out of compiled code"
        if self._view.found.direct is None:
            return "the training step calls its network in parts, or on what it makes of the batch, so that no samples are recognised"
        if self._view.head.rows > 1:
            return f"{self._view.head_name!r} has {self._view.head.rows} rows of features for each sample"
        if any(isinstance(module, torch.jit.ScriptModule) for module in self._names):
            return "a part of the module is scripted, which takes no hooks"
        for module, name in self._names.items():
            if module is not self._view.layer and _has_hooks(module):
                return f"{name or type(module).__name__!r} has hooks, which would not be called"
            if isinstance(module, _BatchNorm) and module.running_mean is None:
                return f"{name!r} couples the samples of a batch"
        if self._view.data.is_random():
            return "inputs or targets are random when they are read"
        try:
            return self._uneven()
        except NotCachedError as error:
            return str(error)

    def _uneven(self) -> str | None:
        """Return why the features of a sample are not the same whenever they are computed, or do not fit into memory."""
        inputs, _ = next(self._view.data.batches())
        rows = self._rows_of(inputs, seed=1)
        if not torch.equal(rows, self._rows_of(inputs, seed=2)):
            return "the features are random (dropout that is not a module?)"
        half = max(1, len(rows) // 2)
        if not _agree(rows[:half], self._rows_of(take(inputs, slice(half)), seed=1)):
            return "the features of a sample depend on the other samples of its batch"
        need = self._view.data.size * rows[0].numel() * rows.element_size()
        return memory_obstacle(need, self._weight.device, self._view.ranks.world)

    def _rows_of(self, inputs: Inputs, seed: int) -> Tensor:
        with isolated():
            torch.manual_seed(seed)
            return self._record(inputs, keyed=False).rows

    def _record(self, inputs: Inputs, keyed: bool = True) -> Recorded:
        """Run one forward as the training step does it, and record what enters and leaves the modules.

        Args:
            inputs: A batch of inputs.
            keyed: Whether the samples get keys.

        Raises:
            NotCachedError: The forward does not call the head exactly once.
        """
        calls: list[tuple[nn.Module, Any, Any]] = []
        head, layer = self._view.head, self._view.layer

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.append((module, (args, kwargs), output))

        named = inputs if isinstance(inputs, Mapping) else {}
        given = () if isinstance(inputs, Mapping) else (inputs,) if isinstance(inputs, Tensor) else inputs
        with ExitStack() as stack:
            for module in self._names:
                stack.enter_context(module.register_forward_hook(note, with_kwargs=True))
            for context in (
                isolated(),
                torch.enable_grad(),
                self._view.trainer.precision_plugin.train_step_context(),
            ):
                stack.enter_context(context)
            assert self._network is not None  # see ``_obstacle``
            made = self._network(*given, **named)
        own = [(given, output) for module, given, output in calls if module is layer]
        if len(own) != 1:
            raise NotCachedError(f"{head.name!r} is called {len(own)} times in a forward")
        (args, kwargs), result = own[0]
        features = args[0] if args else kwargs["input"]
        keys, ends = {}, {}
        for module, entering, output in calls if keyed else []:
            useful = output is result or (output is features and any(True for _ in module.parameters()))
            found = sample_keys(entering) if useful and module is not layer else None
            if found is not None and len(found) == len(features) and sum(module is m for m, _, _ in calls) == 1:
                keys[self._names[module]], ends[self._names[module]] = found, output is result
        shape = tuple(made.shape[1:]) if isinstance(made, Tensor) else ()
        return Recorded(features.detach().cpu(), keys, ends, shape)


def memory_obstacle(need: int, device: torch.device, processes: int) -> str | None:
    """Return why the features do not fit: they are put together on the CPU, by every process, and then lie where the head is.

    Args:
        need: Bytes of all features.
        device: Device of the head.
        processes: Number of processes of the run, which may share the CPU's memory.
    """
    for place, copies in ((torch.device("cpu"), processes), (device, 1)):
        taken, free = need * copies, available_memory(place)
        if taken > free // 4:
            return f"the features take {mebibytes(taken)} ({place}), more than a quarter of the free {mebibytes(free)}"
    return None


def _outermost(names: list[str], ends_in_head: dict[str, bool]) -> list[str]:
    """Return the modules that end in what enters the head and are in no other such module; and all that end in the head."""
    inner = {name: f"{name}." if name else "" for name in names if not ends_in_head[name]}
    return [
        name
        for name in names
        if ends_in_head[name] or not any(name != other and name.startswith(inside) for other, inside in inner.items())
    ]


def _restore(module: nn.Module, own: Callable[..., Any] | None) -> None:
    """Take the look-up away; ``own`` is a forward that the instance had in place of that of its class."""
    if own is None:
        vars(module).pop("forward", None)
    else:
        module.forward = own


def _has_hooks(module: nn.Module) -> bool:
    before, after = module._forward_pre_hooks, module._forward_hooks
    return any((before, after, module._backward_pre_hooks, module._backward_hooks))


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _agree(a: object, b: object) -> bool:
    """Return whether two results are equal up to the rounding of their type."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    size = max(float(b.detach().abs().max()), torch.finfo(b.dtype).tiny) if b.numel() else 1.0
    return not b.numel() or float((a - b).detach().abs().max()) <= torch.finfo(b.dtype).eps ** 0.5 * size
