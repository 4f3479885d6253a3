"""Layers that convert to a narrower type inside, and layers that only seem to; every one of the former also without its cast."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class RMSNorm(nn.Module):
    """As in LLaMA and T5: computed in float32 whatever the type."""

    def __init__(self, width, narrow=True):
        super().__init__()
        self.weight, self.narrow = nn.Parameter(torch.ones(width)), narrow

    def forward(self, x):
        wide = x.float() if self.narrow else x
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).type_as(x) * self.weight


class BackwardCast(torch.autograd.Function):
    """The identity, whose backward pass is in float32."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.float().to(gradient)


class ForwardCast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.to(torch.bfloat16).to(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@torch.library.custom_op("casting::hidden", mutates_args=())
def hidden(x: torch.Tensor) -> torch.Tensor:
    """Round inside an operator of its own, where nothing can be seen."""
    return x.clone().half().to(x)


def in_place(x):
    table = torch.zeros(x.shape)
    table[:, :4] = x[:, :4]
    return torch.cat([table[:, :4].to(x), x[:, 4:]], 1)


def grouped(x):
    padded = F.pad(x, (0, 16 - x.shape[1])).bfloat16()[None].contiguous()
    return torch._grouped_mm(padded, torch.eye(16, dtype=torch.bfloat16)[None].contiguous())[0, :, : x.shape[1]].to(x)


HALF = torch.ones(1, dtype=torch.half)  # a tensor of the module that is no buffer stays what it is

FORWARD = {  # the cast, in a layer that is called "cast", of 8 features; every one of them is the identity or tanh without it
    "float": lambda x: x.float().to(x),
    "bfloat16": lambda x: x.bfloat16().to(x),
    "type_as": lambda x: x.type_as(HALF).to(x),
    "float32 arithmetic": lambda x: x.float().tanh().to(x),
    "complex64": lambda x: x.to(torch.complex64).real.to(x),
    "fft": lambda x: torch.fft.irfft(torch.fft.rfft(x.float()), n=8).to(x),
    "autograd.Function": ForwardCast.apply,
    "checkpoint": lambda x: checkpoint(lambda z: z.float().to(z), x, use_reentrant=False),
    "func.grad": lambda x: torch.func.vmap(torch.func.grad(lambda z: z.float().square().sum() / 2))(x).to(x),
    "dtype of a sum": lambda x: x + 0 * x.sum(1, keepdim=True, dtype=torch.float32),
    "in place": in_place,
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 2.0**-6, 0, torch.qint32).dequantize().to(x),
    "reinterpreted bits": lambda x: (x.view(torch.int32) + 0).view(x.dtype),
}
if hasattr(torch, "_grouped_mm"):
    FORWARD["grouped product"] = grouped

OUTSIDE = {  # numbers that were computed outside of torch
    "NumPy": lambda x: torch.from_numpy(x.detach().numpy().astype(np.float32)).to(x),
    "NumPy in float64": lambda x: torch.from_numpy(np.tanh(x.detach().numpy())),
    "list": lambda x: torch.tensor(x.tolist()).to(x),
}

QUIET = {  # no value that depends on inputs or parameters is rounded to a narrower type
    "mask": lambda x: x * (x > 0).float(),
    "mean under a mask": lambda x: (x * (x > 0).float()) / (x > 0).float().sum(1, keepdim=True).clamp(min=1e-9),
    "one-hot rows": lambda x: x + F.one_hot((x.abs() * 3).long().clamp(max=7)[:, 0], 8).float(),
    "constant": lambda x: x * torch.tensor([0.1] * 8),
    "constant from NumPy": lambda x: x * torch.from_numpy(np.linspace(0, 1, 8, dtype=np.float32)),
    "number": lambda x: x * float(torch.tensor(0.1)),
    "table of positions": lambda x: x + torch.sin(torch.arange(8).float() * 0.3),
    "zeros of the same shape": lambda x: x + torch.zeros_like(x, dtype=torch.float32).add(0.1),
    "up": lambda x: x.double().to(x),
    "complex128": lambda x: torch.fft.fft(x).abs(),
    "autocast": lambda x: torch.autocast("cpu", torch.bfloat16)(torch.tanh)(x),
    "dropout in eval mode": lambda x: F.dropout(x, 0.5, training=False),
    "attention": lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0],
    "mask with the least float32": lambda x: x.masked_fill(x < -5, torch.finfo(torch.float32).min).softmax(1),
    "func.grad": lambda x: torch.func.vmap(torch.func.grad(lambda z: (z**3).sum()))(x),
}


