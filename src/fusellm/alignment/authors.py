"""The authors' own pairing of tokens: for comparison, faults included.

`transform_step_logits` of FuseLLM (src/utils/others.py) over the dynamic programme takes

    a target token that meets one source token, whatever else that one meets, and has its spelling;
    with MinED also where the map sends the one to the other;

    before a byte-level source's first token a space as given, where the target's first token has
    one and it has none.

T target tokens, S source tokens of one block; Vs, Vt vocabulary sizes.
"""

import numpy as np

from fusellm.alignment.dynamic import DynamicAligner, Path
from fusellm.alignment.vocabulary_maps import same_spellings, spellings
from fusellm.tokens.encode import Encoder
from fusellm.tokens.vocabulary import SPACE_MARK


class AuthorsAligner(DynamicAligner):
    """Aligns blocks of one source with the target as the authors' code does."""

    def __init__(
        self, source: Encoder, target: Encoder, vocabulary_map: np.ndarray | None = None
    ) -> None:
        """`vocabulary_map`: [Vs] the nearest spelling's target id, for MinED; EM needs none."""
        super().__init__(source, target, vocabulary_map)
        self._source_spellings, self._target_spellings = spellings(source), spellings(target)
        self._source_ids = {spelling: id_ for id_, spelling in enumerate(self._source_spellings)}
        self._equal = same_spellings(self._source_spellings, self._target_spellings)
        self._mined = vocabulary_map
        self._byte_level = not source.vocabulary.space_mark

    def pair(self, path: Path, source_ids: np.ndarray, target_ids: np.ndarray) -> np.ndarray:
        """[T] the source position of each target position, of tokens without prefix and EOS."""
        positions = np.full(len(target_ids), -1, dtype=np.int64)
        alone = np.nonzero(np.diff(path.source_offsets) == 1)[0]
        source = path.sources[path.source_offsets[alone]]
        accepted = self._equal[source_ids[source]] == target_ids[alone]
        if self._mined is not None:
            accepted |= self._mined[source_ids[source]] == target_ids[alone]
        if len(alone) and alone[0] == 0:
            accepted[0] = self._first_accepted(int(source_ids[source[0]]), int(target_ids[0]))
        positions[alone[accepted]] = source[accepted]
        return positions

    def _first_accepted(self, source_id: int, target_id: int) -> bool:
        source, target = self._source_spellings[source_id], self._target_spellings[target_id]
        if self._byte_level and target.startswith(SPACE_MARK) and not source.startswith(SPACE_MARK):
            source = SPACE_MARK + source
        if source == target:
            return True
        known = self._source_ids.get(source)
        return self._mined is not None and known is not None and self._mined[known] == target_id
