"""How Sphinx builds the site: `make docs`. Nothing is fetched while it builds."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "fusellm"
author = "the authors of fusellm"
project_copyright = "the authors of fusellm, Apache-2.0"
release = version = version_of("fusellm")

# Where the files of the project are read, such as https://HOST/OWNER/fusellm/blob/main. With it,
# links out of docs/ lead there. Without it, files are downloads of the site and folders are names.
repository = ""

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "command_line",
    "python_names",
    "outside_links",
]
exclude_patterns = ["_ext", "_static"]
source_suffix = {".md": "markdown"}

myst_heading_anchors = 4  # as GitHub names headings, for links such as method.md#translation
myst_links_external_new_tab = False
suppress_warnings: list[str] = []

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
default_role = "code"  # `name` in a docstring is code, as in Markdown
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
# Types of other packages and of fusellm's inside have no page here. Public names have one, and
# the extension python_names finds them under any of their addresses.
nitpick_ignore_regex = [("py:.*", r"(?!fusellm\.[A-Za-z_]+$).*")]

html_theme = "furo"
html_title = f"fusellm {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
