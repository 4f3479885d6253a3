"""Autoencoders, VAEs, denoising and diffusion steps: random numbers in the step among them."""

from typing import Any

import torch
import torch.nn.functional as F
from case import Task, case
from samples import floats, rows, table
from torch import Tensor, nn

from cases.batches import X, mlp


@case("autoencoders", data=table(X), call=lambda m, b: m.decoder(m(b[0])))
class Autoencoder(Task):
    """The autoencoder of Lightning's first page: forward is the encoder, the step decodes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(6, 2), mlp(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].view(batch[0].size(0), -1)
        return F.mse_loss(self.decoder(self.encoder(x)), x)


@case("autoencoders", data=rows(image=floats(1, 4, 4)), call=lambda m, b: m.decoder(m.encoder(b["image"])))
class ConvolutionalAutoencoder(Task):
    """Images in a dict, no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.ELU())
        self.decoder = nn.ConvTranspose2d(3, 1, 2, stride=2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.decoder(self.encoder(batch["image"])), batch["image"])


@case("autoencoders", "losses", data=table(X), call=(lambda m, b: m(b[0])[0], lambda m, b: torch.cat(m(b[0]), 1)))
class SparseAutoencoder(Task):
    """(reconstruction, code) with a penalty on the code: the loss is no function of the reconstruction alone."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = self.encoder(x).relu()
        return self.decoder(code), code

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out, code = self(batch[0])
        return F.mse_loss(out, batch[0]) + 0.01 * code.abs().sum(1).mean()


class VAE(Task):
    """A variational autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def drawn(self, mean: Tensor, log_var: Tensor) -> Tensor:
        return mean + torch.randn_like(mean) * (0.5 * log_var).exp()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_var = self.encoder(x).chunk(2, 1)
        return self.decoder(self.drawn(mean, log_var)), mean, log_var

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, mean, log_var = self(batch[0])
        return F.mse_loss(x, batch[0]) + 1e-2 * (mean.square() + log_var.exp() - log_var - 1).mean()


def decoded_mean(module: Any, batch: Any) -> Tensor:
    return module.decoder(module.encoder(batch[0]).chunk(2, 1)[0])


def decoded_with_code(module: Any, batch: Any) -> Tensor:
    code = module.encoder(batch[0])
    return torch.cat([module.decoder(code.chunk(2, 1)[0]), code], 1)


case(
    "VAEs",
    "random steps",
    "tuples of outputs",
    data=table(X),
    call=lambda m, b: torch.cat(m(b[0]), 1),
    name="vae",
    about="A VAE that draws in every mode; each sample keeps its random numbers",
)(VAE)


@case("VAEs", "tuples of outputs", data=table(X), call=(decoded_mean, decoded_with_code))
class QuietVae(VAE):
    """A VAE that draws in training mode only: in eval mode it decodes the mean."""

    def drawn(self, mean: Tensor, log_var: Tensor) -> Tensor:
        return super().drawn(mean, log_var) if self.training else mean


def encoded_and_decoded_twice(module: Any, batch: Any) -> Tensor:
    code = module.encoder(batch[0])
    mean, log_var = code.chunk(2, 1)
    posterior = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    return torch.cat([code, *(module.decoder(posterior.rsample()) for _ in range(2))], 1)


@case("VAEs", "random steps", "no forward", data=table(X), call=encoded_and_decoded_twice)
class VaeInStep(VAE):
    """A VAE whose step draws through torch.distributions and samples twice; the loss depends on the code and both decodings."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mean, log_var = self.encoder(batch[0]).chunk(2, 1)
        posterior = torch.distributions.Normal(mean, (0.5 * log_var).exp())
        losses = [F.mse_loss(self.decoder(posterior.rsample()), batch[0]) for _ in range(2)]
        prior = torch.distributions.Normal(0.0, 1.0)
        return sum(losses) / 2 + 0.01 * torch.distributions.kl_divergence(posterior, prior).mean()


@case(
    "denoising and diffusion",
    "random steps",
    data=table(X),
    call=lambda m, b: m(*m.noised(b[0])[:2]),
)
class Diffusion(Task):
    """A denoising diffusion step: a random time and random noise for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(7, 6)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.net(torch.cat([x, time[:, None]], 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noisy, time, noise = self.noised(batch[0])
        return F.mse_loss(self(noisy, time), noise)

    def noised(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        time, noise = torch.rand(len(x), device=x.device).to(x), torch.randn_like(x)
        kept = torch.cos(time * torch.pi / 2)[:, None]
        return kept * x + (1 - kept.square()).sqrt() * noise, time, noise


@case(
    "denoising and diffusion",
    "random steps",
    data=table(X),
    call=lambda m, b: m(b[0] + 0.1 * torch.randn_like(b[0])),
)
class Denoiser(Task):
    """Noise is added in the step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0] + 0.1 * torch.randn_like(batch[0])), batch[0])


@case(
    "denoising and diffusion",
    "dict batches",
    data=rows(noisy=X + 0.1 * floats(6, seed=12), time=floats(seed=13).abs(), noise=floats(6, seed=12)),
    call=lambda m, b: m(b["noisy"], b["time"]),
)
class DiffusionFromData(Diffusion):
    """Times and noise come from the data set: nothing is drawn in the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch["noisy"], batch["time"]), batch["noise"])


@case("denoising and diffusion", "autoencoders", data=table(X), call=lambda m, b: m.net(b[0]))
class MaskedAutoencoder(Task):
    """Dropout on the inputs is the noise: in eval mode there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Dropout(0.3), mlp(6, 6))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[0])
