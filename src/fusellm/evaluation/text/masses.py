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
    left_out: np.ndarray | None = None,
    batch_tokens: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> list[np.ndarray]:
    """What a model answers.

    Args:
        ids: rows of tokens, each read from its beginning.
        left_out: ids that count for nothing, and are in no set; none if None. Those of the head
            that no tokenizer has may be among them.
        batch_tokens: of one forward pass, padding included; None for what suits the device.
        advance: is told how many rows more have been read.

    Returns:
        Of each kind of question [Q] float64 nats, −inf of an empty set.
    """
    head = head_of(model).widened()
    offsets = offsets_of(np.array([max(len(row) - 1, 0) for row in ids], dtype=np.int64))
    answers = [np.full(len(question.rows), np.nan) for question in questions]
    asked = np.unique(np.concatenate([question.rows for question in questions]))
    without = torch.from_numpy(np.zeros(0, dtype=np.int64) if left_out is None else left_out)
    without = without.to(head.weight.device)

    def use(batch: list[int], hidden: torch.Tensor, _: torch.Tensor) -> None:
        first = 0
        for n in batch:
            stop = first + int(offsets[n + 1] - offsets[n])
            here = asked[slice(*asked.searchsorted(offsets[n : n + 2]))]
            own = hidden[first:stop][torch.from_numpy(here - offsets[n]).to(hidden.device)]
            _answer(head, own, here, without, questions, answers)
            first = stop

    for batch, _ in read_blocks(model, ids, batch_tokens, use):
        advance(len(batch))
    return answers


def _answer(
    head: Head,
    hidden: torch.Tensor,
    asked: np.ndarray,
    left_out: torch.Tensor,
    questions: Sequence[SetQuestions],
    answers: Sequence[np.ndarray],
) -> None:
    """Answer what is asked at some positions of one row.

    Args:
        hidden: [A, d] of these positions.
        asked: [A] their numbers, ascending.
    """
    chunk = head.rows_to_read()
    for start in range(0, len(asked), chunk):
        logits = head.logits(hidden[start : start + chunk])
        logits[:, left_out] = -torch.inf
        log_probs = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
        here = asked[start : start + chunk]
        for question, answer in zip(questions, answers, strict=True):
            low = int(np.searchsorted(question.rows, here[0]))
            high = int(np.searchsorted(question.rows, here[-1], side="right"))
            places = np.searchsorted(here, question.rows[low:high])
            answer[low:high] = sums_over_sets(
                log_probs, places, question.numbers[low:high], question.sets
            )


def sums_over_sets(
    log_probs: torch.Tensor, rows: np.ndarray, numbers: np.ndarray, sets: OutcomeSets
) -> np.ndarray:
    """[Q] float64 logs of the probabilities of sets of ids.

    Args:
        log_probs: [C, V].
        rows: [Q] which of them is asked.
        numbers: [Q] sets.
    """
    ids, which = sets.take(numbers)
    known = ids < log_probs.shape[1]  # a tokenizer may have more tokens than a head has rows
    ids, which = ids[known], which[known]
    place = log_probs.device
    entries = torch.from_numpy(rows[which]).to(place), torch.from_numpy(ids).to(place)
    masses = torch.zeros(len(rows), dtype=torch.float64, device=place)
    masses.index_add_(0, torch.from_numpy(which).to(place), log_probs[entries].double().exp())
    sums: np.ndarray = masses.log().cpu().numpy()
    return sums
