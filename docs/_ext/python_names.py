"""The reference of the public Python names, made from `fusellm.__all__` when the site is built.

It takes the place of the comment MARK in a page. Signatures and docstrings are autodoc's; types in
them that are public names lead to these, and pages that a docstring names, as docs/method.md, are
links.
"""

import inspect
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import fusellm

MARK = "<!-- generated: Python names -->"
NAMES = [name for name in fusellm.__all__ if not name.startswith("_")]
WITHOUT_MEMBERS = {"Recipe", "FusionTrainer"}  # recipe.md has the keys; Trainer's are its own


def page() -> str:
    """Markdown with autodoc's directives, in the order of the alphabet."""
    return "\n".join(_entry(name) for name in sorted(NAMES, key=str.lower))


def _entry(name: str) -> str:
    is_class = inspect.isclass(getattr(fusellm, name))
    kind = "autoclass" if is_class else "autofunction"
    lines = [f"## {name}", "", "```{eval-rst}", f".. {kind}:: fusellm.{name}"]
    if is_class and name not in WITHOUT_MEMBERS and not _is_error(name):
        lines.append("   :members:")
    return "\n".join([*lines, "```", ""])


def _is_error(name: str) -> bool:
    return issubclass(getattr(fusellm, name), BaseException)


def put(_: Sphinx, __: str, content: list[str]) -> None:
    if MARK in content[0]:
        content[0] = content[0].replace(MARK, page())


def link_pages(app: Sphinx, *told: Any) -> None:
    """docs/method.md in a docstring, as a link to that page."""
    lines: list[str] = told[-1]

    def link(match: re.Match[str]) -> str:
        name = match[1]
        return f":doc:`{name}`" if (Path(app.srcdir) / f"{name}.md").is_file() else match[0]

    lines[:] = [re.sub(r"`?docs/([\w-]+)\.md`?", link, line) for line in lines]


def find_public(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, text: nodes.TextElement
) -> nodes.Element | None:
    """A public name that is spelled with the module where it is written, or with none."""
    name = node.get("reftarget", "").rpartition(".")[2]
    if node.get("refdomain") != "py" or name not in NAMES:
        return None
    domain = env.get_domain("py")
    target = f"fusellm.{name}"
    entry = domain.objects.get(target)
    if entry is None or not app.builder.get_relative_uri:
        return None
    place = f"{app.builder.get_relative_uri(node['refdoc'], entry.docname)}#{entry.node_id}"
    return nodes.reference("", "", text, internal=True, refuri=place)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", put)
    app.connect("autodoc-process-docstring", link_pages)
    app.connect("missing-reference", find_public)
    return {"parallel_read_safe": True, "version": "1"}
