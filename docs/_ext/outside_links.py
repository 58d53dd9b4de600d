"""Links from pages to files outside docs/: to the repository, or as downloads.

On GitHub `[loss](../src/fusellm/training/loss.py)` works as it is. On the site it leads to the
file in the repository, if `repository` in conf.py names one; else a file is a download and a folder
is shown as its name. README.md, CONTRIBUTING.md and CHANGELOG.md are pages of the site. A link to
what is not there is a warning.
"""

import os
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

PAGES = {"README.md": "index", "CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog"}


def resolve(app: Sphinx, doctree: nodes.document) -> None:
    root = Path(app.srcdir).parent
    links = [*doctree.findall(addnodes.download_reference), *doctree.findall(addnodes.pending_xref)]
    for link in links:
        if link.get("reftype") != "myst":
            continue
        target, _, anchor = link["reftarget"].partition("#")
        if link.get("refdomain") == "doc":  # Markdown; what is outside has its whole path
            path = Path(f"{target}.md") if Path(target).is_absolute() else Path(app.srcdir)
        else:
            _, written = app.env.relfn2path(target, link["refdoc"])
            path = Path(os.path.normpath(written))
        if not target or path.is_relative_to(app.srcdir) or not path.is_relative_to(root):
            continue
        where = path.relative_to(root).as_posix()
        if where in PAGES:
            link.replace_self(_to_page(link, PAGES[where], anchor))
        elif path.exists() and app.config.repository:
            address = f"{app.config.repository.rstrip('/')}/{where}"
            link.replace_self(nodes.reference("", "", *link.children, refuri=address))
        elif path.is_dir():
            link.replace_self(nodes.inline("", "", *link.children))


def _to_page(link: nodes.Element, page: str, anchor: str) -> addnodes.pending_xref:
    return addnodes.pending_xref(
        "",
        *link.children,
        refdomain="doc",
        reftype="myst",
        reftarget=page,
        reftargetid=anchor or None,
        refdoc=link["refdoc"],
        refexplicit=True,
    )


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("repository", "", "env", types=[str])
    app.connect("doctree-read", resolve, priority=400)  # before downloads are collected
    return {"parallel_read_safe": True, "version": "1"}
