"""How far two tokenizers agree: what could be carried from a source to a target, before any model.

This is what `fusellm tokenizers A B` shows.

T target positions that predict; Vs, Vt source and target vocabulary sizes. Shares are of counts
kept beside them, so that a reader can add domains up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fusellm.alignment.positions import Situation
from fusellm.alignment.strategies import Aligner, boundary_aligner
from fusellm.alignment.translation import VocabularyMap, class_translation, same_tokenizer
from fusellm.arrays.source_distributions import tokens_of_texts
from fusellm.errors import CorpusError
from fusellm.progress import Progress, Silent
from fusellm.tokens.blocks import cut
from fusellm.tokens.encode import Encoder, as_encoder, require_texts
from fusellm.tokens.spelling import shown
from fusellm.zoo.text import DOMAINS, documents

_FEW_TOKENS = 3  # a class of at most so many tells the target's tokens nearly apart
_MEMBERS_SHOWN = 12
_DOMAIN_BYTES = 100_000
_DOCUMENT_BYTES = 4_000  # the beginnings of many documents say more than a few whole ones


@dataclass(frozen=True)
class Side:
    """One tokenizer.

    Attributes:
        tokens: ids that have a token, special ones included.
        text_tokens: those that stand for bytes.
        shared_tokens: those whose bytes are some token's of the other tokenizer.
        kind: "byte-level", "SentencePiece" or "raw bytes".
        dummy_prefix: "none", "where no space is" or "always".
        prefix: spellings of the tokens that are put before a text.
        eos: spelling; None where there is none.
        special: spellings of all special tokens, by id.
        fallback_tokens: `<0xNN>` tokens.
    """

    tokens: int
    text_tokens: int
    shared_tokens: int
    kind: str
    dummy_prefix: str
    prefix: tuple[str, ...]
    eos: str | None
    special: tuple[str, ...]
    fallback_tokens: int

    @property
    def shared_share(self) -> float:
        """Share of this side's text tokens that the other has too."""
        return self.shared_tokens / max(self.text_tokens, 1)


@dataclass(frozen=True)
class Domain:
    """One domain's text, read by both tokenizers.

    Attributes:
        bytes_read: UTF-8 bytes of the blocks that both read.
        left_out: (blocks that the source's, that the target's tokenizer changes).
        left_out_example: the beginning of the first block left out; empty where none is.
        source_tokens, target_tokens: tokens of the blocks that both read, without prefix and EOS.
        positions: T, target positions that predict.
        situations: positions by situation, by its name in lower case, "unaligned" among them, as
            a run with a strategy that aligns by boundaries counts them.
        in_single_classes: positions whose true next token is alone in its class.
        in_small_classes: positions whose true next token is in a class of at most 3.
    """

    name: str
    blocks: int
    bytes_read: int
    left_out: tuple[int, int]
    left_out_example: str
    source_tokens: int
    target_tokens: int
    positions: int
    situations: dict[str, int]
    in_single_classes: int
    in_small_classes: int

    @property
    def aligned(self) -> int:
        """Positions at which both have read the same text."""
        return self.positions - self.situations["unaligned"]

    @property
    def bytes_per_token(self) -> tuple[float, float]:
        """Of the source's and of the target's tokens; 0 without any text."""
        tokens = (self.source_tokens, self.target_tokens)
        return self.bytes_read / max(tokens[0], 1), self.bytes_read / max(tokens[1], 1)


@dataclass(frozen=True)
class LargeClass:
    """A class of many target tokens: `root`, with which they all begin, and a few `members`."""

    root: str
    target_tokens: int
    source_tokens: int
    members: tuple[str, ...]


@dataclass(frozen=True)
class Classes:
    """The common partition of the two vocabularies.

    Attributes:
        classes: how many there are.
        single: of one target token each.
        target_tokens: target tokens that are in a class.
        unclassed_tokens: target tokens that stand for text and are in none.
        largest: those of most target tokens.
    """

    classes: int
    single: int
    target_tokens: int
    unclassed_tokens: int
    largest: tuple[LargeClass, ...]


