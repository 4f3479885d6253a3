"""The notebooks are run without a word of the machinery: only what is wrong with a page is a warning of the build."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

SETTINGS = """c = get_config()
c.IPKernelApp.log_level = 40  # it warns that it talks to the build over TCP, within one machine
c.HistoryManager.enabled = False
"""


def silence(app: Sphinx) -> None:
    """Give the kernel a profile of its own below the folder of the build, and let its client report errors only."""
    place = Path(app.outdir).parent / "ipython"
    profile = place / "profile_default"
    profile.mkdir(parents=True, exist_ok=True)
    (profile / "ipython_kernel_config.py").write_text(SETTINGS, "utf-8")
    os.environ["IPYTHONDIR"] = str(place)
    logging.getLogger("traitlets").setLevel(logging.ERROR)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the step with Sphinx."""
    app.connect("builder-inited", silence)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
