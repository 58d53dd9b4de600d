"""How probable sets of tokens are to a model, at some of its positions.

Q questions of a kind; C positions of a chunk, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from fusellm.arrays.outcome_sets import OutcomeSets
from fusellm.arrays.ragged import offsets_of
from fusellm.models.heads import head_of
from fusellm.objective.chunked import Head
from fusellm.reading.batches import read_blocks


@dataclass(frozen=True)
class SetQuestions:
    """How probable sets of a model's ids are.

    Attributes:
        rows: [Q] positions, ascending: all but each row's last token, row after row.
        numbers: [Q] sets.
        sets: of the model's own ids.
    """

    rows: np.ndarray
    numbers: np.ndarray
    sets: OutcomeSets


def log_masses(
    model: PreTrainedModel,
    ids: Sequence[np.ndarray],
    questions: Sequence[SetQuestions],
    vocabulary: int | None = None,
    batch_tokens: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> list[np.ndarray]:
    """What a model answers.

    Args:
        ids: rows of tokens, each read from its beginning.
        vocabulary: rows of the head that count, from the first on; all if None.
        batch_tokens: of one forward pass, padding included; None for what suits the device.
        advance: is told how many rows more have been read.

    Returns:
        Of each kind of question [Q] float64 nats, −inf of an empty set.
    """
    head = head_of(model).widened()
    offsets = offsets_of(np.array([max(len(row) - 1, 0) for row in ids], dtype=np.int64))
    answers = [np.full(len(question.rows), np.nan) for question in questions]

    def use(batch: list[int], hidden: torch.Tensor, _: torch.Tensor) -> None:
        first = 0
        for n in batch:
            stop = first + int(offsets[n + 1] - offsets[n])
            _answer(head, hidden[first:stop], vocabulary, int(offsets[n]), questions, answers)
            first = stop

    for batch, _ in read_blocks(model, ids, batch_tokens, use):
        advance(len(batch))
    return answers


def _answer(
    head: Head,
    hidden: torch.Tensor,
    vocabulary: int | None,
    first: int,
    questions: Sequence[SetQuestions],
    answers: Sequence[np.ndarray],
) -> None:
    """Answer what is asked of one row, whose positions begin at `first`."""
    stop = first + len(hidden)
    asked = [
        question.rows[slice(*question.rows.searchsorted([first, stop]))] for question in questions
    ]
    if not any(map(len, asked)):
        return
    chunk = head.rows_to_read()
    for start in range(0, len(hidden), chunk):
        logits = head.logits(hidden[start : start + chunk])[:, :vocabulary]
        log_probs = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
        here = first + start
        for question, answer in zip(questions, answers, strict=True):
            low, high = np.searchsorted(question.rows, [here, here + len(log_probs)])
            places, numbers = question.rows[low:high] - here, question.numbers[low:high]
            answer[low:high] = _sums(log_probs, places, numbers, question.sets)


def _sums(
    log_probs: torch.Tensor, rows: np.ndarray, numbers: np.ndarray, sets: OutcomeSets
) -> np.ndarray:
    """[Q] float64 logs of sums over sets of ids."""
    ids, which = sets.take(numbers)
    known = ids < log_probs.shape[1]  # a tokenizer may have more tokens than a head has rows
    ids, which = ids[known], which[known]
    place = log_probs.device
    entries = torch.from_numpy(rows[which]).to(place), torch.from_numpy(ids).to(place)
    masses = torch.zeros(len(rows), dtype=torch.float64, device=place)
    masses.index_add_(0, torch.from_numpy(which).to(place), log_probs[entries].double().exp())
    sums: np.ndarray = masses.log().cpu().numpy()
    return sums
