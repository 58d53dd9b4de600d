"""`fusellm tokenizers A B`: how far two tokenizers agree, before any model is loaded.

Heavy imports are made inside the functions, so that `--help` answers at once.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusellm.cli.console import STDERR, SafeConsole, Terminal, json_text
from fusellm.cli.tokenizers_screen import screen, verdict
from fusellm.errors import CorpusError

if TYPE_CHECKING:
    from fusellm.alignment.comparison import Comparison
    from fusellm.models.tokenizer import Tokenizer

_DOMAIN_BYTES = 100_000
_DOCUMENT_BYTES = 4_000  # the beginnings of many documents say more than a few whole ones

Source = Annotated[str, typer.Argument(metavar="A", help="The source's.", show_default=False)]
Target = Annotated[str, typer.Argument(metavar="B", help="The target's.", show_default=False)]
TextFiles = Annotated[
    list[Path],
    typer.Option(
        "--text",
        metavar="FILE",
        help="UTF-8 text to compare on, a domain a file; may be repeated. If not given: prose, "
        "Python and C++ of the installed packages.",
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run code that the two bring along; its files are named first. Only if you have read "
        "it: it can do whatever you can.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON on stdout.")]
_NO_FILES: list[Path] = []


def tokenizers(
    source: Source,
    target: Target,
    text: TextFiles = _NO_FILES,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Compare two tokenizers: what a target could learn from a source, before any model is loaded.

    A is the source's tokenizer, B the target's: each a folder, a GGUF file, a hub name or zoo/NAME.
    Shown are the tokens that both have, bytes per token, at how many of the target's positions the
    source has read the same text and how it cuts what follows, and the classes of tokens that the
    two can tell apart.
    """
    from fusellm.alignment.comparison import compare_tokenizers

    terminal = Terminal(STDERR)
    mine, theirs = (load_encoder(name, trust_remote_code, terminal) for name in (source, target))
    texts = _texts_of(text) if text else _builtin_texts(terminal)
    found = compare_tokenizers(mine, theirs, texts, progress=terminal)
    if as_json:
        print(json_text(as_object(source, target, found)))
        return
    console = SafeConsole()
    for part in screen(*_short_names(source, target), found):
        console.print(part)


def load_encoder(
    name: str, trust_remote_code: bool, terminal: Terminal, rows: int | None = None
) -> "Tokenizer":
    """A tokenizer by its folder, GGUF file, hub name or zoo/NAME.

    Args:
        rows: of the head of its model; if not given, what stands beside the tokenizer says.

    Raises:
        ModelError: it cannot be loaded, or the model beside it has too few rows for it.
        TokenizerError: its tokens cannot be told as bytes.
    """
    from fusellm.config import ModelSettings
    from fusellm.models.remote_code import trusted_code
    from fusellm.models.tokenizer import Tokenizer

    told = trusted_code(ModelSettings(model=name, trust_remote_code=trust_remote_code), True)
    if told is not None:
        terminal.say(told)
    found = Tokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, rows=rows)
    if found.assumed_eos is not None:
        terminal.say(
            f"{name} does not say which token ends a text; taken to be {found.assumed_eos}"
        )
    return found


def _texts_of(paths: Sequence[Path]) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8")
        except OSError as error:
            raise CorpusError(
                f"--text {path} cannot be read: {error.strerror}; check the path"
            ) from error
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"--text {path} is not UTF-8 (byte {error.start}); convert it first"
            ) from error
        if not text:
            raise CorpusError(f"--text {path} is empty; give a file with text in it")
        name = path.stem if path.stem not in texts else str(path)
        texts[name] = [text]
    return texts


def _builtin_texts(terminal: Terminal) -> dict[str, list[str]]:
    """The beginnings of documents of the built-in corpus, some 100 kB a domain."""
    from fusellm.tokens.blocks import cut
    from fusellm.zoo.text import DOMAINS, documents

    texts: dict[str, list[str]] = {domain: [] for domain in DOMAINS}
    with terminal.start("reading text", len(DOMAINS) * _DOMAIN_BYTES / 1e3, "kB") as bar:
        for domain in DOMAINS:
            room = _DOMAIN_BYTES
            for document in documents(["validation", "train"], [domain]):
                if room <= 0:
                    break
                begins = next(cut(document.text, _DOCUMENT_BYTES))
                texts[domain].append(begins)
                room -= len(begins.encode())
                bar.advance(len(begins.encode()) / 1e3)
    return texts


def as_object(source: str, target: str, found: "Comparison") -> dict[str, Any]:
    """What `--json` prints: everything on the screen, counts beside shares."""
    result = asdict(found)
    for key, name, side in (("source", source, found.source), ("target", target, found.target)):
        result[key] |= {"name": name, "shared_share": side.shared_share}
    for row, domain in zip(result["domains"], found.domains, strict=True):
        row["left_out"] = dict(zip(("source", "target"), domain.left_out, strict=True))
        row["source_bytes_per_token"] = domain.bytes_read / max(domain.source_tokens, 1)
        row["target_bytes_per_token"] = domain.bytes_read / max(domain.target_tokens, 1)
        row["shares"] = {
            case: count / max(domain.positions, 1) for case, count in domain.situations.items()
        }
        row["shares"] |= {
            "aligned": domain.aligned / max(domain.positions, 1),
            "in_single_classes": domain.in_single_classes / max(domain.positions, 1),
            "in_small_classes": domain.in_small_classes / max(domain.positions, 1),
        }
    result["verdict"] = verdict(source, target, found)
    return result


def _short_names(source: str, target: str) -> tuple[str, str]:
    """Folders by their last part, where that tells them apart."""
    short = [Path(name).name if Path(name).is_dir() else name for name in (source, target)]
    return (short[0], short[1]) if short[0] != short[1] else (source, target)