class Layer(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def network(layer, inputs=4):
    """A small network with the layer in its middle."""
    torch.manual_seed(0)
    layers = {"first": nn.Linear(inputs, 8), "cast": layer, "tanh": nn.Tanh(), "head": nn.Linear(8, 2)}
    model = nn.Sequential()
    for name, each in layers.items():
        model.add_module(name, each)
    return model


def rms(x):
    """RMSNorm in float32, by NumPy."""
    narrow = np.asarray(x, np.float32)
    return narrow / np.sqrt((narrow**2).mean(-1, keepdims=True) + 1e-6)


def elsewhere(work):
    """Do the work in another thread, without gradients, and wait for it."""

    def run():
        with torch.no_grad():
            work()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()


def narrow_rms(x):
    wide = x.detach().float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def written_elsewhere(make):
    """RMSNorm in float32 that another thread writes into memory which ``make`` allocates."""

    def norm(x):
        out = make(x)
        elsewhere(lambda: out.copy_(narrow_rms(x)))
        return out + 0 * x

    return norm


def through_numpy(x):
    copy = x.detach().clone()
    array = copy.numpy()
    array[...] = rms(array)
    return copy + 0 * x


def through_an_array(x):
    copy = x.detach().clone()
    array = np.asarray(copy)
    array[...] = rms(array)
    return copy + 0 * x


def through_an_address(x):
    copy = x.detach().clone()
    number = ctypes.c_double if x.dtype == torch.float64 else ctypes.c_float
    array = np.ctypeslib.as_array((number * copy.numel()).from_address(copy.data_ptr())).reshape(copy.shape)
    array[...] = rms(array)
    return copy + 0 * x


def list_into_an_array(x):
    out = torch.zeros(x.shape, dtype=x.dtype)
    out.numpy()[...] = rms(x.tolist())
    return out + 0 * x


def one_number(x):
    return x / float(np.float32(x.detach().numpy()).max())


HIDDEN = {  # RMSNorm in float32 (or a number) that no operator shows
    "empty, in a thread": written_elsewhere(torch.empty_like),
    "new_empty, in a thread": written_elsewhere(lambda x: x.new_empty(x.shape)),
    "zeros, in a thread": written_elsewhere(torch.zeros_like),
    "a view of ones, in a thread": written_elsewhere(lambda x: torch.ones(2, *x.shape, dtype=x.dtype)[1]),
    "a copy, in a thread": written_elsewhere(torch.clone),
    "a result, in a thread": written_elsewhere(lambda x: 2 * x),
    "zeros that were written, in a thread": written_elsewhere(lambda x: torch.zeros_like(x).copy_(x)),
    "a detached copy, in a thread": written_elsewhere(lambda x: x.clone().detach()),
    "NumPy in place": through_numpy,
    "an array in place": through_an_array,
    "an address": through_an_address,
    "a list into an array": list_into_an_array,
    "one number": one_number,
}


def constant_table(x):
    table = torch.empty(8, dtype=x.dtype)
    table.numpy()[...] = np.linspace(0, 1, 8, dtype=np.float32)
    return x * table


def filled(x):
    table = torch.empty_like(x)
    table.fill_(0.5)
    zeros = x.new_zeros(x.shape)
    zeros[:, :4] = x[:, :4]
    later = x.detach().clone()
    later.mul_(2).add_(1).relu_()
    later[:, 0].zero_()
    torch.add(x.detach(), 1, out=later)
    return later + x * table + zeros + torch.zeros_like(x) + torch.full((8,), 0.3, dtype=x.dtype)


QUIET |= {"constant table through NumPy": constant_table, "buffers": filled}
