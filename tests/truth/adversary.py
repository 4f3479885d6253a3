"""The frame of the adversary: a case is a few plain choices, hypothesis draws and shrinks them, a check compares with the truth.

``python tests/truth/again.py "Case(...)"`` runs the case that a failure prints.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st


@dataclass(frozen=True)
class Case:
    """One case. The first choice of every field is the simplest; a kind draws those fields that mean something to it."""

    kind: str
    variant: str
    rule: str = "base"
    method: str = "auto"
    loss: str = "cross entropy"
    precision: str = "32-true"
    module: bool = True  # whether the loss is a module on the LightningModule
    batch: int = 0  # samples in a batch; 0: all
    n: int = 12
    inputs: int = 3
    spare: int = 8  # features beyond n
    classes: int = 2
    scale: int = 0  # power of ten
    seed: int = 0


def reason(error: Exception) -> str:
    """Return the words of a refusal, which must have some."""
    said = str(error)
    assert len(said) > 20, f"refused without a reason: {said!r}"
    return said


CHOICES: dict[str, Sequence[Any]] = {
    "rule": ("base", "certified", "solve"),
    "method": ("auto", "singular", "distinct", "alignment"),
    "loss": ("cross entropy", "mse", "huber", "bce"),
    "precision": ("32-true", "64-true", "bf16-mixed"),
    "module": (True, False),
    "batch": (0, 5),
    "n": range(12, 21),
    "inputs": range(3, 6),
    "spare": range(8, 17),
    "classes": (2, 3),
    "scale": range(-300, 301),
    "seed": range(10_000),
}


@dataclass
class Tried:
    """What was seen of a kind."""

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Kind:
    """A kind of cases: its variants, what is drawn beside them, and the check, which says how the case came out."""

    name: str
    variants: Sequence[str]
    check: Callable[[Case], str]
    draws: Sequence[str]
    each: int  # cases of every variant in the full hunt
    choices: dict[str, Sequence[Any]] = field(default_factory=dict)

    def cases(self, variants: Sequence[str]) -> st.SearchStrategy[Case]:
        """Return the cases of some variants."""
        drawn = {name: st.sampled_from(list(self.choices.get(name, CHOICES[name]))) for name in self.draws}
        return st.builds(Case, kind=st.just(self.name), variant=st.sampled_from(list(variants)), **drawn)

    def sample(self) -> Tried:
        """Try a few cases of all variants."""
        return self._hunt(self.variants, 6)

    def all(self, variant: str) -> Tried:
        """Try a variant in many ways."""
        return self._hunt([variant], self.each)

    def _hunt(self, variants: Sequence[str], count: int) -> Tried:
        tried = Tried()

        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            print_blob=False,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @seed(zlib.crc32("".join(variants).encode()))
        @given(case=self.cases(variants))
        def no_false_word(case: Case) -> None:
            tried.cases += 1
            try:
                tried.outcomes[self.check(case)] += 1
            except Exception as error:
                error.add_note(f'python tests/truth/again.py "{case}"')
                raise

        no_false_word()
        return tried
