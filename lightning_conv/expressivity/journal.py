"""Journal of a long computation on disk, from which a killed computation can continue."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "progress.json"


class Journal:
    """Finished parts by stage, kept in a folder together with the identity of the task.

    Args:
        folder: folder of the journal; None: nothing is kept.
        identity: facts that identify the task. The journal of another task is discarded.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, dict(identity)
        self.stages: dict[str, Any] = {}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        try:
            stored = json.loads((folder / NAME).read_text())
        except (OSError, ValueError):
            return
        if isinstance(stored, dict) and stored.get("identity") == self.identity:
            self.stages = stored["stages"]

    def __getitem__(self, stage: str) -> Any:
        """Return the recorded value of a stage, or 0."""
        return self.stages.get(stage, 0)

    def __setitem__(self, stage: str, value: Any) -> None:
        """Record the value of a stage; the file is replaced atomically."""
        self.stages[stage] = value
        if self.folder is None:
            return
        new = self.folder / (NAME + ".new")
        new.write_text(json.dumps({"identity": self.identity, "stages": self.stages}))
        os.replace(new, self.folder / NAME)
