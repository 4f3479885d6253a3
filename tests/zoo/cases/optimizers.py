"""Manual optimization and several optimizers."""

from typing import Any

import torch
import torch.nn.functional as F
from case import Reading, Task, case
from samples import floats, labels, table
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


def convinced(module: Any, batch: Any) -> Tensor:
    return module.critic(module(module.noise(batch).to(batch[0])))


case(
    "manual optimization and several optimizers",
    "random steps",
    "several calls",
    data=table(X, Y),
    name="gan",
    call=(Reading(judged, "critic.", "critic"), Reading(convinced, "generator.", "generator")),
    about="A GAN that draws its noise in the step: a network for each optimizer, the critic's on real and on generated samples",
)(GAN)


@case(
    "manual optimization and several optimizers",
    "several calls",
    data=table(X, floats(3, seed=15)),
    call=(Reading(judged, "critic.", "critic"), Reading(convinced, "generator.", "generator")),
)
class GanFromData(GAN):
    """A GAN whose noise is in the batch: a network for each optimizer."""

    def noise(self, batch: Any) -> Tensor:
        return batch[1]


@case(
    "manual optimization and several optimizers",
    data=table(X, VALUE),
    call=tuple(Reading(lambda m, b: m(b[0]), f"{part}.", part) for part in ("trunk", "head")),
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


class ByHand(Task):
    """Base of modules that step by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization, self.losses = False, []
        self.make()


@case(
    "manual optimization and several optimizers",
    data=table(X, labels(3, seed=16), VALUE, floats(6, seed=17)),
    call=(
        Reading(lambda m, b: m.actor(b[0]), "actor.", "actor"),
        Reading(lambda m, b: m.critic(b[0]), "critic.", "critic"),
    ),
)
class ActorCritic(ByHand):
    """An actor and a critic on transitions (state, action, reward, next state), an optimizer each."""

    def make(self) -> None:
        self.actor, self.critic = mlp(6, 3), mlp(6, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        state, action, reward, following = batch
        of_actor, of_critic = self.optimizers()
        value = self.critic(state)
        with torch.no_grad():
            target = reward + 0.9 * self.critic(following)
        loss = F.mse_loss(value, target)
        of_critic.zero_grad()
        self.manual_backward(loss)
        of_critic.step()
        chosen = torch.distributions.Categorical(logits=self.actor(state)).log_prob(action)
        gain = (chosen * (target - value).detach().squeeze(1)).mean()
        of_actor.zero_grad()
        self.manual_backward(-gain)
        self.clip_gradients(of_actor, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        of_actor.step()
        self.losses += [loss.item(), gain.item()]

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.actor.parameters(), 0.01), torch.optim.RMSprop(self.critic.parameters(), 0.01)


@case(
    "manual optimization and several optimizers",
    "several calls",
    data=table(X, floats(3, seed=15)),
    call=(Reading(judged, "critic.", "critic"), Reading(convinced, "generator.", "generator")),
)
class GeneratorFirst(GanFromData):
    """A GAN written as in plain PyTorch: the generator's turn first, two passes for the critic, nothing toggled or detached."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, fake = batch[0], self(batch[1])
        of_generator, of_critic = self.optimizers(use_pl_optimizer=True)
        self.generator.zero_grad()
        loss = self.generator_loss(real, batch[1])
        loss.backward()
        of_generator.step()
        self.critic.zero_grad()
        on_real = F.softplus(-self.critic(real)).mean()
        on_real.backward()
        on_fake = F.softplus(self.critic(fake.detach())).mean()
        on_fake.backward()
        of_critic.step()
        self.losses += [loss.item(), on_real.item(), on_fake.item()]


@case(
    "manual optimization and several optimizers",
    data=table(X),
    call=tuple(
        Reading(lambda m, b: m.decoder(torch.tanh(m.encoder(b[0]))), f"{part}.", part)
        for part in ("encoder", "decoder")
    ),
)
class OneLossForTwo(ByHand):
    """An autoencoder with an optimizer for either half, on one loss; they have closures."""

    def make(self) -> None:
        self.encoder, self.decoder = nn.Linear(6, 3), nn.Linear(3, 6)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()

        def closure() -> Tensor:
            first.zero_grad(), second.zero_grad()
            loss = F.mse_loss(self.decoder(torch.tanh(self.encoder(batch[0]))), batch[0])
            self.manual_backward(loss)
            self.losses.append(loss.item())
            return loss

        first.step(closure=closure)
        second.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.encoder.parameters(), 0.05, 2), torch.optim.SGD(self.decoder.parameters(), 0.05)


