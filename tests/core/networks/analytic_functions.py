"""Functions z -> f(z) of a layer's result, (samples, 6): real-analytic ones, and others, by name."""

import ctypes
import math
from array import array

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

MASK = torch.tensor([True, False, False, True, False, False])
INDEX = torch.tensor([0, 2, 1])


class Rounded(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx, z):
        return z.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class InNumpy(torch.autograd.Function):
    """Computed where no operator of torch is called."""

    @staticmethod
    def forward(ctx, z):
        return torch.from_numpy(np.abs(z.detach().numpy()))

    @staticmethod
    def backward(ctx, grad):
        return grad


@torch.library.custom_op("lightning_conv_tests::folded", mutates_args=())
def folded(z: torch.Tensor) -> torch.Tensor:
    return z.abs()


@torch.jit.script
def scripted_branch(z):
    if bool(z.sum() > 0):
        return z
    return -z


@torch.jit.script
def scripted_relu(z):
    return torch.relu(z) * 2


def masked_in_place(z):
    y = z.clone()
    y[z > 0] = 0
    return y


def written_by_numpy(z):
    y = torch.empty_like(z)
    np.copyto(y.numpy(), np.abs(z.detach().numpy()))
    return y * 2


def written_by_pointer(z):
    """As a kernel does that is launched on addresses: nothing of it is dispatched."""
    z = z.contiguous()
    y = torch.empty_like(z)
    ctypes.memmove(y.data_ptr(), z.data_ptr(), z.numel() * z.element_size())
    return y * 2


def numbers_of(z):
    kind = "f" if z.dtype == torch.float32 else "d"
    return array(kind, bytes(z.detach().clone().untyped_storage())).tolist()


def attention(z):
    z = z.reshape(-1, 2, 3)
    return F.scaled_dot_product_attention(z, z, z, is_causal=True)


def halves_written(z):
    y = torch.empty_like(z)
    y[:, :3] = z[:, 3:]
    y[:, 3:] = z[:, :3].tanh()
    return y


def zeros(z):
    return torch.zeros(z.shape, dtype=torch.long)


