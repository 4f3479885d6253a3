"""``CriteriaTracker``: what one paper measures in a run and how it judges it; ``register_criteria`` adds a paper."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from matplotlib.figure import Figure

from lightning_conv.callbacks.run.assumptions import Assumption
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.linalg.spectrum import Spectrum
from lightning_conv.theory.criterion import Criterion
from lightning_conv.theory.tools.observation import Observation

Need: TypeAlias = Literal["layers", "activity", "step norms"]
"""Quantities that several papers share; they are measured and logged once if any tracker needs them.

``"layers"``: ``RunView.layers``; ``"activity"``: ``RunView.activity``; ``"step norms"``: ``Observation.spectral``.
"""


class CriteriaTracker(ABC):
    """Follows one run for one paper: measures what its theorem is about, judges it, and keeps its state for a checkpoint.

    Subclass it, decorate the class with ``register_criteria``, and ``ConvergenceCriteria`` judges it with the others. A new object is
    used for every run, so ``__init__`` sets up an empty state. All methods but ``criteria`` are optional. Scalars that are returned
    are logged as ``theory/<name>``; those that are not finite are left out.

    Order of calls: ``begin`` and ``measure`` at the first measurement of a fit; ``before_step``, before every optimizer step;
    ``observe``, after the step that follows a measurement; ``measure`` at the next measurement, and so on. ``criteria`` is called
    after each ``measure`` and ``observe``.
    """

    name: ClassVar[str]
    """Short name of the paper in lower case, as in ``which="du"``."""
    aliases: ClassVar[tuple[str, ...]] = ()
    """Former names, which ``which`` accepts as well."""
    source: ClassVar[str]
    """Authors, year and arXiv number."""
    assumes: ClassVar[frozenset[Assumption]]
    """Assumptions of the theorem. In a run that violates one, ``criteria`` are ``not applicable``."""
    needs: ClassVar[frozenset[Need]] = frozenset()
    """Shared quantities that the paper uses."""
    once: ClassVar[frozenset[str]] = frozenset()
    """Names of scalars that stay the same during a run; they are logged once."""
    hypotheses: ClassVar[frozenset[str]] = frozenset()
    """Names of criteria about the data or the start. Where one is refuted, the theorem is not about the run; the run has not failed."""
    position: ClassVar[int] = 100
    """Place in the table of verdicts, ascending."""

    def begin(self, run: RunView) -> None:  # noqa: B027 - optional, as the two below
        """Look at what does not change during a fit (module, data), before its first measurement; also in a resumed run."""

    def measure(self, run: RunView, gram: KernelGram, spectrum: Spectrum) -> dict[str, float]:
        """Measure the run at the present weights and return scalars.

        In a run that is resumed right after a measurement, this is called again with the same weights and must not count twice.

        Args:
            run: the last observation in its history is of these weights.
            gram: the kernel on the probe.
            spectrum: of the kernel.
        """
        return {}

    @property
    def notes_steps(self) -> bool:
        """Return whether ``before_step`` is to be called now; where it would do nothing, False saves its time in every step.

        By default it is called if the tracker has one of its own.
        """
        return type(self).before_step is not CriteriaTracker.before_step

    def before_step(self, run: RunView, rate: float) -> None:  # noqa: B027
        """Note the optimizer step that is about to be made.

        Args:
            run: before the step.
            rate: h of plain descent w <- w - h grad f, before clipping; NaN: the step is something else.
        """

    def observe(self, run: RunView, step: Observation) -> dict[str, float]:
        """Look at what the step after a measurement has done, and return further scalars of that measurement.

        Args:
            run: after the step.
            step: the observation, complete.
        """
        return {}

    @abstractmethod
    def criteria(self, run: RunView) -> list[Criterion]:
        """Return the verdicts on what was measured so far, as far as the assumptions are met."""

    def unconditional(self, run: RunView) -> list[Criterion]:
        """Return verdicts that do not rest on ``assumes``."""
        return []

    def figures(self) -> Mapping[str, Callable[[], Figure]]:
        """Return functions that draw, by the name of the figure ``theory/<name>``."""
        return {}

    def finish(self, run: RunView) -> bool:
        """Return whether the end of the fit has brought anything that must be judged again."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types (numbers, strings, lists, dicts, tensors), for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore what ``state_dict`` returned."""


T = TypeVar("T", bound=CriteriaTracker)

_REGISTRY: dict[str, type[CriteriaTracker]] = {}


