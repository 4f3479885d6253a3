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
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "_site.navigation",
    "_site.mathematics",
    "_site.docstrings",
    "_site.reference",
    "_site.literals",
]
root_doc = "README"  # GitHub shows it for the folder; the site has it as index.html, too
source_suffix = {".md": "markdown"}
exclude_patterns = ["_*"]

myst_enable_extensions = ["dollarmath"]
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