@dataclass(frozen=True)
class TokenizerComparison:
    """What `compare_tokenizers` found. `same` says whether the two cut every text alike."""

    source: Side
    target: Side
    same: bool
    shared_bytes: int
    eos_becomes_eos: bool
    domains: tuple[Domain, ...]
    classes: Classes

    def verdict(self, source: str, target: str) -> str:
        """What this means, in one sentence about a source and a target of these names."""
        read = [domain for domain in self.domains if domain.positions]
        if not read:
            return f"One of the two changes every block of this text: {target} cannot use {source}."
        if self.same:
            return (
                f"{source} and {target} cut every text alike: every position of {target} can be "
                "used, token by token."
            )
        shares = sorted(domain.aligned / domain.positions for domain in read)
        low, high = (f"{100 * share:.0f}" for share in (shares[0], shares[-1]))
        span = low if low == high else f"{low} to {high}"
        left_out = any(sum(domain.left_out) for domain in self.domains)
        return (
            f"At {span} % of {target}'s positions {source} has read the same text, so what it "
            "knows can be used there; at the others the target learns from the text alone"
            + (", as in the blocks left out." if left_out else ".")
        )

    def as_dict(self, source: str, target: str) -> dict[str, Any]:
        """Everything as JSON has it: shares beside the counts, tokenizers by these names."""
        result = asdict(self)
        for key, name, side in (("source", source, self.source), ("target", target, self.target)):
            result[key] |= {"name": name, "shared_share": side.shared_share}
        for row, domain in zip(result["domains"], self.domains, strict=True):
            counts = domain.situations | {"aligned": domain.aligned}
            counts |= {key: row[key] for key in ("in_single_classes", "in_small_classes")}
            row["left_out"] = dict(zip(("source", "target"), domain.left_out, strict=True))
            row["source_bytes_per_token"], row["target_bytes_per_token"] = domain.bytes_per_token
            row["shares"] = {key: n / max(domain.positions, 1) for key, n in counts.items()}
        result["verdict"] = self.verdict(source, target)
        return result


def compare_tokenizers(
    source: Encoder | PreTrainedTokenizerBase,
    target: Encoder | PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[str]] | Sequence[str],
    *,
    block_bytes: int = 1024,
    largest: int = 5,
    progress: Progress | None = None,
) -> TokenizerComparison:
    """How far two tokenizers agree: what a target could learn from a source, before any model.

    Args:
        texts: documents, or documents by domain; none to compare vocabularies alone.
        block_bytes: documents are cut into blocks of at most so many bytes, as a run cuts them.
        largest: how many of the largest classes to describe.
        progress: is shown how far the work is.

    Raises:
        ArgumentError: something is no tokenizer, or `texts` is one text.
        TokenizerError: a tokenizer's tokens cannot be told as bytes.

    >>> from fusellm import Tokenizer
    >>> prose, python = (Tokenizer.from_pretrained(f"zoo/{n}") for n in ("prose", "python"))
    >>> found = compare_tokenizers(python, prose, ["def one(): return 1"])
    >>> domain = found.domains[0]
    >>> domain.positions, domain.aligned, found.classes.classes
    (6, 5, 5852)
    """
    source, target = as_encoder(source), as_encoder(target)
    if not isinstance(texts, Mapping):
        texts = {"text": texts}
    for of_domain in texts.values():
        require_texts(of_domain)
    with (progress or Silent()).start("comparing", 1 + len(texts), "parts") as bar:
        translation = class_translation(source, target)
        bar.advance()
        sizes, of_target = _class_sizes(translation), translation.outcome_of_target
        size_of_token = np.where(of_target >= 0, sizes[of_target], 0)
        align = boundary_aligner(source, target, translation)
        domains = []
        for name, of_domain in texts.items():
            domains.append(
                _domain(name, of_domain, block_bytes, source, target, align, size_of_token)
            )
            bar.advance()
    source_bytes, target_bytes = _distinct(source), _distinct(target)
    return TokenizerComparison(
        _side(source, target_bytes),
        _side(target, source_bytes),
        same_tokenizer(source, target),
        len(source_bytes & target_bytes),
        source.vocabulary.eos_id is not None and target.vocabulary.eos_id is not None,
        tuple(domains),
        _classes(source, target, translation, sizes, largest),
    )


def builtin_texts(progress: Progress) -> dict[str, list[str]]:
    """The beginnings of documents of the built-in corpus, some 100 kB a domain."""
    texts: dict[str, list[str]] = {domain: [] for domain in DOMAINS}
    with progress.start("reading text", len(DOMAINS) * _DOMAIN_BYTES / 1e3, "kB") as bar:
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


def texts_of(paths: Sequence[Path]) -> dict[str, list[str]]:
    """The texts of files, each a domain of one document.

    Raises:
        CorpusError: one cannot be read, is not UTF-8, or is empty.
    """
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
        texts[path.stem if path.stem not in texts else str(path)] = [text]
    return texts