@case(
    "manual optimization and several optimizers",
    data=table(X, Y, VALUE, batch_size=2),
    call=(
        Reading(lambda m, b: m.classes(torch.tanh(m.trunk(b[0]))), ("trunk.", "classes."), "SGD"),
        Reading(lambda m, b: m.value(torch.tanh(m.trunk(b[0]))), "value.", "value"),
    ),
)
class EachSecondBatch(ByHand):
    """One optimizer steps in each batch, the other, with a head of its own, in each second one."""

    def make(self) -> None:
        self.trunk, self.classes, self.value = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        always, seldom = self.optimizers()
        loss = F.cross_entropy(self.classes(torch.tanh(self.trunk(batch[0]))), batch[1])
        always.zero_grad()
        self.manual_backward(loss)
        always.step()
        self.losses.append(loss.item())
        if batch_idx % 2:
            loss = F.mse_loss(self.value(torch.tanh(self.trunk(batch[0]))), batch[2])
            seldom.zero_grad()
            self.manual_backward(loss)
            seldom.step()
            self.losses.append(loss.item())

    def configure_optimizers(self) -> Any:
        shared = [*self.trunk.parameters(), *self.classes.parameters()]
        return torch.optim.SGD(shared, 0.05, momentum=0.9), torch.optim.SGD(self.value.parameters(), 0.05)


def convinced_after_clamping(module: Any, batch: Any) -> Tensor:
    module.clamp()
    return convinced(module, batch)


@case(
    "manual optimization and several optimizers",
    "several calls",
    data=table(X, floats(3, seed=15)),
    call=(Reading(judged, "critic.", "critic"), Reading(convinced_after_clamping, "generator.", "generator")),
)
class Wasserstein(GanFromData):
    """A WGAN: two steps of the critic, whose weights are clamped, and then one of the generator."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        of_generator, of_critic = self.optimizers()
        real, z = batch
        for _ in range(2):
            loss = self.critic(self(z).detach()).mean() - self.critic(real).mean()
            of_critic.zero_grad()
            self.manual_backward(loss)
            of_critic.step()
            self.clamp()
            self.losses.append(loss.item())
        with of_generator.toggle_model():
            loss = -self.critic(self(z)).mean()
            self.manual_backward(loss)
            of_generator.step()
            of_generator.zero_grad()
        self.losses.append(loss.item())

    def clamp(self) -> None:
        for parameter in self.critic.parameters():
            parameter.data.clamp_(-0.1, 0.1)

    def configure_optimizers(self) -> Any:
        return [torch.optim.RMSprop(part.parameters(), 0.01) for part in (self.generator, self.critic)]


@case(
    "manual optimization and several optimizers",
    "random steps",
    data=table(X),
    call=Reading(lambda m, b: m.policy(b[0]), "policy.", "policy"),
)
class Temperature(ByHand):
    """A policy with a learned temperature, as in SAC: no network stands behind the loss of the second optimizer."""

    def make(self) -> None:
        self.policy, self.log_alpha = mlp(6, 3), nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        of_policy, of_alpha = self.optimizers()
        log_p = self.policy(batch[0]).log_softmax(1)
        entropy = -(log_p.exp() * log_p).sum(1)
        loss = (log_p[:, 0].square() - self.log_alpha.exp().detach() * entropy).mean()
        of_policy.zero_grad()
        self.manual_backward(loss)
        of_policy.step()
        balance = (self.log_alpha.exp() * (entropy.detach() - 0.5)).mean()
        of_alpha.zero_grad()
        self.manual_backward(balance)
        of_alpha.step()
        self.losses += [loss.item(), balance.item()]

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.policy.parameters(), 0.01), torch.optim.Adam([self.log_alpha], 0.01)


@case(
    "manual optimization and several optimizers",
    data=table(X, Y, batch_size=2),
    call=lambda m, b: m.net(b[0]),
)
class AccumulatedByHand(ByHand):
    """One optimizer that steps after three batches, counted by the module itself."""

    def make(self) -> None:
        self.net, self.count = mlp(), 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.manual_backward(loss / 3)
        self.losses.append(loss.item())
        self.count += 1
        if self.count % 3 == 0:
            optimizer.step()
            optimizer.zero_grad()