NOT_ANALYTIC = {
    # jumps and kinks that are known by name
    "relu": F.relu,
    "relu_": lambda z: F.relu_(z.clone()),
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "prelu": nn.PReLU(),
    "hardtanh": nn.Hardtanh(-2, 2),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "threshold": nn.Threshold(0.1, 0.0),
    "softshrink": F.softshrink,
    "hardshrink": F.hardshrink,
    "softsign": F.softsign,
    "clamp": lambda z: z.clamp(0, 1),
    "clip": lambda z: z.clip(0, 1),
    "abs": torch.abs,
    "abs out=": lambda z: torch.abs(z, out=torch.empty_like(z)),
    "abs of data": lambda z: z.data.abs(),
    "sign": torch.sign,
    "sgn": torch.sgn,
    "signbit": lambda z: z.signbit().to(z),
    "heaviside": lambda z: torch.heaviside(z, z.new_zeros(())),
    "copysign": lambda z: torch.copysign(torch.ones_like(z), z),
    "round": torch.round,
    "round to decimals": lambda z: z.round(decimals=2),
    "ceil": torch.ceil,
    "floor": torch.floor,
    "trunc": torch.trunc,
    "frac": torch.frac,
    "remainder": lambda z: z % 1,
    "fmod": lambda z: z.fmod(1),
    "floor_divide": lambda z: z // 0.5,
    "div floor": lambda z: torch.div(z, 0.3, rounding_mode="floor"),
    "div trunc": lambda z: torch.div(z, 0.3, rounding_mode="trunc"),
    "maximum": lambda z: torch.maximum(z, -z),
    "minimum": lambda z: torch.minimum(z, -z),
    "fmax": lambda z: torch.fmax(z, -z),
    "fmin": lambda z: torch.fmin(z, -z),
    "max": lambda z: z.max(1, keepdim=True).values,
    "min": lambda z: z.min(1, keepdim=True).values,
    "amax": lambda z: z.amax(1, keepdim=True),
    "aminmax": lambda z: z.aminmax(dim=1, keepdim=True).max,
    "cummax": lambda z: z.cummax(1).values,
    "cummin": lambda z: z.cummin(1).values,
    "median": lambda z: z.median(1, keepdim=True).values,
    "nanmedian": lambda z: z.nanmedian(1, keepdim=True).values,
    "kthvalue": lambda z: z.kthvalue(2, 1).values,
    "quantile": lambda z: z.quantile(0.5, 1, keepdim=True),
    "mode": lambda z: z.mode(1).values,
    "sort": lambda z: z.sort(1).values,
    "topk": lambda z: z.topk(2, 1).values,
    "argmax": lambda z: z.argmax(1, keepdim=True).to(z),
    "gather by argsort": lambda z: z.gather(1, z.argsort(1)),
    "bucketize": lambda z: torch.bucketize(z, z.new_tensor([0.0, 1.0])).to(z),
    "searchsorted": lambda z: torch.searchsorted(z.new_tensor([0.0, 1.0]), z).to(z),
    "max_pool1d": lambda z: F.max_pool1d(z[:, None], 2),
    "adaptive_max_pool1d": lambda z: F.adaptive_max_pool1d(z[:, None], 2),
    "lp_pool1d": lambda z: F.lp_pool1d(z[:, None], 2, 2),
    "where": lambda z: torch.where(z > 0, z, 2 * z),
    "where of constants": lambda z: torch.where(z > 0, 1.0, -1.0).to(z),
    "times a comparison": lambda z: (z > 0) * z,
    "equals zero": lambda z: (z == 0) * 1.0 + z,
    "masked_fill": lambda z: z.masked_fill(z > 0, 0.0),
    "index_put by a mask": masked_in_place,
    "embedding by a comparison": lambda z: F.embedding((z > 0).long(), z.new_ones(2, 3).cumsum(0)),
    "scatter_reduce amax": lambda z: torch.zeros_like(z).scatter_reduce(1, zeros(z), z, "amax"),
    "embedding_bag max": lambda z: z * F.embedding_bag(torch.tensor([[0, 1]]), z[:2], mode="max"),
    "norm 1": lambda z: z.norm(p=1, dim=1, keepdim=True),
    "norm 2": lambda z: z.norm(dim=1, keepdim=True),
    "norm inf": lambda z: torch.linalg.vector_norm(z, math.inf, 1, keepdim=True),
    "linalg.norm": lambda z: torch.linalg.norm(z, dim=1, keepdim=True),
    "renorm": lambda z: z.renorm(2, 0, 1.0),
    "normalize": F.normalize,
    "cosine_similarity": lambda z: F.cosine_similarity(z, z.new_ones(6))[:, None],
    "pairwise_distance": lambda z: F.pairwise_distance(z, z.new_ones(6))[:, None],
    "cdist": lambda z: torch.cdist(z, z.new_ones(3, 6)),
    "cdist 1": lambda z: torch.cdist(z, z.new_ones(3, 6), p=1),
    "std": lambda z: z.std(1, keepdim=True),
    "smooth_l1_loss": lambda z: F.smooth_l1_loss(z, 0 * z, reduction="none"),
    "huber_loss": lambda z: F.huber_loss(z, 0 * z, reduction="none"),
    "l1_loss": lambda z: F.l1_loss(z, 0 * z, reduction="none"),
    "hinge_embedding_loss": lambda z: F.hinge_embedding_loss(z, -torch.ones_like(z), reduction="none"),
    "multi_margin_loss": lambda z: F.multi_margin_loss(z, zeros(z)[:, 0], reduction="none")[:, None],
    "grid_sample at computed places": lambda z: F.grid_sample(
        z.new_ones(len(z), 1, 4, 4).cumsum(3), z.reshape(-1, 1, 3, 2), align_corners=False
    ),
    "softplus, threshold 0": nn.Softplus(1, 0.0),
    "softplus, threshold -1e9": nn.Softplus(1, -1e9),
    "softplus, threshold 5": nn.Softplus(1, 5.0),
    "F.softplus, threshold 1": lambda z: F.softplus(z, 1, 1.0),
    # casts
    "int": lambda z: z.int().to(z),
    "bool": lambda z: z.bool().to(z),
    "half": lambda z: z.half().to(z),
    "bfloat16": lambda z: z.bfloat16().to(z),
    "bits": lambda z: z.view(torch.int32).to(z),
    "copy_ into integers": lambda z: torch.zeros(z.shape, dtype=torch.int64).copy_(z).to(z),
    # singular where an argument is 0, which it is at some weights
    "sqrt of a square": lambda z: (z * z).sqrt(),
    "sqrt of pow 2": lambda z: z.pow(2).sqrt(),
    "log": lambda z: torch.log(z),
    "log of abs": lambda z: z.abs().log(),
    "log of a square": lambda z: (z * z).log(),
    "log1p": torch.log1p,
    "xlogy": lambda z: torch.xlogy(z, z),
    "reciprocal": lambda z: 1 / z,
    "over the sum": lambda z: z / z.sum(1, keepdim=True),
    "over the squared norm": lambda z: z / (z * z).sum(1, keepdim=True),
    "pow 1/2": lambda z: z.pow(0.5),
    "pow 1/3 of abs": lambda z: z.abs().pow(1 / 3),
    "pow -1": lambda z: z.pow(-1),
    "pow of a tensor": lambda z: torch.pow(z, z.new_tensor(1.5)),
    "layer_norm, eps 0": nn.LayerNorm(6, eps=0.0),
    "weight_norm": lambda z: F.linear(z, torch._weight_norm(z[:2].T @ z[:2], z[:1] * 0 + 1, 1)),
    "spectral_norm": nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
    "tan": torch.tan,
    "acos": torch.acos,
    "atanh": torch.atanh,
    "erfinv": torch.erfinv,
    "logit": torch.logit,
    "lgamma": torch.lgamma,
    "digamma": torch.digamma,
    "atan2": lambda z: torch.atan2(z, z.flip(1)),
    "hypot": lambda z: torch.hypot(z, z.flip(1)),
    "i0e": torch.special.i0e,
    "inv": lambda z: torch.linalg.inv(z[:, :4].reshape(-1, 2, 2)),
    "svdvals": lambda z: torch.linalg.svdvals(z.reshape(-1, 2, 3)),
    "eigvalsh": lambda z: torch.linalg.eigvalsh(z.reshape(-1, 2, 3) @ z.reshape(-1, 2, 3).mT),
    "complex abs": lambda z: torch.complex(z, z.flip(1)).abs(),
    "complex angle": lambda z: torch.complex(z, z.flip(1)).angle(),
    "complex tanh": lambda z: torch.complex(z, z.flip(1)).tanh().real,
    "spectrum": lambda z: torch.fft.rfft(z).abs(),
    # unknown operators
    "nan_to_num": torch.nan_to_num,
    "histc": lambda z: z + torch.histc(z.float(), 6).to(z),
    "nonzero": lambda z: z * len(z.clamp(min=0).nonzero()),
    "count_nonzero": lambda z: torch.count_nonzero(z, 1).to(z)[:, None],
    "unique": lambda z: z * len(z.unique()),
    "matrix_rank": lambda z: torch.linalg.matrix_rank(z.reshape(-1, 2, 3)).to(z)[:, None],
    "fake_quantize": lambda z: torch.fake_quantize_per_tensor_affine(z.float(), 0.1, 0, -128, 127).to(z),
    "custom operator": lambda z: torch.ops.lightning_conv_tests.folded(z),
    "custom function": Rounded.apply,
    "custom function in numpy": InNumpy.apply,
    "vmap of relu": lambda z: torch.func.vmap(torch.relu)(z),
    "scripted relu": scripted_relu,
    # a value is read, and what is done with it is not seen
    "branch on a float": lambda z: z if float(z.sum()) > 0 else -z,
    "branch on a comparison": lambda z: z if z.sum() > 0 else -z,
    "branch in a script": scripted_branch,
    "branch of torch.cond": lambda z: torch.cond(z.sum() > 0, lambda y: y.clone(), lambda y: -y, (z,)),
    "branch on equal": lambda z: z if torch.equal(z, z * 1) else -z,
    "branch on allclose": lambda z: z if torch.allclose(z, z * z) else -z,
    "branch on the bytes": lambda z: z if sum(numbers_of(z)) > 0 else -z,
    "item": lambda z: z * z.sum().item(),
    "as many as": lambda z: z[:, : int(z.sum().sigmoid() * 3) + 1],
    "tolist": lambda z: z.new_tensor(z.tolist()).tanh(),
    "numpy": lambda z: torch.from_numpy(z.detach().numpy() * 2),
    "asarray": lambda z: torch.as_tensor(np.asarray(z.detach()) * 2),
    "dlpack": lambda z: torch.from_numpy(np.from_dlpack(z.detach()) * 2),
    "apply_": lambda z: z.clone().apply_(abs),
    "map_": lambda z: z.clone().map_(z, lambda a, b: abs(a)),
    "bytes": lambda z: z.new_tensor(numbers_of(z)).reshape(len(z), -1).tanh(),
    "written by numpy": written_by_numpy,
    "written by pointer": written_by_pointer,
    # random
    "dropout": lambda z: F.dropout(z, 0.5, True),
    "alpha_dropout": lambda z: F.alpha_dropout(z, 0.1, True),
    "noise like z": lambda z: z + torch.randn_like(z),
    "noise": lambda z: z + torch.randn(6).to(z),
    "gumbel_softmax": lambda z: F.gumbel_softmax(z, hard=True),
    "rrelu": lambda z: F.rrelu(z, training=True),
}

