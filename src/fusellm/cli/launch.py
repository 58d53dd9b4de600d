"""Training on several processes: started here, or by accelerate and torchrun."""

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from fusellm.cli.console import STDERR
from fusellm.errors import RecipeError

_GRACE_SECONDS = 3.0
_PROCESSES_WITHOUT_GPU = 2  # may be tried on any machine
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_BY_US = "FUSELLM_MEETING"  # for the processes that --nproc starts: the file in which they meet


def launched() -> int:
    """How many processes a launcher started this command as; 1 without one."""
    told = os.environ.get("WORLD_SIZE", "")
    return max(1, int(told)) if told.isdigit() else 1


def require_joined() -> None:
    """Check that the processes of a launcher have found each other, which accelerate sees to.

    Raises:
        RecipeError: each would train alone.
    """
    from fusellm.training.processes import count

    if launched() > 1 and count() == 1:
        raise RecipeError(
            f"WORLD_SIZE says {launched()} processes, and this one is alone: start them by "
            "torchrun or accelerate launch, or unset WORLD_SIZE"
        )


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


def require_devices(count: int) -> None:
    """Check that there is a GPU for each process, or a core where there are none at all.

    Raises:
        RecipeError: there are fewer.
    """
    import torch

    if launched() > 1 and count > 1:
        raise RecipeError(
            f"--nproc {count} starts processes, and a launcher has started {launched()} already: "
            "leave one of them out"
        )
    if torch.accelerator.is_available():
        most, what = torch.accelerator.device_count(), "GPU(s)"
    else:  # each takes memory of its own
        most, what = max(os.cpu_count() or 1, _PROCESSES_WITHOUT_GPU), "core(s) and no GPU"
    if count > most:
        raise RecipeError(f"--nproc {count}: this machine has {most} {what}; give as many at most")


def train_on(count: int, run: Path, trusted: bool) -> None:
    """Train the models of a run on several processes of this machine, and wait for them.

    They meet in a file of a private folder, and listen on the loopback device alone: torchrun's
    stores would take pickles from whoever reaches their ports.

    Raises:
        SystemExit: one of them failed, and has said why; or this process was told to stop.
    """
    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes
    from torch.distributed.elastic.multiprocessing.api import SignalException

    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # of sources that this process has read
    command = ["-m", "fusellm", "train", str(run), *["--trust-remote-code"] * trusted]
    command += ["--debug"] * ("--debug" in sys.argv)
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}  # it sets its own
    logging.disable()  # the launcher's own: who failed says why
    try:
        with TemporaryDirectory(prefix="fusellm-train-") as private:
            started = start_processes(
                "fusellm",
                sys.executable,
                dict.fromkeys(range(count), tuple(command)),
                {rank: _environment(rank, count, Path(private)) for rank in range(count)},
                DefaultLogsSpecs(log_dir=private),
            )
            try:
                ended = started.wait(period=0.2)
            except SignalException as stop:
                started.close(stop.sigval)
                raise SystemExit(128 + stop.sigval) from None
            if ended is None or ended.is_failed():
                raise SystemExit(1)
    finally:
        logging.disable(logging.NOTSET)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _environment(rank: int, count: int, private: Path) -> dict[str, str]:
    """What a process of a training is told, besides what this one was."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    told = {name: str(value) for name, value in own.items()} | {_BY_US: str(private / "meeting")}
    threads = str(max(1, (os.cpu_count() or 1) // count))
    loopback = "lo" if sys.platform == "linux" else "lo0"
    chosen = {"OMP_NUM_THREADS": threads}
    chosen |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), loopback)
    return told | {name: os.environ.get(name, value) for name, value in chosen.items()}


def join() -> None:
    """Find the other processes, where `--nproc` has started this one."""
    if _BY_US in os.environ:
        from fusellm.training import processes

        processes.join(Path(os.environ[_BY_US]), int(os.environ["RANK"]), launched())


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
    if "RANK" not in os.environ or (speaks() and _BY_US not in os.environ):
        STDERR.say("stopped; the same command goes on from here")


def speaks() -> bool:
    """Whether this process is the one that speaks."""
    return launched() == 1 or os.environ.get("RANK", "0") == "0"
