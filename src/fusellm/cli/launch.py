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
from typing import Annotated

import typer

from fusellm.errors import FusellmError, RecipeError

_GRACE_SECONDS = 3.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_BY_US = "FUSELLM_LAUNCHED"  # in the environment of the processes that --nproc starts

Nproc = Annotated[
    int,
    typer.Option(
        "--nproc",
        metavar="N",
        min=1,
        help="Train on N processes of this machine, one a GPU; each takes "
        "per_device_train_batch_size rows at a time. `accelerate launch -m fusellm train` does it "
        "on several machines. With `training: {fsdp: true}` the model is spread over them (FSDP2).",
    ),
]


def launched() -> int:
    """How many processes a launcher started this command as; 1 without one."""
    told = os.environ.get("WORLD_SIZE", "")
    return max(1, int(told)) if told.isdigit() else 1


def require_joined() -> None:
    """Check that the processes of a launcher have found each other, which accelerate sees to.

    Raises:
        RecipeError: each would train alone.
    """
    from fusellm.models.processes import count

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
    """Check that there is a GPU for each process, or none at all.

    Raises:
        RecipeError: there are fewer.
    """
    import torch

    if launched() > 1 and count > 1:
        raise RecipeError(
            f"--nproc {count} starts processes, and a launcher has started {launched()} already: "
            "leave one of them out"
        )
    gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else count
    if count > gpus:
        raise RecipeError(f"--nproc {count}: this machine has {gpus} GPU(s); give as many at most")


def train_on(count: int, run: Path) -> None:
    """Train the models of a run on several processes of this machine, and wait for them.

    Raises:
        SystemExit: one of them failed, and has said why.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser
    from torch.distributed.run import run as launch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # of sources that this process has read
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    os.environ[_BY_US] = "1"
    options = ["--standalone", "--nnodes=1", "--node-rank=0", "--max-restarts=0"]
    command = [*options, f"--nproc-per-node={count}", "-m", "fusellm", "train", str(run)]
    command += ["--debug"] * ("--debug" in sys.argv)
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}  # it sets its own
    logging.disable()  # the launcher's own: who failed says why
    try:
        launch(get_args_parser().parse_args(command))
    except ChildFailedError:
        raise SystemExit(1) from None
    except SignalException:
        raise SystemExit(130) from None
    finally:
        logging.disable(logging.NOTSET)
        for number, handler in handlers.items():
            signal.signal(number, handler)


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
        from fusellm.models.processes import leave

        leave()


def tell(error: FusellmError) -> None:
    """Say what was wrong, once.

    Where a launcher started several processes, the first one speaks. The launcher ends the others
    when one fails, and who is there still after a while has something of its own to say.
    """
    if not speaks():
        time.sleep(_GRACE_SECONDS)
        print(f"fusellm (process {os.environ['RANK']}): {error}", file=sys.stderr)
        return
    print(f"fusellm: {error}", file=sys.stderr)


def tell_stopped() -> None:
    """Say once, after Ctrl-C, that nothing is lost."""
    if "RANK" not in os.environ or (speaks() and _BY_US not in os.environ):
        print("stopped; the same command goes on from here", file=sys.stderr)


def speaks() -> bool:
    """Whether this process is the one that speaks."""
    return launched() == 1 or os.environ.get("RANK", "0") == "0"
