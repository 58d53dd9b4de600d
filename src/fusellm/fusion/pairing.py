"""One source beside the target: all that fusion has to know of their two tokenizers."""

from dataclasses import dataclass

from fusellm.align.continuations import Continuations
from fusellm.align.strategies import Aligner, Tokens
from fusellm.align.translation import Translation
from fusellm.fusion.fuse import Reading
from fusellm.fusion.healing import heal
from fusellm.fusion.kept import Kept


@dataclass(frozen=True)
class Pairing:
    """A source and the target.

    Attributes:
        translation: the source's vocabulary map.
        aligner: the token alignment.
        continuations: for token healing; None for none.
    """

    translation: Translation
    aligner: Aligner
    continuations: Continuations | None

    def reading(self, target: Tokens, tokens: Tokens, kept: Kept) -> Reading:
        """The source's reading of some blocks.

        Args:
            target, tokens: the blocks as the target and the source read them.
            kept: the source's distributions at all but each block's last position.
        """
        given = (
            kept.distributions()
            if self.continuations is None
            else heal(tokens, kept, self.continuations)
        )
        aligned = self.aligner(target, tokens)
        return Reading(tokens, given, kept.true_log_prob, self.translation, aligned)
