"""A command as one of several processes: who speaks, and how they part."""

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from fusellm.cli.console import STDERR
from fusellm.errors import RecipeError
from fusellm.training.launch import MEETING, launched

_GRACE_SECONDS = 3.0


def require_one_process(command: str) -> None:
    """Refuse a launcher's processes for a command that is the work of one.

    Raises:
        RecipeError: there are several.
    """
    if launched() > 1:
        raise RecipeError(
            f"{launched()} processes were started, and `fusellm {command}` is the work of one: "
            "launch `fusellm train` alone, or use `fusellm run --nproc N`"
        )


@contextmanager
def parting() -> Iterator[None]:
    """Part from the other processes of a training, if there are any, at a command's end.

    After a failure at once: the others wait for this one, and so would a parting in good order.
    """
    try:
        yield
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if launched() > 1 and code:
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)
        _leave()
        raise
    _leave()


def _leave() -> None:
    if launched() > 1 and "torch.distributed" in sys.modules:
        from fusellm.training.processes import leave

        leave()


def tell(what: str) -> None:
    """Say what was wrong, once, and in one line.

    Where a launcher started several processes, the first one speaks. The launcher ends the others
    when one fails, and who is there still after a while has something of its own to say.
    """
    if not speaks():
        time.sleep(_GRACE_SECONDS)
        STDERR.say(f"fusellm (process {os.environ['RANK']}): {what}")
        return
    STDERR.say(f"fusellm: {what}")


def tell_stopped() -> None:
    """Say once, after Ctrl-C and its like, that nothing is lost."""
    if "RANK" not in os.environ or (speaks() and MEETING not in os.environ):
        STDERR.say("stopped; the same command goes on from here")


def speaks() -> bool:
    """Whether this process is the one that speaks."""
    return launched() == 1 or os.environ.get("RANK", "0") == "0"
