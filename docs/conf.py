"""Configuration of the documentation site; `make docs` builds it in `build/site`, without a network and with warnings as errors."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from lightning_conv import __version__  # noqa: E402 - found only with the path above

project = "lightning_conv"
author = "The lightning_conv authors"
copyright = author
release = version = __version__

extensions = [
    "myst_nb",  # MyST, and the notebooks: pages whose code is run
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "_site.notebooks",
    "_site.navigation",
    "_site.mathematics",
    "_site.docstrings",
    "_site.reference",
    "_site.literals",
]
root_doc = "README"  # GitHub shows it for the folder; the site has it as index.html, too
source_suffix = {".md": "myst-nb"}  # a page without cells is plain MyST
exclude_patterns = ["_*"]

myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "cache"  # a notebook runs again when one of its cells has changed, or after `make clean`
nb_execution_cache_path = str(HERE.parent / "build" / "notebooks")
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_output_stderr = "remove"  # what a trainer reports on its way
nb_execution_in_temp = True
nb_merge_streams = True

myst_heading_anchors = 4  # the anchors that GitHub gives to headings, so that links work in both places

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "lightning_conv"
html_math_renderer = "mathml"
html_static_path = ["_site/static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = False
html_use_index = True