ANALYTIC = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus, threshold 40": nn.Softplus(3, 40.0),
    "softplus": nn.Softplus(),
    "logsigmoid": F.logsigmoid,
    "tanhshrink": F.tanhshrink,
    "glu": F.glu,
    "swiglu": lambda z: F.silu(z[:, :3]) * z[:, 3:],
    "erf": torch.erf,
    "erfc": torch.erfc,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "sin": torch.sin,
    "cos": torch.cos,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "atan": torch.atan,
    "asinh": torch.asinh,
    "sinc": torch.sinc,
    "square": lambda z: z**2,
    "cube": lambda z: z**3,
    "product": lambda z: z * z.flip(1),
    "power of two": lambda z: 2**z,
    "float_power": lambda z: z.float_power(2).to(z),
    "addcmul": lambda z: torch.addcmul(z, z, z),
    "lerp": lambda z: z.lerp(z * z, 0.5),
    "in place": lambda z: z.clone().mul_(2).add_(1).tanh_(),
    "quick gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "gelu by hand": lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2))),
    "snake": lambda z: z + torch.sin(z) ** 2,
    "gaussian": lambda z: torch.exp(-z * z),
    "double": lambda z: z.double().tanh().to(z),
    # positive arguments
    "softplus by hand": lambda z: (1 + z.exp()).log(),
    "softplus by log1p": lambda z: torch.log1p(z.exp()),
    "softplus by logaddexp": lambda z: torch.logaddexp(z, torch.zeros_like(z)),
    "silu by hand": lambda z: z / (1 + torch.exp(-z)),
    "sqrt of a square plus 1": lambda z: (z * z + 1).sqrt(),
    "Cauchy": lambda z: 1 / (1 + z * z),
    "fractional power": lambda z: (1 + z * z) ** 0.3,
    "pow -2 of exp": lambda z: z.exp() ** -2,
    "softmax by hand": lambda z: z.exp() / z.exp().sum(1, True),
    "log of softmax": lambda z: z.softmax(1).log(),
    "RMSNorm by hand": lambda z: z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-2),
    "LayerNorm by hand": lambda z: (z - z.mean(1, True)) / torch.sqrt(z.var(1, keepdim=True) + 1e-2),
    "linear attention": lambda z: (z.exp() @ (z.exp().T @ z)) / (z.exp() @ z.exp().sum(0)[:, None]),
    # layers
    "LayerNorm": nn.LayerNorm(6),
    "RMSNorm": nn.RMSNorm(6, eps=1e-2),
    "BatchNorm1d": nn.BatchNorm1d(6),
    "GroupNorm": nn.GroupNorm(2, 6, eps=1e-2),
    "instance_norm": lambda z: F.instance_norm(z[:, None], eps=1e-2),
    "local_response_norm": lambda z: F.local_response_norm(z[:, :, None], 2),
    "Conv1d": nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 3)),
    "Conv2d": nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 2)),
    "Conv3d": nn.Sequential(nn.Unflatten(1, (1, 1, 2, 3)), nn.Conv3d(1, 3, (1, 2, 2))),
    "ConvTranspose1d": nn.Sequential(nn.Unflatten(1, (1, 6)), nn.ConvTranspose1d(1, 3, 3)),
    "bilinear": lambda z: F.bilinear(z, z, z.new_ones(2, 6, 6)),
    "attention": attention,
    "Dropout": nn.Dropout(),
    "scripted": torch.jit.script(nn.Sequential(nn.Tanh())),
    "vmap": lambda z: torch.func.vmap(torch.tanh)(z),
    # sums, products, losses
    "softmax": lambda z: z.softmax(1),
    "log_softmax": lambda z: z.log_softmax(1),
    "softmin": lambda z: F.softmin(z, 1),
    "logsumexp": lambda z: z.logsumexp(1, True),
    "logcumsumexp": lambda z: z.logcumsumexp(1),
    "cumsum": lambda z: z.cumsum(1),
    "cumprod": lambda z: z.cumprod(1),
    "prod": lambda z: z.prod(1, True),
    "var": lambda z: z.var(1, keepdim=True),
    "einsum": lambda z: torch.einsum("ij,ik->ijk", z, z),
    "bmm": lambda z: z.reshape(-1, 2, 3) @ z.reshape(-1, 3, 2),
    "kron": lambda z: torch.kron(z, z)[:: len(z)],
    "matrix_exp": lambda z: torch.linalg.matrix_exp(z[:, :4].reshape(-1, 2, 2)),
    "cross": lambda z: torch.linalg.cross(z[:, :3], z[:, 3:]),
    "mse_loss": lambda z: F.mse_loss(z, torch.ones_like(z), reduction="none"),
    "binary_cross_entropy_with_logits": lambda z: F.binary_cross_entropy_with_logits(
        z, torch.ones_like(z), reduction="none"
    ),
    "cross_entropy": lambda z: F.cross_entropy(z, zeros(z)[:, 0], reduction="none")[:, None],
    # arrangements
    "avg_pool1d": lambda z: F.avg_pool1d(z[:, None], 2),
    "adaptive_avg_pool1d": lambda z: F.adaptive_avg_pool1d(z[:, None], 4),
    "interpolate linear": lambda z: F.interpolate(z[:, None], scale_factor=2, mode="linear"),
    "interpolate nearest": lambda z: F.interpolate(z[:, None], scale_factor=2),
    "interpolate bicubic": lambda z: F.interpolate(z[:, None, None], scale_factor=2, mode="bicubic"),
    "pad": lambda z: F.pad(z, (1, 2)),
    "pad reflect": lambda z: F.pad(z[:, None], (1, 2), mode="reflect"),
    "pad circular": lambda z: F.pad(z[:, None], (1, 2), mode="circular"),
    "pixel_shuffle": lambda z: F.pixel_shuffle(z[:, :4].reshape(-1, 4, 1, 1), 2),
    "unfold": lambda z: F.unfold(z.reshape(-1, 1, 2, 3), 2),
    "grid_sample at fixed places": lambda z: F.grid_sample(
        z.reshape(-1, 1, 2, 3), z.new_zeros(len(z), 2, 2, 2), align_corners=False
    ),
    "tril": lambda z: z.reshape(-1, 2, 3).tril(),
    "index": lambda z: z[:, INDEX],
    "index by a mask": lambda z: z[:, MASK],
    "gather": lambda z: z.gather(1, INDEX.expand(len(z), 3)),
    "masked_fill by a constant": lambda z: z.masked_fill(MASK, -1.0),
    "where by a constant": lambda z: torch.where(MASK, z, z * z),
    "halves written": halves_written,
    "scatter_add": lambda z: torch.zeros_like(z).scatter_add(1, zeros(z), z),
    "scatter": lambda z: torch.zeros_like(z).scatter(1, torch.arange(6).flip(0).expand(z.shape), z),
    "index_add": lambda z: z.index_add(1, INDEX, z[:, :3]),
    "cat": lambda z: torch.cat([z, z], 1),
    "stack": lambda z: torch.stack([z, z * z], 1),
    "roll": lambda z: z.roll(1, 1),
    "repeat_interleave": lambda z: z.repeat_interleave(2, 1),
    "diff": lambda z: z.diff(dim=1),
    "unbind": lambda z: sum(z.unbind(1))[:, None],
    "chunk": lambda z: z.chunk(2, 1)[0],
    "expand": lambda z: z[:, None].expand(-1, 2, -1),
    # complex numbers
    "fft": lambda z: torch.view_as_real(torch.fft.rfft(z)),
    "fft filter": lambda z: torch.fft.irfft(torch.fft.rfft(z) * 0.3, n=6),
    "power spectrum": lambda z: torch.fft.rfft(z).real ** 2 + torch.fft.rfft(z).imag ** 2,
    "complex product": lambda z: (torch.complex(z, z) * torch.complex(z, -z)).real,
    "polar": lambda z: torch.polar(z, z).imag,
    # of the inputs alone
    "times a function of constants": lambda z: z * torch.relu(torch.arange(-2, 4).to(z)).abs().sqrt(),
}
