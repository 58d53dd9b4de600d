"""What the benchmarks have in common: their options, how figures are shown, and peaks of memory.

Importing it sets up libraries as the command line does.
"""

import argparse
import json
import resource
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fusellm.cli.main import set_up_libraries
from fusellm.tokens.encode import Encoder

set_up_libraries()

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "tokenizers"


def command_line(description: str | None) -> argparse.ArgumentParser:
    """A parser with `--quick` and `--json`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser


def add_tokenizers(parser: argparse.ArgumentParser) -> None:
    """`--tokenizers DIR`: real tokenizers, which are measured besides those of the zoo."""
    parser.add_argument(
        "--tokenizers",
        type=Path,
        metavar="DIR",
        default=_BESIDE,
        help="a folder of tokenizers, each a folder with its tokenizer.json: llama-2, gpt-neox-20b "
        "and others; the zoo's own are taken where they are not there (default: %(default)s)",
    )


def load_encoder(folder: Path) -> Encoder:
    """A tokenizer with or without a configuration beside it."""
    if (folder / "tokenizer_config.json").exists():
        return Encoder(AutoTokenizer.from_pretrained(folder))
    file = str(folder / "tokenizer.json")
    return Encoder(PreTrainedTokenizerFast(tokenizer_file=file, eos_token="<|endoftext|>"))


def show(figures: Mapping[str, float], as_json: bool, form: str = ",.3f") -> None:
    """Print figures: one flat object, or a line each.

    Args:
        form: of a number.
    """
    if as_json:
        print(json.dumps(figures))
        return
    width = max(map(len, figures), default=0)
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:{form}}")


def peak_bytes() -> int:
    """The most memory that this process has had.

    Not getrusage's ru_maxrss, which a process has from the one that started it.
    """
    (line,) = (ln for ln in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in ln)
    return int(line.split()[1]) * 1024


def peak_above(work: Callable[[], object]) -> int:
    """Bytes of this process' peak during some work, above what it had before."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    ballast = torch.ones(max(0, peak_bytes() - resident) // 4)  # what has been freed since the peak
    before = peak_bytes()
    work()
    del ballast
    return peak_bytes() - before
