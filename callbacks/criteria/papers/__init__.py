"""One module or sub-package per paper: what it measures in a run, how it judges it, and what it logs and keeps.

Importing this package imports every module in it, so that adding a file is all it takes to add a paper. Nothing else imports them.
"""

from importlib import import_module
from pkgutil import iter_modules

for _paper in iter_modules(__path__):
    import_module(f"{__name__}.{_paper.name}")
