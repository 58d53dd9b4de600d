"""Compiled loops: numba, with what it compiled kept on disk where there is a place for it.

Compiled loops check no index. What they index by is either made here or has been checked where it
was read (`fusellm.store.layout`).
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(nogil: bool = False) -> Callable[[Function], Function]:
    """Compile a function when it is first called.

    What was compiled is kept beside the module, else in the user's cache. An installation that
    cannot be written to, run by somebody without a home, as containers are, has no place for it:
    each process then compiles anew, which takes seconds.

    Args:
        nogil: whether other threads may run meanwhile.
    """

    def decorate(function: Function) -> Function:
        try:
            made: Any = numba.njit(cache=True, nogil=nogil)(function)
        except RuntimeError:  # "cannot cache function": there is no place
            made = numba.njit(nogil=nogil)(function)
        loop: Function = made
        return loop

    return decorate
