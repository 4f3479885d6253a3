"""Jacobians and kernels, slow and dense; the test files import them."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def train_mode(model):
    """A copy that trains, but for dropout."""
    twin = copy.deepcopy(model).double().train()
    for module in twin.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return twin


def train_mode_rows(model, inputs):
    """J by one autograd.grad for each output of each sample, in train mode over the whole batch."""
    twin = train_mode(model)
    parameters = [p for p in twin.parameters() if p.requires_grad]
    rows = []
    for output in twin(inputs.double()).flatten():
        found = torch.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
            )
        )
    return torch.stack(rows)


def _one(inputs, i):
    if isinstance(inputs, Tensor):
        return inputs[i : i + 1]
    if isinstance(inputs, Mapping):
        return {key: value[i : i + 1] for key, value in inputs.items()}
    return tuple(value[i : i + 1] for value in inputs)


def _double(inputs):
    if isinstance(inputs, Tensor):
        return inputs.double() if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping):
        return {key: _double(value) for key, value in inputs.items()}
    return tuple(_double(value) for value in inputs)


def _call(model, inputs):
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def naive_gradients(model, inputs):
    """Gradients of every output of every sample, one autograd.grad each: [sample][output][parameter], in float64."""
    model = copy.deepcopy(model).double().eval()
    inputs = _double(inputs)
    parameters = [p for p in model.parameters() if p.requires_grad]
    first = (
        inputs if isinstance(inputs, Tensor) else next(iter(inputs.values() if isinstance(inputs, Mapping) else inputs))
    )
    samples = []
    # The fused path of nn.TransformerEncoder has no derivative at all in eval mode.
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for i in range(len(first)):
        outputs = _call(model, _one(inputs, i)).flatten()
        lines = []
        for output in outputs:
            found = torch.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
            lines.append([torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)])
        samples.append(lines)
    torch.backends.mha.set_fastpath_enabled(fastpath)
    return samples


def naive_gram(model, inputs, outputs="full"):
    """The kernel as a double loop over rows, inner products parameter by parameter."""
    gradients = naive_gradients(model, inputs)
    rows = [line for sample in gradients for line in sample]
    full = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for i, left in enumerate(rows):
        for j, right in enumerate(rows[: i + 1]):
            full[i, j] = full[j, i] = sum(float(a.flatten() @ b.flatten()) for a, b in zip(left, right, strict=True))
    return reduced(full, len(gradients), outputs)


def naive_jacobian(model, inputs):
    """Rows of the Jacobian, (n C, P)."""
    gradients = naive_gradients(model, inputs)
    return torch.stack([torch.cat([g.flatten() for g in line]) for sample in gradients for line in sample])


def contracted_rows(model, inputs, cotangents):
    """The gradient of sum_c s_ic u_ic for each sample i, one autograd.grad each over a batch of one, (n, P), in float64."""
    model = copy.deepcopy(model).double().eval()
    inputs, rows = _double(inputs), []
    parameters = [p for p in model.parameters() if p.requires_grad]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for i, cotangent in enumerate(cotangents.double()):
        number = (_call(model, _one(inputs, i)).flatten() * cotangent.flatten()).sum()
        found = torch.autograd.grad(number, parameters, allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)])
    torch.backends.mha.set_fastpath_enabled(fastpath)
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def contracted_gram(model, inputs, cotangents):
    """The kernel s_i^T K_ij s_j as a double loop over ``contracted_rows``."""
    rows = contracted_rows(model, inputs, cotangents)
    return torch.stack([torch.stack([left @ right for right in rows]) for left in rows])


def reduced(full, samples, outputs):
    """The kernel that ``outputs`` asks for, of the full one, (n C, n C)."""
    blocks = full.reshape(samples, -1, samples, full.shape[0] // samples)
    return {"full": full, "trace": blocks.diagonal(dim1=1, dim2=3).sum(-1), "sum": blocks.sum((1, 3))}[outputs]


def reduced_rows(rows, samples, outputs):
    """The same of the rows of J, (n C, P)."""
    return reduced(rows @ rows.T, samples, outputs)


def assert_same(found, expected, tolerance=1e-9):
    """Each entry, to this share of the largest one."""
    assert found.shape == expected.shape
    assert found.dtype == torch.float64
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())
