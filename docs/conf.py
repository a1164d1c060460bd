"""The configuration of Sphinx: make docs."""

from sanic_db_bp import __version__

project = "sanic-db-bp"
author = "the sanic-db-bp authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"

html_theme = "furo"
html_title = f"sanic-db-bp {version}"
html_copy_source = False
