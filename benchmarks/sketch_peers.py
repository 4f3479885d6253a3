"""`traker` and `dattri` as `sketch.py` measures them: the same gradients, projected and written to a folder on the CPU."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

Batches = list[tuple[Tensor, Tensor]]
LossFn = Callable[[Tensor, Tensor], Tensor]
Found = tuple[float, Tensor, int]  # seconds, the kernel of the first samples, and bytes of one sample


def available() -> list[str]:
    """Return the names of the libraries that this Python has."""
    return [name for name, module in (("traker", "trak"), ("dattri", "dattri")) if find_spec(module) is not None]


def by_traker(model: nn.Module, batches: Batches, loss_fn: LossFn, size: int, folder: Path, compared: int) -> Found:
    """Featurize by TRAK: gradients by ``torch.func.vmap``, then one projection of all parameters by its ``BasicProjector``.

    On a GPU it has a projector of its own in CUDA, which a CPU cannot run.
    """
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput

    class Loss(AbstractModelOutput):
        """The gradient of the loss itself, so that all libraries project the same vectors."""

        def __init__(self) -> None: ...

        @staticmethod
        def get_output(network: nn.Module, weights: Any, buffers: Any, inputs: Tensor, targets: Tensor) -> Tensor:
            outputs = functional_call(network, (weights, buffers), (inputs[None],))
            return loss_fn(outputs, targets[None])

        def get_out_to_loss_grad(self, network: nn.Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
            return torch.ones(len(batch[0]), 1)

    samples = sum(len(inputs) for inputs, _ in batches)
    tracer = TRAKer(
        model=model,
        task=Loss(),
        train_set_size=samples,
        save_dir=str(folder),
        device="cpu",
        proj_dim=size,
        use_half_precision=False,
        logging_level=logging.ERROR,
    )
    tracer.load_checkpoint(model.state_dict(), model_id=0)
    start = time.perf_counter()
    for inputs, targets in batches:
        tracer.featurize(batch=(inputs, targets), num_samples=len(inputs))
    seconds = time.perf_counter() - start
    stored = tracer.saver.current_store["grads"]
    rows = torch.as_tensor(stored[:compared].copy()).double()
    kernel = rows @ rows.T * float(tracer.normalize_factor) ** 2 / size
    return seconds, kernel, stored.shape[1] * stored.dtype.itemsize


class Batched(nn.Module):
    """A network that takes a sample without the dimension of the samples, as dattri passes one when it sets up its projections."""

    def __init__(self, network: nn.Module, dimensions: int) -> None:
        super().__init__()
        self.network, self.dimensions = network, dimensions

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of a batch, or of one sample as a batch."""
        return self.network(x if x.ndim == self.dimensions else x[None])


def covered(model: nn.Module) -> list[str]:
    """Return the parameters of the linear layers, which are those that ``by_dattri`` projects."""
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    return [name for name, _ in model.named_parameters() if name.rpartition(".")[0] in linear]


def by_dattri(model: nn.Module, batches: Batches, loss_fn: LossFn, size: int, folder: Path, compared: int) -> Found:
    """Cache by dattri's LoGra: one pair of normal projections for each linear layer, of ``size`` numbers; other layers are left out."""
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.task import AttributionTask

    def loss(network: nn.Module, batch: Any, device: Any) -> Tensor:
        del device
        # A mean: dattri multiplies by the number of samples, so that each has the gradient of its own loss.
        return loss_fn(network(batch[0]), batch[1])

    inputs, targets = (torch.cat(each) for each in zip(*batches, strict=True))
    at_once = len(batches[0][0])

    network = Batched(model, inputs.ndim)

    place = folder / "dattri"
    place.mkdir()
    task = AttributionTask(loss_func=loss, model=network, checkpoints=[network.state_dict()])
    attributor = LoGraAttributor(task, hessian="Identity", proj_dim=size, offload="cpu", cache_dir=str(place))
    start = time.perf_counter()
    attributor.cache(DataLoader(TensorDataset(inputs, targets), at_once))
    seconds = time.perf_counter() - start
    # It keeps them in memory here: its way to the disk asks for a GPU.
    kept = attributor.offload_manager.cached_gradients
    rows = torch.cat([kept[number] for number in sorted(kept)])
    few = rows[:compared].double()
    return seconds, few @ few.T, rows.shape[1] * rows.element_size()
