"""How much of some text a tokenizer can read, told from a few blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

from fusellm.tokens.encode import Encoder


@dataclass(frozen=True)
class Sample:
    """What a tokenizer made of some blocks.

    Attributes:
        blocks: how many it was given.
        changed: those that it changes (lower case, NFC, unknown characters), and so cannot be used.
        example: the beginning of the first of these; empty where there is none.
        longest: tokens of the longest block.
    """

    blocks: int
    changed: int
    example: str
    longest: int = 0

    @property
    def changed_share(self) -> float:
        """Share of the blocks that are changed, from 0 to 1; 0 of no blocks."""
        return self.changed / max(self.blocks, 1)


def sample(encoder: Encoder, blocks: Sequence[str]) -> Sample:
    """Try a tokenizer on blocks of text; no model is needed."""
    encoded = encoder.encode(blocks, [False] * len(blocks))
    changed = [text for text, tokens in zip(blocks, encoded, strict=True) if tokens.ends is None]
    longest = max((len(tokens.ids) for tokens in encoded), default=0)
    return Sample(len(blocks), len(changed), changed[0][:60] if changed else "", longest)
