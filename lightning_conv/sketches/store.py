"""``SketchStore``: random projections of per-sample gradients on disk, for training sets of any length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from lightning_conv.arguments import require_option
from lightning_conv.kernels.planning.request import EngineName
from lightning_conv.losses.kind import loss_kind
from lightning_conv.losses.per_sample import require_loss
from lightning_conv.networks.supported import require_module
from lightning_conv.reporting.progress import Report, require_report
from lightning_conv.sketches.batches import Split, split_batch
from lightning_conv.sketches.collecting import collect
from lightning_conv.sketches.digests import digest_of_weights
from lightning_conv.sketches.estimates import Sketches, decoded
from lightning_conv.sketches.folder import META, Checkpoint, require_name
from lightning_conv.sketches.settings import Settings, Stored, require_settings
from lightning_conv.sketches.sketcher import Sketcher, blocks_of, evaluated
from lightning_conv.sketches.stored import StoredSketches
from lightning_conv.sketches.writer import Writer


class SketchStore(StoredSketches):
    r"""Sketches of the gradients of single samples, on disk: kernels, influences and drift of sets that fit no memory.

    The gradient of the loss of sample i by a weight is a matrix :math:`G_i = \sum_r b_r a_r^\top` of layer inputs a and output gradients
    b. Its sketch

    .. math:: S_i = P G_i Q^\top = \sum_r (P b_r) (Q a_r)^\top

    has p q numbers, and :math:`G_i` is never formed. P and Q have random signs over :math:`\sqrt p` and :math:`\sqrt q`, so that
    :math:`E \langle S_i, S_j \rangle = \langle G_i, G_j \rangle`. Each layer has G independent pairs; their mean is the estimate, and
    their spread its standard error. The standard error of an entry is at most ``relative_error`` times :math:`\sqrt{K_{ii} K_{jj}}`;
    see ``relative_variance`` in ``sketches.projections`` for the variance. A gradient that has no more than ``size`` numbers is
    stored as it is.

    Make a store by ``create`` or ``open``. Its folder contains ``meta.json`` with the settings, and one folder for each checkpoint with two
    ``.npy`` files: the sketches (n, K), each divided by a power of two, and the exponents (n,). The projections are not stored: they
    follow from the seed, and are the same on every machine.

    Source: Choe et al. 2024 (2405.13954), section 3, projections of both sides of a layer; Park et al. 2023 (2303.14186), random
    projections of gradients; Pruthi et al. 2020 (2002.08484), influence as a product of gradients.

    Attributes:
        folder: where it is.
        settings: what all of its sketches have in common.
    """

    def __init__(self, folder: Path, settings: Settings, loss_fn: object | None, split: Split | None) -> None:
        super().__init__(folder, settings)
        self._loss_fn, self._split = loss_fn, split

    @classmethod
    def create(
        cls,
        folder: str | Path,
        model: nn.Module,
        *,
        like: object,
        loss_fn: object | None = None,
        size: int = 1024,
        groups: int = 16,
        dtype: Stored = "float16",
        parameters: Sequence[str] | str | None = None,
        seed: int = 0,
        split: Split | None = None,
    ) -> SketchStore:
        r"""Create a store, or open the one that is there if it has the same settings.

        Args:
            folder: of the store.
            model: a module that returns one tensor with samples along dimension 0, each row depending on its own sample only.
            like: a batch as the loaders yield it, on which the network is read.
            loss_fn: the loss: one of torch's, or a function of (outputs, targets). The gradient of sample i is that of its own loss, as
                a batch of one; where the loss is a mean over n samples, it is n times the sample's share of the gradient of the mean. None:
                each group has the gradient of one random combination r^T u of the outputs u, with signs r, so that the kernel is
                an estimate of the trace kernel ``ntk_gram(..., outputs="trace")``.
            size: numbers of the sketch of one layer, all groups together. A layer with fewer parameters is stored as it is.
            groups: number G of independent pairs of projections. With a given ``size`` more groups are more accurate and take
                more time: the bound of the variance of a layer falls as 1 / sqrt(size G), the flops of its projections grow likewise.
            dtype: ``"float16"`` or ``"float32"``. Each sketch is scaled by a power of two, so neither large nor small gradients are lost.
            parameters: names or shell patterns, see ``ntk_gram``; None: all with ``requires_grad``.
            seed: of the projections.
            split: takes a batch apart into (inputs, targets); None: a batch is (inputs, targets), or inputs alone without ``loss_fn``.

        Returns:
            The store.

        Raises:
            ValueError: an option is outside its range; the folder has a store with other settings, or other files; samples couple.
            TypeError: an option has another type; the batch has another form; see ``ntk_gram`` for the model.

        Cost: a gradient of three samples in both precisions, and a few forward passes.

        Example:
            >>> import tempfile
            >>> import torch
            >>> model, batch = nn.Linear(3, 2), (torch.eye(3), torch.tensor([0, 1, 0]))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     store = SketchStore.create(folder, model, like=batch, loss_fn=nn.CrossEntropyLoss())
            ...     found = store.add(model, [batch], name="start")
            ...     print(found.samples, store.kernel(name="start").matrix.shape)
            3 torch.Size([3, 3])
        """
        require_settings(size, groups, dtype, seed)
        if loss_fn is not None:
            require_loss(loss_fn)
        inputs, _ = split_batch(like, split, targets=loss_fn is not None)
        names, shapes = blocks_of(model, inputs, parameters, "auto")
        made = Settings.make(names, shapes, size=size, groups=groups, dtype=dtype, seed=seed, loss_fn=loss_fn)
        place = Path(folder)
        if (place / META).is_file():
            there = Settings.read(place)
            if there != made:
                wrong = [each for each in vars(made) if getattr(made, each) != getattr(there, each)]
                raise ValueError(
                    f"folder: {place} has a store with another {', '.join(wrong)}; open it with SketchStore.open, or take another folder"
                )
        elif place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise ValueError(f"folder: {place} is not empty and has no store; take a new folder")
        else:
            made.write(place)
        return cls(place, made, loss_fn, split)

    @classmethod
    def open(cls, folder: str | Path, *, loss_fn: object | None = None, split: Split | None = None) -> SketchStore:
        """Open a store.

        Args:
            folder: of the store.
            loss_fn: the loss it was created with, if more gradients are to be sketched; a store does not contain it.
            split: see ``create``.

        Raises:
            ValueError: there is no store, its files were changed, or its loss is another.
        """
        settings = Settings.read(Path(folder))
        if loss_fn is not None and loss_kind(loss_fn).described != settings.loss:
            raise ValueError(f"loss_fn: {loss_kind(loss_fn).described}, but the store was created with {settings.loss}")
        store = cls(Path(folder), settings, loss_fn, split)
        for name in store.names:
            store.checkpoint(name)
        return store

    def add(
        self,
        model: nn.Module,
        loader: Iterable[object],
        *,
        name: str,
        engine: EngineName = "auto",
        progress: bool | Report | None = None,
    ) -> Checkpoint:
        """Sketch the gradients of all samples of a loader at the present weights of the model, and write them to disk.

        If an earlier call was interrupted, this one continues it: the batches that are done are read from the loader and compared, but
        not computed. The result is the same to the last bit. A checkpoint that is complete is returned as it is.

        Args:
            model: the model, in eval mode as far as this is concerned; it is the same to the last bit afterwards.
            loader: yields batches, always in the same order (``shuffle=False``); any iterable.
            name: of the checkpoint.
            engine: ``"auto"``, or ``"jacobian"``, which goes sample by sample; see ``ntk_gram``.
            progress: see ``ntk_gram``; it needs a loader with a length.

        Returns:
            The checkpoint.

        Raises:
            ValueError: the parameters are not those of the store; a checkpoint of this name has other weights, or another process
                writes it; the loader yields nothing, or not the batches of the interrupted call; an input or a gradient is not
                finite; samples couple.
            TypeError: a batch has another form.

        Cost: for each batch one forward and one backward pass (without ``loss_fn`` one backward for each group), and the projections:
            2 G (p out + q in + p q) flops for each layer and position. One block of samples is in memory at a time.
        """
        require_report(progress)
        require_option("engine", engine, ("auto", "jacobian"))
        self._require_model(model)
        weights, place = digest_of_weights(model), self.folder / require_name(name)
        if name in self.names:
            found = self.checkpoint(name)
            if found.weights != weights:
                raise ValueError(
                    f"name: {name!r} is complete, with other weights; take another name, or remove {place}"
                )
            return found
        if place.exists():
            raise ValueError(f"name: {name!r}: {place} is there and is no checkpoint; take another name, or remove it")
        writer = Writer(place, self.size, self.settings.kind, self.settings.identity, weights)
        try:
            collect(
                model,
                loader,
                writer,
                self.settings,
                loss_fn=self._loss_fn,
                split=self._split,
                engine=engine,
                progress=progress,
            )
            writer.finish()
        finally:
            writer.close()
        return self.checkpoint(name)

    def sketch(self, model: nn.Module, batch: object, *, engine: EngineName = "auto") -> Sketches:
        """Return the sketches of a batch in memory, such as queries for ``nearest``.

        Args:
            model: see ``add``; for queries at the weights of the checkpoint that they are compared with.
            batch: as a loader yields it.
            engine: see ``ntk_gram``.

        Raises:
            ValueError: see ``add``.
            TypeError: see ``add``.

        Cost: that of one batch in ``add``.
        """
        self._require_model(model)
        settings = self.settings
        inputs, targets = split_batch(batch, self._split, targets=settings.loss is not None)
        with evaluated(model, inputs) as module:
            sketcher = Sketcher(module, settings.layout, settings.seed, inputs, self._loss_fn, engine)
            rows, exponents = sketcher.sketch(inputs, targets)
        values = decoded(rows.numpy(), exponents.numpy())
        return Sketches(values, settings.layout, settings.identity, float(np.finfo(rows.numpy().dtype).eps) / 2)

    def _require_model(self, model: nn.Module) -> None:
        """Refuse a model with other parameters, and gradients of a loss that is not known.

        Raises:
            ValueError: it has.
        """
        require_module(model)
        if self.settings.loss is not None and self._loss_fn is None:
            raise ValueError(
                f"loss_fn: None; the store was created with {self.settings.loss}, so open it with SketchStore.open(folder, loss_fn=...)"
            )
        shapes = {name: real_shape(each) for name, each in model.named_parameters()}
        for name, shape in self.settings.shapes.items():
            if shapes.get(name) != shape:
                there = "is missing" if name not in shapes else f"has shape {shapes[name]}"
                raise ValueError(f"model: {name!r} {there}, in the store it has {shape}; pass the model of this store")


def real_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter; a complex one has a further dimension for real and imaginary parts."""
    return (*parameter.shape, 2) if parameter.is_complex() else tuple(parameter.shape)
