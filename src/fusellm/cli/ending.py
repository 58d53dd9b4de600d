"""How a command ends: with one line that says what was wrong, and a code that says its kind."""

import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

from fusellm.cli.launch import tell, tell_stopped
from fusellm.errors import FusellmError

EXIT_CODES = (
    "Exit codes: 0 done; 1 something that you can mend, said in one line; 2 the command line is "
    "wrong; 70 an error that nobody has foreseen; 129, 130, 143 stopped by SIGHUP, Ctrl-C, SIGTERM "
    "(the same command goes on)."
)
_MENDABLE, _UNFORESEEN = 1, 70
_STOPPED = {128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}
_PACKAGE = Path(__file__).parents[1]


def run(command: Callable[[], object], debug: bool) -> None:
    """Run a command and end with its exit code; the one place where errors become a line.

    Args:
        debug: show where an error came from instead.

    Raises:
        SystemExit: in the end, but where `debug` lets an error through.
    """
    came: list[int] = []
    try:
        with _ending_on_signals(came):
            command()
    except SystemExit as stop:
        if stop.code in _STOPPED:
            tell_stopped()
        raise
    except KeyboardInterrupt:
        tell_stopped()
        sys.exit(128 + signal.SIGINT)
    except Exception as error:  # whatever libraries raise
        if debug:
            raise
        if came:
            tell_stopped()
            sys.exit(128 + came[-1])
        tell(line_of(error))
        sys.exit(_MENDABLE if isinstance(error, FusellmError | OSError) else _UNFORESEEN)


def line_of(error: Exception) -> str:
    """What was wrong, in one line: the value, the place, and what to do."""
    said = " ".join(str(error).split())
    if isinstance(error, FusellmError):
        return said
    place = _place(error.__traceback__)
    if isinstance(error, OSError):
        what = f"{error.filename}: {error.strerror}" if error.filename else said
        return f"{what} ({place}); check the path, its rights and the disk, or see --debug"
    if isinstance(error, MemoryError):
        return f"memory ran out ({place}); {said or 'use smaller batches, or a larger machine'}"
    return (
        f"unforeseen {type(error).__name__} ({place}): {said or 'it says no more'}. Finished work "
        "is kept. --debug shows where it comes from; if no setting of yours explains it, it is a "
        "fault of fusellm"
    )


def _place(traceback: TracebackType | None) -> str:
    """The last line of fusellm that an error passed."""
    place = "fusellm"
    while traceback is not None:
        file = Path(traceback.tb_frame.f_code.co_filename)
        if file.is_relative_to(_PACKAGE):
            place = f"{file.relative_to(_PACKAGE.parent)}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return place


@contextmanager
def _ending_on_signals(came: list[int]) -> Iterator[None]:
    """Have SIGTERM and SIGHUP end a command in good order, as Ctrl-C does.

    What ignores a signal goes on ignoring it, as under nohup.

    Args:
        came: gets each signal that ended the command. What is raised to end it may not arrive: a
            lock that is left halfway, or a context manager of torch, raises an error of its own.
    """

    def end(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            _leave_terminal()
        raise SystemExit(128 + number)

    usual: dict[int, signal._HANDLER] = {
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
    }
    here = [number for number, handler in usual.items() if signal.getsignal(number) == handler]
    unraisable = sys.unraisablehook

    def say(what: "sys.UnraisableHookArgs") -> None:
        if not came:  # what a signal has left half made, such as a bar, is not told when it goes
            unraisable(what)

    sys.unraisablehook = say
    for number in here:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in here:
            signal.signal(number, usual[number])
        if not came:
            sys.unraisablehook = unraisable


def _leave_terminal() -> None:
    """Write to nowhere in place of a terminal that is gone, where each write would be an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode):
            os.dup2(nowhere, stream)
    os.close(nowhere)


def quiet_wanted(arguments: list[str]) -> bool:
    """Whether bars and messages are to be left out; takes `--quiet` and `-q` out."""
    asked = any(argument in ("--quiet", "-q") for argument in arguments)
    arguments[:] = [argument for argument in arguments if argument not in ("--quiet", "-q")]
    return asked or bool(os.environ.get("FUSELLM_QUIET"))


def debug_wanted(arguments: list[str]) -> bool:
    """Whether errors are to be shown with where they came from; takes `--debug` out."""
    asked = "--debug" in arguments
    arguments[:] = [argument for argument in arguments if argument != "--debug"]
    return asked or bool(os.environ.get("FUSELLM_DEBUG"))
