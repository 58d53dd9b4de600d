"""The processes of a training that a command starts, or that accelerate and torchrun have started.

torch is imported where it is needed: every command asks how many processes there are.
"""

import logging
import os
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from fusellm.errors import RecipeError

_PROCESSES_WITHOUT_GPU = 2  # may be tried on any machine
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
MEETING = "FUSELLM_MEETING"
"""Set for the processes that --nproc starts: the file in which they meet."""


def launched() -> int:
    """How many processes a launcher started this command as; 1 without one."""
    told = os.environ.get("WORLD_SIZE", "")
    return max(1, int(told)) if told.isdigit() else 1


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
    command += ["--quiet"] * bool({"--quiet", "-q"} & set(sys.argv))
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
    told = {name: str(value) for name, value in own.items()} | {MEETING: str(private / "meeting")}
    threads = str(max(1, (os.cpu_count() or 1) // count))
    loopback = "lo" if sys.platform == "linux" else "lo0"
    chosen = {"OMP_NUM_THREADS": threads}
    chosen |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), loopback)
    return told | {name: os.environ.get(name, value) for name, value in chosen.items()}
