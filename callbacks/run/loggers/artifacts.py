"""What loggers take beside scalars: figures, texts and files, each logger in its own way.

====================  ==============================================  =================================================
logger                figures and texts                               files
====================  ==============================================  =================================================
TensorBoard           images and texts, by step                       in its folder
Weights & Biases      media and tables, by step                       files of the run; the page and the picture as media
MLflow                artifacts in ``convergence``, the last of each  artifacts in ``convergence``
Comet                 figures by step; assets, the last of each       assets in ``convergence``
CSV                   files in ``figures`` and ``texts`` beside the   in its folder
                      table, the last of each
====================  ==============================================  =================================================

Whatever else is a logger gets scalars alone.
"""

from __future__ import annotations

import io
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from typing_extensions import override

from lightning_conv.callbacks.run.loggers.folder import log_dir_of
from lightning_conv.callbacks.run.loggers.names import path_of
from lightning_conv.reporting.page.html_parts import run_figure
from lightning_conv.reporting.page.run_record import RunRecord

FOLDER = "convergence"
"""Of our artifacts in a store that has one list of files for each run."""


class Artifacts(ABC):
    """A logger as the receiver of figures, texts and files; on rank zero only.

    Args:
        logger: The logger.
    """

    wants_picture = True
    """Whether it has a place for the picture of the run."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    @abstractmethod
    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Keep a figure under a tag."""

    @abstractmethod
    def text(self, tag: str, text: str, step: int) -> None:
        """Keep Markdown under a tag."""

    def files(self, files: Mapping[str, Path], step: int) -> None:
        """Keep files, by what they are. By default they are copied into the logger's folder, if it has one and they are not there."""
        folder = log_dir_of(self.logger)
        for path in files.values():
            if folder is not None and path.parent.resolve() != folder.resolve():
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / path.name)


class OfTensorBoard(Artifacts):
    """Images and texts in the tabs of these names."""

    wants_picture = False

    @override
    def figure(self, tag: str, figure: Figure, step: int) -> None:
        self.logger.experiment.add_figure(tag, figure, global_step=step, close=False)

    @override
    def text(self, tag: str, text: str, step: int) -> None:
        self.logger.experiment.add_text(tag, text, global_step=step)


class OfWandb(Artifacts):
    """Media and tables in the run's history; files among its files, and the page and the picture as media, too."""

    @override
    def figure(self, tag: str, figure: Figure, step: int) -> None:
        self._image(tag, io.BytesIO(png_of(figure)), step)

    @override
    def text(self, tag: str, text: str, step: int) -> None:
        self.logger.log_text(tag, columns=["step", "text"], data=[[step, text]], step=step)

    @override
    def files(self, files: Mapping[str, Path], step: int) -> None:
        import wandb

        for path in files.values():
            self.logger.experiment.save(str(path), base_path=str(path.parent), policy="now", glob=False)
        if "page" in files:
            page = wandb.Html(files["page"].read_text("utf-8"), inject=False, data_is_not_path=True)
            self.logger.log_metrics({f"{FOLDER}/page": page}, step)
        if "picture" in files:
            self._image(f"{FOLDER}/picture", files["picture"], step)

    def _image(self, tag: str, file: Path | io.BytesIO, step: int) -> None:
        from PIL import Image

        with Image.open(file) as picture:
            self.logger.log_image(tag, [picture], step=step)


class OfMLflow(Artifacts):
    """Artifacts of the run; one of the same name replaces an earlier one."""

    @override
    def figure(self, tag: str, figure: Figure, step: int) -> None:
        self.logger.experiment.log_figure(self.logger.run_id, figure, f"{FOLDER}/figures/{path_of(tag)}.png")

    @override
    def text(self, tag: str, text: str, step: int) -> None:
        self.logger.experiment.log_text(self.logger.run_id, _at(text, step), f"{FOLDER}/texts/{path_of(tag)}.md")

    @override
    def files(self, files: Mapping[str, Path], step: int) -> None:
        for path in files.values():
            self.logger.experiment.log_artifact(self.logger.run_id, str(path), FOLDER)


class OfComet(Artifacts):
    """Figures by step; texts and files as assets, of which one of the same name replaces an earlier one."""

    @override
    def figure(self, tag: str, figure: Figure, step: int) -> None:
        self.logger.experiment.log_figure(figure_name=tag, figure=figure, step=step)

    @override
    def text(self, tag: str, text: str, step: int) -> None:
        self._asset(io.StringIO(_at(text, step)), f"texts/{path_of(tag)}.md", step)

    @override
    def files(self, files: Mapping[str, Path], step: int) -> None:
        for path in files.values():
            self._asset(str(path), path.name, step)

    def _asset(self, content: Any, name: str, step: int) -> None:
        self.logger.experiment.log_asset(content, file_name=f"{FOLDER}/{name}", overwrite=True, step=step)


class OfCSV(Artifacts):
    """Files beside ``metrics.csv``; one of the same name replaces an earlier one."""

    @override
    def figure(self, tag: str, figure: Figure, step: int) -> None:
        self._write(f"figures/{path_of(tag)}.png", png_of(figure))

    @override
    def text(self, tag: str, text: str, step: int) -> None:
        self._write(f"texts/{path_of(tag)}.md", _at(text, step).encode("utf-8"))

    def _write(self, name: str, content: bytes) -> None:
        if (folder := log_dir_of(self.logger)) is None:
            return  # its table is not on this machine
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


KINDS: dict[type[Logger], type[Artifacts]] = {
    TensorBoardLogger: OfTensorBoard,
    WandbLogger: OfWandb,
    MLFlowLogger: OfMLflow,
    CometLogger: OfComet,
    CSVLogger: OfCSV,
}
"""The loggers that take more than scalars, their subclasses included."""


def artifacts_of(logger: Logger) -> Artifacts | None:
    """Return a logger as a receiver of artifacts; None: it takes scalars alone.

    Args:
        logger: A logger of the trainer.
    """
    return next((made(logger) for kind, made in KINDS.items() if isinstance(logger, kind)), None)


def png_of(figure: Figure, background: str = "auto") -> bytes:
    """Return a figure as a PNG file.

    Args:
        figure: The figure.
        background: Its colour; ``"auto"``: that of the figure.
    """
    with io.BytesIO() as file:
        figure.savefig(file, format="png", facecolor=background)
        return file.getvalue()


def picture_of(run: RunRecord, optimizer: str = "") -> bytes:
    """Return the figure of a run as a PNG file with a white background.

    Args:
        run: The run.
        optimizer: Name of the optimizer whose network is meant, in a run with several.
    """
    return png_of(run_figure(run, optimizer), background="white")


def _at(text: str, step: int) -> str:
    """Return a text behind the step at which it was written."""
    return f"*Step {step}*\n\n{text}\n"
