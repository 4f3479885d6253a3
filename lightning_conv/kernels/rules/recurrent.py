"""Recurrent layers unrolled into the linear layers that they consist of, one step after the other.

torch runs LSTM, GRU and plain recurrent layers inside one function, which hides their linear layers. When they are
written out, each weight belongs to a linear layer that is called once per step, so the rule of linear layers covers it,
its bias and its projection.

Source: the equations in the documentation of ``torch.nn.LSTM``, ``GRU`` and ``RNN``; projections after Sak et al. 2014.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

State: TypeAlias = tuple[Tensor, ...]  # (h,) or, of an LSTM, (h, c)
Step: TypeAlias = Callable[[Tensor, Tensor, State], State]  # (W_ih x + b_ih, W_hh h + b_hh, state) -> state


def lstm_step(from_input: Tensor, from_state: Tensor, state: State) -> State:
    """Return c' = f c + i g and h' = o tanh(c') for the gates (i, f, g, o)."""
    i, f, g, o = (from_input + from_state).chunk(4, -1)
    cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def gru_step(from_input: Tensor, from_state: Tensor, state: State) -> State:
    """Return h' = (1 - z) n + z h, where the reset gate r acts on the part of n that comes from the state."""
    (r, z, new), (state_r, state_z, state_new) = from_input.chunk(3, -1), from_state.chunk(3, -1)
    kept = torch.sigmoid(z + state_z)
    proposed = torch.tanh(new + torch.sigmoid(r + state_r) * state_new)
    return (proposed + kept * (state[0] - proposed),)


def plain_step(
    from_input: Tensor, from_state: Tensor, state: State, *, activation: Callable[[Tensor], Tensor]
) -> State:
    """Return h' = activation(W_ih x + b_ih + W_hh h + b_hh)."""
    del state
    return (activation(from_input + from_state),)


def unrolled(
    step: Step,
    input: Tensor,  # torch's own names: they may be passed by keyword
    hx: Tensor | Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: Any,
    num_layers: Any,
    dropout: Any = None,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
) -> Any:
    """Compute what ``torch.lstm`` and its relatives return; NotImplemented for packed sequences and active dropout."""
    # With packed sequences the batch sizes are the second argument, so that ``has_biases`` is not a bool here.
    if not isinstance(has_biases, bool) or (train and dropout):
        return NotImplemented
    state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    values = input.transpose(0, 1) if batch_first else input  # (T, n, features)
    directions = 2 if bidirectional else 1
    weights = list(_by_layer(params, num_layers * directions))
    last: list[State] = []
    for layer in range(num_layers):
        found = []
        for direction in range(directions):
            index = layer * directions + direction
            begin = tuple(part[index] for part in state)
            steps, end = _run(step, values, begin, weights[index], has_biases, backwards=direction == 1)
            found.append(steps)
            last.append(end)
        values = torch.cat(found, -1) if directions == 2 else found[0]
    states = [torch.stack([end[part] for end in last]) for part in range(len(state))]
    return (values.transpose(0, 1) if batch_first else values, *states)


def _by_layer(params: Sequence[Tensor], count: int) -> Iterator[Sequence[Tensor]]:
    each = len(params) // count
    for start in range(0, len(params), each):
        yield params[start : start + each]


def _run(
    step: Step, values: Tensor, state: State, weights: Sequence[Tensor], has_biases: bool, *, backwards: bool
) -> tuple[Tensor, State]:
    """Run one layer in one direction, and return its outputs in the order of the input, and the final state."""
    to_gates, recurrent = weights[:2]
    bias_input, bias_state = weights[2:4] if has_biases else (None, None)
    projection = weights[-1] if len(weights) in (3, 5) else None
    from_inputs = F.linear(values, to_gates, bias_input).unbind(0)  # all steps in one product
    outputs = []
    for from_input in reversed(from_inputs) if backwards else from_inputs:
        state = step(from_input, F.linear(state[0], recurrent, bias_state), state)
        if projection is not None:
            state = (F.linear(state[0], projection), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


def unrolled_cell(
    step: Step,
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Any:
    """Compute a single step, as ``torch.lstm_cell`` and its relatives do."""
    state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    found = step(F.linear(input, w_ih, b_ih), F.linear(state[0], w_hh, b_hh), state)
    return found if len(found) > 1 else found[0]


_STEPS: dict[str, Step] = {
    "lstm": lstm_step,
    "gru": gru_step,
    "rnn_tanh": partial(plain_step, activation=torch.tanh),
    "rnn_relu": partial(plain_step, activation=torch.relu),
}

UNROLLED: dict[Callable[..., Any], Callable[..., Any]] = {
    **{getattr(torch, name): partial(unrolled, step) for name, step in _STEPS.items()},
    **{getattr(torch, f"{name}_cell"): partial(unrolled_cell, step) for name, step in _STEPS.items()},
}
"""Functions of torch, and functions that unroll them; a result of NotImplemented means that the call is not covered."""
