"""What an arm computes, its sources' reading included.

In floating-point operations, by the usual estimate: a forward pass takes 2 for each parameter and
token, a training step 6 (Kaplan et al. 2020, section 2.1). All parameters are counted, tables of
embeddings too, which a small model has many of; fusing and validating are not.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fusellm.pipeline import Pipeline
from fusellm.store.externalized import TARGET
from fusellm.store.manifest import StageFolder
from fusellm.store.run_folder import FUSED
from fusellm.study.trainings import digest_of

_FORWARD, _STEP = 2, 6


@dataclass(frozen=True)
class Compute:
    """Floating-point operations.

    Attributes:
        reading: of the sources, once over the text.
        training: of the target.
    """

    reading: int
    training: int

    @property
    def total(self) -> int:
        """Both.

        >>> Compute(1, 2).total
        3
        """
        return self.reading + self.training


def compute_of(
    pipeline: Pipeline, which: str, tokens: int, parameters: Mapping[str, int]
) -> Compute:
    """What a training has computed.

    Args:
        which: FUSED, or CLM, for which no source is read.
        tokens: that it was trained on.
        parameters: of each model by name, the target's as "target".
    """
    reading = sum(reading_of(pipeline, which, parameters).values())
    return Compute(reading, _STEP * parameters[TARGET] * tokens)


def reading_of(pipeline: Pipeline, which: str, parameters: Mapping[str, int]) -> dict[str, int]:
    """What models have read and written for a training, by what it is made from.

    What several trainings have read is counted once where these are joined.
    """
    spent: dict[str, int] = {}
    for entry, generated in pipeline.recipe.corpus.generated.items():
        answers = StageFolder(pipeline.run / "generate" / str(entry))
        written = _FORWARD * parameters[generated.by] * int(answers.counts["tokens"])
        spent[digest_of(answers.identity)] = written
    if which != FUSED:
        return spent
    for source in pipeline.recipe.sources:
        store = StageFolder(pipeline.run / "externalize" / source.name)
        read = _FORWARD * parameters[source.name] * int(store.counts["tokens"])
        spent[digest_of(store.identity)] = read
    return spent
