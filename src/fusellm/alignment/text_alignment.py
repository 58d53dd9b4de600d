"""How two tokenizers cut one text, side by side: which positions have read the same."""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

import numpy as np
from transformers import PreTrainedTokenizerBase

from fusellm.alignment.positions import Situation
from fusellm.alignment.strategies import boundary_aligner, require_strategy, vocabulary_map
from fusellm.alignment.translation import map_translation
from fusellm.arrays.source_distributions import tokens_of_texts
from fusellm.errors import TokenizerError
from fusellm.text_table import text_table
from fusellm.tokens.encode import Encoder, as_encoder

_HEADINGS = ("", "target reads", "and predicts", "situation", "source position", "it predicts")
_COLOURS = {"same": "green", "several": "cyan", "beyond": "yellow", "crossed": "red"}


@dataclass(frozen=True)
class AlignedPosition:
    """One position of the target, and the source's position that has read the same.

    Attributes:
        position: its number, from 0; it has read this and all tokens before it.
        token: the token last read, as text.
        next_token: the true next token, which the target learns to predict here.
        situation: how the source cuts the text from here on: "same", "several", "beyond",
            "crossed" (docs/method.md), or "unaligned" where it has no token boundary here.
        source_position: the source's position of the same boundary; None where there is none.
        source_next_token: the source's true next token there.
    """

    position: int
    token: str
    next_token: str
    situation: str
    source_position: int | None
    source_next_token: str | None


@dataclass(frozen=True, eq=False)
class Alignment:
    """A text as two tokenizers cut it. It prints as a table, and shows as one in a notebook.

    Attributes:
        text: that both have read.
        source_tokens, target_tokens: their tokens, prefix and EOS included, as text.
        source_ids, target_ids: int64 ids of these.
        source_ends, target_ends: int64, the byte of the text where each ends.
        source_positions: [N] int64, the source position that belongs to each of the N target
            positions that predict (all tokens but the last); -1 for none.
        situations: [N] int8 of `Situation`.
    """

    text: str
    source_tokens: tuple[str, ...]
    target_tokens: tuple[str, ...]
    source_ids: np.ndarray
    target_ids: np.ndarray
    source_ends: np.ndarray
    target_ends: np.ndarray
    source_positions: np.ndarray
    situations: np.ndarray

    def __len__(self) -> int:
        return len(self.situations)

    def __iter__(self) -> Iterator[AlignedPosition]:
        for n, (place, situation) in enumerate(
            zip(self.source_positions.tolist(), self.situations.tolist(), strict=True)
        ):
            aligned = place >= 0
            yield AlignedPosition(
                n,
                self.target_tokens[n],
                self.target_tokens[n + 1],
                Situation(situation).name.lower(),
                place if aligned else None,
                self.source_tokens[place + 1] if aligned else None,
            )

    @property
    def aligned_share(self) -> float:
        """Share of the target's positions at which the source has read the same text."""
        return float((self.source_positions >= 0).mean()) if len(self) else 0.0

    def _cells(self) -> Iterator[tuple[str, ...]]:
        for one in self:
            place = "" if one.source_position is None else str(one.source_position)
            predicted = one.source_next_token or ""
            yield str(one.position), one.token, one.next_token, one.situation, place, predicted

    def __str__(self) -> str:
        return text_table(_HEADINGS, self._cells())

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{heading}</th>" for heading in _HEADINGS)
        rows = "".join(
            "<tr>"
            + "".join(
                f'<td style="color:{_COLOURS[cell]}">{cell}</td>'
                if cell in _COLOURS and n == _HEADINGS.index("situation")
                else f"<td>{escape(cell)}</td>"
                for n, cell in enumerate(row)
            )
            + "</tr>"
            for row in self._cells()
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def align(
    source: Encoder | PreTrainedTokenizerBase,
    target: Encoder | PreTrainedTokenizerBase,
    text: str,
    strategy: str = "partition",
) -> Alignment:
    """Which of a source's positions belongs to each of a target's, in one text.

    Args:
        source, target: tokenizers, of fusellm or of transformers.
        strategy: as a recipe's `fusion.strategy`. `partition` and `bytes` align positions that have
            read the same bytes; `mined` and `em` as the paper does.

    Raises:
        ArgumentError: something is no tokenizer, or there is no such strategy.
        TokenizerError: a tokenizer changes this text, so that its tokens are not the text's bytes.

    >>> from fusellm import Tokenizer
    >>> prose, python = (Tokenizer.from_pretrained(f"zoo/{n}") for n in ("prose", "python"))
    >>> alignment = align(prose, python, "imported modules")
    >>> print(alignment)  # doctest: +NORMALIZE_WHITESPACE
       target reads  and predicts   situation  source position  it predicts
    0  import        ed             unaligned
    1  ed            ·modules       same       1                ·modules
    2  ·modules      <|endoftext|>  same       2                </s>
    >>> round(alignment.aligned_share, 2)
    0.67
    """
    source, target = as_encoder(source), as_encoder(target)
    encoded = [source.encode([text])[0], target.encode([text])[0]]
    names = ("source", "target")
    for name, tokenizer, block in zip(names, (source, target), encoded, strict=True):
        if block.ends is None:
            raise TokenizerError(
                f"the {name}'s tokenizer ({tokenizer.tokenizer.name_or_path}) changes the text "
                f"{text[:60]!r}, so its tokens cannot be told as the text's bytes; give a text "
                "that it keeps"
            )
    made = require_strategy(strategy)
    # By boundaries no map is needed, and a map takes seconds.
    by_boundaries = made.aligner is boundary_aligner
    nothing = map_translation(np.full(len(source.vocabulary), -1), target)
    map_ = nothing if by_boundaries else vocabulary_map(source, target, strategy)
    tokens = [tokens_of_texts([block]) for block in encoded]
    aligned = made.aligner(source, target, map_)(tokens[1], tokens[0])
    spelled = [
        tuple(tokenizer.shown(id_) for id_ in block.ids.tolist())
        for tokenizer, block in zip((source, target), encoded, strict=True)
    ]
    return Alignment(
        text=text,
        source_tokens=spelled[0],
        target_tokens=spelled[1],
        source_ids=tokens[0].ids,
        target_ids=tokens[1].ids,
        source_ends=tokens[0].ends,
        target_ends=tokens[1].ends,
        source_positions=aligned.source,
        situations=aligned.situations,
    )
