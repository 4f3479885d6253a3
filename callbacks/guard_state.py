"""What the expressivity guard knows: kept in the checkpoint, logged as scalars, written out as a report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_conv.expressivity import Cost, RankCertificate
from lightning_conv.spectrum import Bounded
from lightning_conv.two_phase import Perturbation


@dataclass
class GuardState:
    """The guard's memory. ``as_plain`` and ``from_plain`` use plain types only, which is all that a checkpoint may hold."""

    phase: int = 1
    reason: str = "before the switch"
    switch_step: int | None = None
    declined: bool = False  # the condition was not certified and the run goes on in phase 1
    last_step: int = 0
    fingerprints: dict[str, str] = field(default_factory=dict)  # of the trunk's tensors in phase 2
    history: list[dict[str, float]] = field(default_factory=list)  # loss and gap on the training set
    certificate: RankCertificate | None = None
    perturbation: Perturbation | None = None

    def as_plain(self) -> dict[str, Any]:
        """All fields as numbers, strings, lists and dicts."""
        return asdict(self)

    @classmethod
    def from_plain(cls, stored: dict[str, Any]) -> GuardState:
        """The inverse of ``as_plain``; fields that an older checkpoint lacks keep their defaults."""
        known = {name: value for name, value in stored.items() if name in cls.__dataclass_fields__}
        if known.get("perturbation") is not None:
            known["perturbation"] = Perturbation(**known["perturbation"])
        if (certificate := known.get("certificate")) is not None:
            bounds = {
                name: Bounded(**certificate[name])
                for name in ("sigma_min", "sigma_max", "distance", "residual")
                if certificate.get(name) is not None
            }
            known["certificate"] = RankCertificate(**{**certificate, **bounds, "cost": Cost(**certificate["cost"])})
        known["history"] = [dict(entry) for entry in known.get("history", [])]
        return cls(**known)

    @property
    def certified(self) -> bool:
        """Whether rank [h, 1] = n is certified."""
        return self.certificate is not None and self.certificate.verdict == "certified"

    def metrics(self, step: float) -> dict[str, float]:
        """Scalars for the loggers; loss and gap only if they were measured at ``step``."""
        values = {"convergence/phase": float(self.phase), "guard/phase": float(self.phase)}
        if self.certificate is not None:
            values |= {
                "guard/rank": float(self.certificate.rank_lower),
                "guard/samples": float(self.certificate.n),
            }
            if (sigma_min := self.certificate.sigma_min) is not None:
                values |= {"guard/sigma_min": sigma_min.value, "guard/sigma_min_lower": sigma_min.lower}
        if self.perturbation is not None:
            values["guard/noise"] = self.perturbation.relative
        if self.history and self.history[-1]["step"] == step:
            values["guard/loss"] = self.history[-1]["loss"]
            if "gap" in self.history[-1]:
                values |= {"guard/gap": self.history[-1]["gap"], "convergence/gap": self.history[-1]["gap"]}
        return values

    def report(self, head: str) -> str:
        """The switch as Markdown."""
        lines = [self.reason, "", "| quantity | value |", "|---|---|", f"| head | {head} |"]
        if self.certificate is not None:
            certificate = self.certificate
            lines += [
                f"| verdict | {certificate.verdict} |",
                f"| rank of [h, 1] / n | {certificate.rank_lower} / {certificate.n} |",
                f"| width m_H | {certificate.width} |",
                f"| method | {certificate.method} |",
            ]
            if certificate.sigma_min is not None:
                lines.append(
                    f"| sigma_min | {certificate.sigma_min.value:.6e}, at least {certificate.sigma_min.lower:.6e} |"
                )
            if certificate.sigma_max is not None:
                lines.append(f"| sigma_max | at most {certificate.sigma_max.upper:.6e} |")
        if self.perturbation is not None:
            lines.append(f"| noise, relative norm | {self.perturbation.relative:.3e} |")
        return "\n".join(lines)