def _distinct(encoder: Encoder) -> set[bytes]:
    return {token for token in encoder.vocabulary.token_bytes if token}


def _side(encoder: Encoder, others: set[bytes]) -> Side:
    vocabulary, tokenizer = encoder.vocabulary, encoder.tokenizer
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(n for n, token in added.items() if token.special)}
    text = [token for token in vocabulary.token_bytes if token]
    dummy = "always" if vocabulary.doubles else "where no space is"
    return Side(
        tokens=len(text) + len(special),
        text_tokens=len(text),
        shared_tokens=sum(token in others for token in text),
        kind=str(vocabulary.kind),
        dummy_prefix=dummy if vocabulary.space_mark else "none",
        prefix=_spellings(encoder, vocabulary.prefix_ids),
        eos=None if vocabulary.eos_id is None else _spellings(encoder, [vocabulary.eos_id])[0],
        special=_spellings(encoder, sorted(special)),
        fallback_tokens=int(vocabulary.is_fallback.sum()),
    )


def _spellings(encoder: Encoder, ids: Sequence[int]) -> tuple[str, ...]:
    return tuple(str(token) for token in encoder.tokenizer.convert_ids_to_tokens(list(ids)))


def _class_sizes(translation: VocabularyMap) -> np.ndarray:
    """[outcomes] int64, target ids of each class."""
    classed = translation.outcome_of_target[translation.outcome_of_target >= 0]
    return np.bincount(classed, minlength=translation.outcomes)


def _domain(
    name: str,
    texts: Sequence[str],
    block_bytes: int,
    source: Encoder,
    target: Encoder,
    align: Aligner,
    size_of_token: np.ndarray,
) -> Domain:
    blocks: list[str] = []
    last: list[bool] = []
    for text in texts:
        pieces = list(cut(text, block_bytes))
        blocks += pieces
        last += [n + 1 == len(pieces) for n in range(len(pieces))]
    encoded = source.encode(blocks, last), target.encode(blocks, last)
    changed = [[block.ends is None for block in side] for side in encoded]
    read = [not any(either) for either in zip(*changed, strict=True)]
    of_source, of_target = (tokens_of_texts(list(compress(side, read))) for side in encoded)
    asked = of_target.asked
    aligned = align(of_target, of_source)
    situations = np.bincount(aligned.situations[asked], minlength=len(Situation))
    next_size = size_of_token[of_target.ids[of_target.predicting[asked] + 1]]
    return Domain(
        name,
        sum(read),
        sum(len(block.encode()) for block in compress(blocks, read)),
        (sum(changed[0]), sum(changed[1])),
        next((block[:60] for block, both in zip(blocks, read, strict=True) if not both), ""),
        _text_tokens(source, of_source.ids),
        _text_tokens(target, of_target.ids),
        len(next_size),
        {case.name.lower(): int(situations[case]) for case in Situation},
        int((next_size == 1).sum()),
        int(((next_size > 0) & (next_size <= _FEW_TOKENS)).sum()),
    )


def _text_tokens(encoder: Encoder, ids: np.ndarray) -> int:
    return int(encoder.vocabulary.is_text[ids].sum())


def _classes(
    source: Encoder, target: Encoder, translation: VocabularyMap, sizes: np.ndarray, largest: int
) -> Classes:
    of_text = target.vocabulary.is_text & (translation.outcome_of_target < 0)
    sent = translation.outcome_of_source[translation.outcome_of_source >= 0]
    source_sizes = np.bincount(sent, minlength=translation.outcomes)
    described = []
    for outcome in np.argsort(-sizes, kind="stable")[:largest]:
        if sizes[outcome] < 2:
            break
        ids = np.nonzero(translation.outcome_of_target == outcome)[0]
        spelled = [target.vocabulary.token_bytes[id_] or b"" for id_ in ids]
        root = min(spelled, key=len)
        members = [token for token in spelled if token != root][:_MEMBERS_SHOWN]
        described.append(
            LargeClass(
                shown(root),
                int(sizes[outcome]),
                int(source_sizes[outcome]),
                tuple(shown(token) for token in members),
            )
        )
    return Classes(
        int((sizes > 0).sum()),
        int((sizes == 1).sum()),
        int(sizes.sum()),
        int(of_text.sum()),
        tuple(described),
    )
