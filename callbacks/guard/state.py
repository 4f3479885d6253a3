"""What the expressivity guard knows: kept in the checkpoint, logged as scalars, written out as a report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lightning_conv.callbacks.guard.certify.verdict import HeadBounds, LossKind, Verdict, verdict_on
from lightning_conv.callbacks.guard.head.curvature import largest_step
from lightning_conv.callbacks.guard.switch.moment import Plateau
from lightning_conv.expressivity import Cost, RankCertificate
from lightning_conv.linalg.spectrum import Bounded
from lightning_conv.networks.perturbation import Perturbation

MEASURED = ("loss", "gap", "bound", "step_size")
"""What an entry of the history may hold beside its step and epoch."""


@dataclass
class GuardState:
    """The guard's memory. ``as_plain`` and ``from_plain`` use plain types only, which is all that a checkpoint may hold."""

    phase: int = 1
    reason: str = "before the switch"
    verdict: Verdict = (
        "not applicable"  # of the claim that the last layer's infimum is the global one of the training loss
    )
    why: str = ""  # it is not "certified", where neither the certificate nor a caveat says so
    switch_step: int | None = None  # the step after which phase 1 ends, or is to end at the latest
    declined: bool = False  # the condition was not certified and the run goes on in phase 1
    last_step: int = 0
    fingerprints: dict[str, str] = field(default_factory=dict)  # of the trunk's tensors in phase 2
    history: list[dict[str, float]] = field(default_factory=list)  # loss and gap on the training set
    caveats: list[str] = field(default_factory=list)
    plateau: Plateau | None = None
    certificate: RankCertificate | None = None
    perturbation: Perturbation | None = None
    loss_kind: LossKind = "other"
    bounds: HeadBounds | None = None  # of the head's problem on this trunk, where it was solved
    best_loss: float | None = None  # that a narrow head can reach on this trunk
    steps: dict[str, Any] = field(default_factory=dict)  # of the step rule: numbers and strings
    curvature: Bounded | None = None  # L_H of the head's mean loss on this trunk
    ranks: dict[str, float] = field(default_factory=dict)  # of certificates that decide nothing, by their tag

    def as_plain(self) -> dict[str, Any]:
        """All fields as numbers, strings, lists and dicts."""
        plateau = self.plateau.as_plain() if self.plateau is not None else None
        return asdict(replace(self, plateau=None)) | {"plateau": plateau}

    @classmethod
    def from_plain(cls, stored: dict[str, Any]) -> GuardState:
        """The inverse of ``as_plain``; fields that an older checkpoint lacks keep their defaults."""
        known = {name: value for name, value in stored.items() if name in cls.__dataclass_fields__}
        if known.get("perturbation") is not None:
            known["perturbation"] = Perturbation(**known["perturbation"])
        if known.get("plateau") is not None:
            known["plateau"] = Plateau(**known["plateau"])
        if known.get("bounds") is not None:
            known["bounds"] = HeadBounds(**known["bounds"])
        if known.get("curvature") is not None:
            known["curvature"] = Bounded(**known["curvature"])
        if (certificate := known.get("certificate")) is not None:
            bounds = {
                name: Bounded(**certificate[name])
                for name in ("sigma_min", "sigma_max", "distance", "residual")
                if certificate.get(name) is not None
            }
            known["certificate"] = RankCertificate(**{**certificate, **bounds, "cost": Cost(**certificate["cost"])})
        known["history"] = [dict(entry) for entry in known.get("history", [])]
        return cls(**known)

    def forget(self) -> None:
        """Begin anew, for another run."""
        vars(self).update(vars(GuardState()))

    @property
    def certified(self) -> bool:
        """Whether the certificate proves its claim: rank [h, 1] = n, or that the targets are reached."""
        return self.certificate is not None and self.certificate.verdict == "certified"

    def judge(self) -> None:
        """Say what is known of the claim that the last layer's infimum is the global one, see ``verdict_on``."""
        self.verdict, self.why = verdict_on(self.certificate, self.loss_kind, self.bounds, self.caveats)

    @property
    def hopeless(self) -> bool:
        """Whether rank n is refuted whatever the weights: too few features, or two equal samples."""
        certificate = self.certificate
        return certificate is not None and certificate.method != "alignment" and certificate.verdict == "refuted"

    def metrics(self, step: float) -> dict[str, float]:
        """Scalars for the loggers; loss and gap only if they were measured at ``step``."""
        values = {"convergence/phase": float(self.phase), "guard/phase": float(self.phase)}
        if (certificate := self.certificate) is not None:
            values |= {"guard/rank": float(certificate.rank_lower), "guard/samples": float(certificate.n)}
            if (sigma_min := certificate.sigma_min) is not None:
                values |= {"guard/sigma_min": sigma_min.value, "guard/sigma_min_lower": sigma_min.lower}
            if certificate.sigma_max is not None:
                values["guard/sigma_max"] = certificate.sigma_max.value
            if certificate.distance is not None:
                values["guard/distance"] = certificate.distance.value
            if certificate.residual is not None:
                values["guard/residual"] = certificate.residual.value
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

    def report(self, head: str) -> str:
        """The switch as Markdown."""
        lines = [
            self.reason,
            "",
            "| quantity | value |",
            "|---|---|",
            f"| verdict | {self.verdict}{': ' + self.why if self.why else ''} |",
            f"| head | {head} |",
        ]
        if (certificate := self.certificate) is not None:
            lines += [
                f"| certificate | {certificate.verdict} |",
                f"| rank of [h, 1] / n | {certificate.rank_lower} / {certificate.n} |",
                f"| width m_H | {certificate.width} |",
                f"| method | {certificate.method} |",
            ]
            if (sigma_min := certificate.sigma_min) is not None:
                lines.append(f"| sigma_min | {sigma_min.value:.6e}, at least {sigma_min.lower:.6e} |")
            if certificate.sigma_max is not None:
                sigma_max = certificate.sigma_max
                lines.append(f"| sigma_max | {sigma_max.value:.6e}, at most {sigma_max.upper:.6e} |")
            if (distance := certificate.distance) is not None:
                lines.append(f"| closest two samples | {distance.value:.6e} apart, at least {distance.lower:.6e} |")
            if (residual := certificate.residual) is not None:
                lines.append(
                    f"| residual of the targets | {residual.value:.6e}, from {residual.lower:.6e} to {residual.upper:.6e} |"
                )
        if self.curvature is not None:
            lines.append(f"| L_H | {self.curvature.value:.6e}, at most {self.curvature.upper:.6e} |")
            lines.append(f"| largest safe step 2 / L_H | {largest_step(self.curvature):.6e} |")
        if self.perturbation is not None:
            lines.append(f"| noise, relative norm | {self.perturbation.relative:.3e} |")
        return "\n".join(lines)
