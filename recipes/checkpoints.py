"""Whether a file is a checkpoint, before Lightning tries to load it."""

from pathlib import Path
from zipfile import is_zipfile

from lightning.fabric.utilities.exceptions import MisconfigurationException

PICKLED = b"\x80"
"""First byte of a file that torch wrote in its format of before version 1.6."""


def require_checkpoint(path: str | Path | None) -> None:
    """Refuse a file that torch cannot have written.

    Args:
        path: value of `--ckpt_path`; None, Lightning's words such as ``"last"``, folders and addresses are not looked at, and what is
            missing is reported by Lightning.

    Raises:
        MisconfigurationException: the file is of another kind.
    """
    if path is None or not Path(path).is_file():
        return
    with Path(path).open("rb") as file:
        first = file.read(1)
    if first != PICKLED and not is_zipfile(path):
        raise MisconfigurationException(
            f"--ckpt_path: {path} is no checkpoint; Lightning writes them as *.ckpt below runs/"
        )