def register_criteria(tracker: type[T]) -> type[T]:
    """Register a paper's tracker under its ``name``, as a class decorator.

    Raises:
        TypeError: it is no class derived from ``CriteriaTracker``; a class variable or a method is missing or of the wrong kind; or
            the name is taken by another class.

    Example::

        @register_criteria
        class Own(CriteriaTracker):
            name, source, assumes = "own", "A. Author 2026", frozenset({"descent"})

            def criteria(self, run):
                return [at_most("distance", self.source, "|w_t - w_0| <= 1", run.history[-1].distance, 1.0)]
    """
    _require_complete(tracker)
    for name in (tracker.name, *tracker.aliases):
        other = _named().get(name)
        # A class that is defined again, as in a notebook, takes its own place.
        if other is not None and _path(other) != _path(tracker):
            raise TypeError(f"{_path(tracker)}: the name {name!r} is taken by {_path(other)}")
    _REGISTRY[tracker.name] = tracker
    return tracker


def _require_complete(tracker: object) -> None:
    """Refuse what is no tracker class, or one whose class variables or methods are missing or of the wrong kind.

    Raises:
        TypeError: the message names the class and what is wrong with it.
    """
    if not (isinstance(tracker, type) and issubclass(tracker, CriteriaTracker)):
        raise TypeError(f"{tracker!r} is not a class derived from CriteriaTracker")
    where = _path(tracker)
    if missing := [name for name in ("name", "source", "assumes") if not hasattr(tracker, name)]:
        raise TypeError(f"{where}: the class variable {missing[0]!r} is missing; see CriteriaTracker")
    if abstract := sorted(getattr(tracker, "__abstractmethods__", ())):
        raise TypeError(f"{where}: the method {abstract[0]!r} is missing; see CriteriaTracker")
    if not isinstance(tracker.name, str) or tracker.name in ("", "auto"):
        raise TypeError(f"{where}: name is {tracker.name!r}; need the paper's short name, a string other than 'auto'")
    if not isinstance(tracker.aliases, tuple | list):
        raise TypeError(f"{where}: aliases is {tracker.aliases!r}; need a tuple of former names")
    for variable, allowed in (("assumes", get_args(Assumption)), ("needs", get_args(Need))):
        given = getattr(tracker, variable)
        if not isinstance(given, frozenset | set):
            raise TypeError(f"{where}: {variable} is {given!r}; need a frozenset of some of {', '.join(allowed)}")
        if unknown := sorted(map(str, given - set(allowed))):
            raise TypeError(f"{where}: {variable} has {unknown[0]!r}, which is not one of {', '.join(allowed)}")


def registered_criteria() -> dict[str, type[CriteriaTracker]]:
    """Return all registered trackers by name, in the order of the table of verdicts."""
    return dict(sorted(_REGISTRY.items(), key=lambda item: item[1].position))


Which: TypeAlias = "str | CriteriaTracker | type[CriteriaTracker]"


def make_trackers(which: Which | Sequence[Which], options: Mapping[str, Any]) -> list[CriteriaTracker]:
    """Make the trackers of the chosen papers.

    Args:
        which: names, classes or objects, one or several; ``"auto"``: all that are registered.
        options: arguments by name; each class gets those that its ``__init__`` has.

    Raises:
        MisconfigurationException: something that is neither a known name nor a tracker, none at all, or two objects of one name.
        TypeError: a class lacks a class variable or a method.
    """
    chosen = [which] if isinstance(which, str) or not isinstance(which, Sequence) else list(which)
    known, named = registered_criteria(), _named()
    unknown = [
        each for each in chosen if not (each == "auto" or each in named if isinstance(each, str) else _is_tracker(each))
    ]
    if unknown or not chosen:
        raise MisconfigurationException(
            f"which: {unknown or which!r} is not known; choose from {', '.join(known)}, or 'auto' for all of them"
        )
    expanded = [each for name in chosen for each in (known.values() if name == "auto" else [name])]
    made: dict[str, CriteriaTracker] = {}
    for each in expanded:
        tracker = named[each] if isinstance(each, str) else each
        if isinstance(tracker, type):
            accepted = inspect.signature(tracker).parameters
            made.setdefault(tracker.name, tracker(**{k: v for k, v in options.items() if k in accepted}))
        elif tracker.name in made and not isinstance(each, str) and made[tracker.name] in expanded:
            raise MisconfigurationException(
                f"which: two trackers of the name {tracker.name!r}; give each a name of its own"
            )
        else:
            made[tracker.name] = tracker
    return list(made.values())


def _is_tracker(candidate: object) -> bool:
    """Return whether this is a tracker or a tracker class, after a check of its class.

    Raises:
        TypeError: see ``_require_complete``.
    """
    kind = candidate if isinstance(candidate, type) else type(candidate)
    if not issubclass(kind, CriteriaTracker):
        return False
    _require_complete(kind)
    return True


def _named() -> dict[str, type[CriteriaTracker]]:
    """Return the registered trackers by name and by former name."""
    return {name: tracker for tracker in _REGISTRY.values() for name in (tracker.name, *tracker.aliases)}


def _path(tracker: type) -> str:
    return f"{tracker.__module__}.{tracker.__qualname__}"
