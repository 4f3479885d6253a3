"""Manual optimization and several optimizers."""

from typing import Any

import torch
import torch.nn.functional as F
from case import Reading, Task, case
from samples import floats, table
from torch import Tensor, nn

from cases.batches import VALUE, X, Y, mlp


@case("manual optimization and several optimizers", data=table(X, Y), call=lambda m, b: m(b[0]))
class ManualStep(Task):
    """One optimizer, stepped by hand, with clipping and a scheduler."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization, self.losses = False, []
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer, loss = self.optimizers(), F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        optimizer.step()
        self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


class GAN(Task):
    """A generator and a critic with an optimizer each."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization, self.losses = False, []
        self.generator, self.critic = mlp(3, 6), mlp(6, 1)

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def noise(self, batch: Any) -> Tensor:
        return torch.randn(len(batch[0]), 3)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        of_generator, of_critic = self.optimizers()
        real, z = batch[0], self.noise(batch)
        for optimizer, loss in ((of_critic, self.critic_loss), (of_generator, self.generator_loss)):
            self.toggle_optimizer(optimizer)
            value = loss(real, z)
            optimizer.zero_grad()
            self.manual_backward(value)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            self.losses.append(value.item())

    def critic_loss(self, real: Tensor, z: Tensor) -> Tensor:
        one, zero = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        judged = self.critic(real), self.critic(self(z).detach())
        return F.binary_cross_entropy_with_logits(judged[0], one) + F.binary_cross_entropy_with_logits(judged[1], zero)

    def generator_loss(self, real: Tensor, z: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.critic(self(z)), torch.ones(len(real), 1))

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), 0.01, betas=(0.5, 0.9)) for part in (self.generator, self.critic)]


def judged(module: Any, batch: Any) -> Tensor:
    z = module.noise(batch)
    return torch.cat([module.critic(batch[0]), module.critic(module(z.to(batch[0])).detach())], 1)


case(
    "manual optimization and several optimizers",
    "random steps",
    "several calls",
    data=table(X, Y),
    name="gan",
    call=Reading(judged, over="critic"),
    about="A GAN that draws its noise in the step; measured is the critic, whose step comes first, on real and on generated samples",
)(GAN)


@case(
    "manual optimization and several optimizers",
    "several calls",
    data=table(X, floats(3, seed=15)),
    call=(
        Reading(judged, "critic."),
        Reading(lambda m, b: m.critic(m(b[1])), "generator."),
    ),
)
class GanFromData(GAN):
    """A GAN whose noise is in the batch: a network for each optimizer."""

    def noise(self, batch: Any) -> Tensor:
        return batch[1]


@case(
    "manual optimization and several optimizers",
    data=table(X, VALUE),
    call=tuple(Reading(lambda m, b: m(b[0]), over) for over in ("", "trunk.", "head.")),
)
class Alternating(Task):
    """Trunk and head take turns, one optimizer each."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization, self.losses = False, []
        self.trunk, self.head = nn.Sequential(nn.Linear(6, 8), nn.Softplus()), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()[batch_idx % 2]
        loss = F.mse_loss(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.trunk.parameters(), 0.05), torch.optim.AdamW(self.head.parameters(), 0.01)


@case(
    "manual optimization and several optimizers",
    data=table(X, Y),
    call=lambda m, b: m(b[0]),
    expected="needs one argument",
)
class SharpnessAware(ManualStep):
    """Two passes per step: up along the gradient and back, as SAM."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer, held = self.optimizers(), [p.detach().clone() for p in self.parameters()]
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.05 * parameter.grad / (parameter.grad.norm() + 1e-12))
        optimizer.zero_grad()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        with torch.no_grad():
            for parameter, old in zip(self.parameters(), held, strict=True):
                parameter.copy_(old)
        optimizer.step()
        optimizer.zero_grad()
        self.losses.append(loss.item())
