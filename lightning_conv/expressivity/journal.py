"""How far a long computation has come, on disk, so that a killed one goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "progress.json"


class Journal:
    """Numbers of finished parts by stage, kept in a folder together with what they were computed from.

    Args:
        folder: where; None: nowhere, nothing outlives the process.
        identity: of the task. A folder that holds another one's work is begun anew.
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
        """What was noted of a stage; 0 before anything was."""
        return self.stages.get(stage, 0)

    def __setitem__(self, stage: str, value: Any) -> None:
        """Note it; the file is replaced in one go."""
        self.stages[stage] = value
        if self.folder is None:
            return
        new = self.folder / (NAME + ".new")
        new.write_text(json.dumps({"identity": self.identity, "stages": self.stages}))
        os.replace(new, self.folder / NAME)
