"""``GuardState``: the state of the expressivity guard, kept in the checkpoint and logged as scalars."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lightning_conv.callbacks.guard.certify.checks import Check, caveats, of_certificate, settle
from lightning_conv.callbacks.guard.certify.verdict import Attained, HeadBounds, verdict_on
from lightning_conv.callbacks.guard.head.curvature import largest_step
from lightning_conv.callbacks.guard.switch.moment import Plateau
from lightning_conv.expressivity import Cost, RankCertificate
from lightning_conv.linalg.spectrum import Bounded
from lightning_conv.networks.perturbation import Perturbation
from lightning_conv.theory.criterion import Verdict

MEASURED = ("loss", "gap", "bound", "step_size")  # entries of the history that are logged
# Numbers of a certificate that come with bounds; some methods know only some of them.
BOUNDED = ("sigma_min", "sigma_max", "distance", "residual")
# Fields that a checkpoint holds as dicts.
REBUILT = {"perturbation": Perturbation, "plateau": Plateau, "bounds": HeadBounds, "curvature": Bounded}


@dataclass
class GuardState:
    """The state of the guard. ``as_plain`` and ``from_plain`` convert it to and from plain types, the only ones a checkpoint may hold."""

    phase: int = 1
    reason: str = "before the switch"
    verdict: Verdict = (
        "not applicable"  # on the claim that the infimum of the last layer is the global one of the training loss
    )
    why: str = ""  # reason why the verdict is not "certified", where neither the certificate nor a caveat gives it
    switch_step: int | None = None  # the step after which phase 1 ends, or is to end at the latest
    declined: bool = False  # the condition was not certified and the run goes on in phase 1
    last_step: int = 0
    fingerprints: dict[str, str] = field(default_factory=dict)  # of the trunk's tensors in phase 2
    history: list[dict[str, float]] = field(default_factory=list)  # loss and gap on the training set
    checks: list[Check] = field(default_factory=list)  # that the verdict rests on
    certified_on: dict[str, Any] = field(default_factory=dict)  # hash of the samples, and some projected features
    plateau: Plateau | None = None
    certificate: RankCertificate | None = None
    perturbation: Perturbation | None = None
    loss_kind: Attained = "other"  # where the loss comes to its infimum
    bounds: HeadBounds | None = None  # on the head's problem on this trunk, where it was solved
    best_loss: float | None = None  # the loss that a narrow head can reach on this trunk
    steps: dict[str, Any] = field(default_factory=dict)  # state of the step rule: numbers and strings
    curvature: Bounded | None = None  # L_H of the head's mean loss on this trunk
    ranks: dict[str, float] = field(default_factory=dict)  # of certificates that decide nothing, by their tag

    def as_plain(self) -> dict[str, Any]:
        """Return all fields as numbers, strings, lists and dicts."""
        plateau = self.plateau.as_plain() if self.plateau is not None else None
        return asdict(replace(self, plateau=None)) | {"plateau": plateau, "caveats": self.caveats}

    @classmethod
    def from_plain(cls, stored: dict[str, Any]) -> GuardState:
        """Rebuild the state that ``as_plain`` stored; fields that an older checkpoint lacks keep their defaults.

        Args:
            stored: Dict that ``as_plain`` returned, read from a checkpoint.
        """
        known = {name: value for name, value in stored.items() if name in cls.__dataclass_fields__}
        for name, kind in REBUILT.items():
            if known.get(name) is not None:
                known[name] = kind(**known[name])
        if (certificate := known.get("certificate")) is not None:
            bounds = {name: Bounded(**certificate[name]) for name in BOUNDED if certificate.get(name) is not None}
            known["certificate"] = RankCertificate(**{**certificate, **bounds, "cost": Cost(**certificate["cost"])})
        known["checks"] = [Check(**check) for check in known.get("checks", [])]
        if "checks" not in stored:  # a version that kept no list of checks kept what had failed
            known["checks"] = [Check("steps of the rule", False, said) for said in stored.get("caveats", [])]
        known["history"] = [dict(entry) for entry in known.get("history", [])]
        return cls(**known)

    def forget(self) -> None:
        """Reset all fields to their defaults, for another run."""
        vars(self).update(vars(GuardState()))

    @property
    def certified(self) -> bool:
        """Whether the certificate proves its claim: rank [h, 1] = n, or that the targets are reached."""
        return self.certificate is not None and self.certificate.verdict == "certified"

    @property
    def caveats(self) -> list[str]:
        """What the checks that failed saw."""
        return caveats(self.checks)

    @property
    def hopeless(self) -> bool:
        """Whether rank n is refuted whatever the weights: too few features, or two equal samples."""
        certificate = self.certificate
        if certificate is None or certificate.method == "alignment" or certificate.at_these_weights:
            return False
        return certificate.verdict == "refuted"

    def judge(self) -> None:
        """Update the verdict and ``why``: what follows (``verdict_on``) as far as the checks that it needs were made (``settle``)."""
        found = verdict_on(self.certificate, self.loss_kind, self.bounds, self.caveats)
        self.verdict, self.why = settle(*found, [*self.checks, *of_certificate(self.certificate)])

    def add_reason(self, said: str) -> None:
        """Append a sentence to the reason.

        Args:
            said: The sentence.
        """
        self.reason = f"{self.reason}; {said}"

    def metrics(self, step: float) -> dict[str, float]:
        """Return the scalars for the loggers.

        Args:
            step: Number of optimizer steps done.

        Returns:
            The scalars by logged name, as ``ExpressivityGuard`` lists them; those in ``MEASURED`` only if they were measured at ``step``.
        """
        values = {"convergence/phase": float(self.phase), "guard/phase": float(self.phase)}
        if (certificate := self.certificate) is not None:
            values |= {"guard/rank": float(certificate.rank_lower), "guard/samples": float(certificate.n)}
            known = {name: bounded for name in BOUNDED if (bounded := getattr(certificate, name)) is not None}
            values |= {f"guard/{name}": bounded.value for name, bounded in known.items()}
            if certificate.sigma_min is not None:
                values["guard/sigma_min_lower"] = certificate.sigma_min.lower
        if self.perturbation is not None:
            values["guard/noise"] = self.perturbation.relative
        values |= {f"guard/{name}": value for name, value in self.ranks.items()}
        if self.curvature is not None:
            values |= {"guard/curvature": self.curvature.value, "guard/largest_step": largest_step(self.curvature)}
        if self.best_loss is not None:
            values["guard/best_loss"] = self.best_loss
        if self.history and self.history[-1]["step"] == step:
            values |= {f"guard/{name}": self.history[-1][name] for name in MEASURED if name in self.history[-1]}
            if "gap" in self.history[-1]:
                values["convergence/gap"] = self.history[-1]["gap"]
        return values
