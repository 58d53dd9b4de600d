"""How much of some text a tokenizer can read, told from a few blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

from fusellm.tokens.encode import Encoded


@dataclass(frozen=True)
class Sample:
    """What a tokenizer made of some blocks.

    Attributes:
        blocks: how many it was given.
        changed: those that it changes (lower case, NFC, unknown characters), and so cannot be used.
        example: the beginning of the first of these; empty where there is none.
        longest: tokens of the longest block.
        reason: of a conversation that is changed, why.
        cut: conversations that are read, and are longer than the model's context.
        too_long: whether the first that is not read is one of which nothing is within that.
    """

    blocks: int
    changed: int
    example: str
    longest: int = 0
    reason: str | None = None
    cut: int = 0
    too_long: bool = False

    @property
    def changed_share(self) -> float:
        """Share of the blocks that are changed, from 0 to 1; 0 of no blocks."""
        return self.changed / max(self.blocks, 1)


def sample(encoded: Sequence[Encoded], texts: Sequence[str]) -> Sample:
    """What became of blocks of text; no model is needed."""
    changed = [n for n, tokens in enumerate(encoded) if tokens.ends is None]
    longest = max((len(tokens.ids) + tokens.left_out for tokens in encoded), default=0)
    cut = sum(tokens.left_out > 0 and tokens.ends is not None for tokens in encoded)
    if not changed:
        return Sample(len(texts), 0, "", longest, cut=cut)
    first = encoded[changed[0]]
    example, too_long = texts[changed[0]][:60], first.left_out > 0
    return Sample(len(texts), len(changed), example, longest, first.reason, cut, too_long)
