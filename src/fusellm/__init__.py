"""Fuse the knowledge of several language models into one.

`open_store` reads a source's distributions from a program; everything else is the command line's.
Names are imported when they are first asked for, so that `import fusellm` costs nothing.
"""

import importlib
from typing import Any

_FROM = {
    "Distribution": "fusellm.store.opened",
    "DistributionStore": "fusellm.store.opened",
    "StoreFacts": "fusellm.store.facts",
    "StoredBlock": "fusellm.store.opened",
    "open_store": "fusellm.store.opened",
}
__all__ = list(_FROM)  # as in __init__.pyi, which type checkers read


def __getattr__(name: str) -> Any:
    if name in _FROM:
        return getattr(importlib.import_module(_FROM[name]), name)
    raise AttributeError(f"module 'fusellm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
