"""BLEU of translations, and what each document gives to it.

D documents, R rows of summed counts.
"""

from collections.abc import Sequence

import numpy as np

from fusellm.evaluation.harness.lm_eval import extra

_ORDERS = 4
"""Longest n-grams that BLEU counts."""


class Translations:
    """A corpus of translations by one model, as the counts that BLEU is made of.

    BLEU is sacrebleu's with its defaults; one reference to a document.

    Raises:
        EvaluationError: sacrebleu is not installed.
    """

    def __init__(self, responses: Sequence[str], references: Sequence[str]) -> None:
        metric = extra("sacrebleu.metrics").BLEU
        of_one = metric(effective_order=True)
        scores = [of_one.sentence_score(r, [t]) for r, t in zip(responses, references, strict=True)]
        self._counts = np.array(
            [[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in scores],
            dtype=np.float64,
        ).reshape(len(scores), 2 * _ORDERS + 2)
        self._of_counts = metric.compute_bleu
        self._smoothing = metric().smooth_method

    @property
    def bleu(self) -> float:
        """BLEU of the corpus, 0 to 100."""
        return float(self._of_sums(self._counts.sum(axis=0)[None])[0])

    @property
    def points(self) -> np.ndarray:
        """[D] what each document gives to BLEU, which is their mean: the jackknife's pseudo-values.

        D · BLEU − (D − 1) · BLEU without the document. BLEU is no mean over documents, but near to
        that of these, by which translations are compared as other scores are.
        """
        whole = self._counts.sum(axis=0)
        documents = len(self._counts)
        values = documents * self.bleu - (documents - 1) * self._of_sums(whole - self._counts)
        return np.asarray(values + self.bleu - values.mean())

    def _of_sums(self, sums: np.ndarray) -> np.ndarray:
        """[R] BLEU of [R, 10] summed counts."""
        return np.array(
            [
                self._of_counts(
                    row[:_ORDERS],
                    row[_ORDERS : 2 * _ORDERS],
                    *row[2 * _ORDERS :],
                    smooth_method=self._smoothing,
                ).score
                for row in sums.astype(np.int64).tolist()
            ]
        )
