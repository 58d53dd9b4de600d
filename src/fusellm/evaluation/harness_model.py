"""lm_eval's model of transformers (HFLM): the same answers with less work.

HFLM makes logits and their softmax at every position of a batch, where only those of the
continuations are asked for: with a vocabulary of 262,144 that is most of the time, and gigabytes.
And it lets a batch write on until all its rows have met the *same* stop string, so that rows of
different ones go on to their last token, which is then cut off.

B rows, T positions, N positions of continuations, d hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from fusellm.evaluation.settings import Loaded
from fusellm.models.heads import head_of, hidden_states, input_device
from fusellm.objective.chunked import Head

_LOOKED_BACK = 2  # tokens more than a stop string's own, as in lm_eval: it may be cut otherwise

Pair = tuple[list[int], list[int]]
"""Ids of a context, and of what is to follow it."""
Nats = tuple[float, bool]
"""Log-probability of a continuation, and whether each token of it is the likeliest one."""


def harness_model(loaded: Loaded, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """A model as lm_eval's.

    Args:
        tokenizer: of the model; lm_eval changes it.
    """
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):  # type: ignore[misc]  # lm_eval has no types
        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[Nats]:
            def answered(number: int, nats: Nats) -> None:
                if requests[number][0] is not None:  # a window of a long text has no name
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], nats)

            pairs = [(context, continuation) for _, context, continuation in requests]
            return continuation_nats(self.model, pairs, self.max_length, batch_size, answered)

        def _model_generate(
            self, context: torch.Tensor, max_length: int, stop: list[str], **writing: Any
        ) -> torch.Tensor:
            if not writing.get("temperature"):
                writing.pop("temperature", None)
                writing.setdefault("do_sample", False)
            ends = RowsEnd(self.tokenizer, stop, context.shape[1])
            written: torch.Tensor = self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=StoppingCriteriaList([ends]),
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                **writing,
            )
            return written

    rows = loaded.model.config.get_text_config().vocab_size
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, and needs a row all the same
    return Model(
        pretrained=loaded.model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=loaded.context_tokens,
        softmax_dtype="float32",
    )


class RowsEnd(StoppingCriteria):
    """Ends each row of a batch at the first stop string that it meets."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt_tokens: int
    ) -> None:
        own = [len(tokenizer.encode(one, add_special_tokens=False)) for one in stop]
        self._tail = max(own, default=0) + _LOOKED_BACK
        self._tokenizer, self._stop, self._prompt_tokens = tokenizer, stop, prompt_tokens

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """[B] whether each row is at its end."""
        texts = self._tokenizer.batch_decode(input_ids[:, self._prompt_tokens :][:, -self._tail :])
        ended = [any(one in text for one in self._stop) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


@torch.no_grad()
def continuation_nats(
    model: PreTrainedModel,
    pairs: Sequence[Pair],
    max_length: int,
    batch_size: int,
    answered: Callable[[int, Nats], None],
) -> list[Nats]:
    """What a model says of continuations, in the batches that HFLM would read.

    Pairs that differ in the last token only are read once.

    Args:
        max_length: tokens that the model reads; a longer text loses its beginning, be it of the
            continuation.
        answered: called with a pair's number when its nats are known.
    """
    head = head_of(model).widened()
    alike: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        read = tuple(context + continuation)[-(max_length + 1) :][:-1]
        alike.setdefault(read, []).append(number)
    order = sorted(alike, key=lambda ids: (-len(ids), ids))
    found: dict[int, Nats] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        padded = torch.zeros(
            len(batch), len(batch[0]), dtype=torch.long, device=input_device(model)
        )
        for row, ids in enumerate(batch):
            padded[row, : len(ids)] = torch.tensor(ids)
        hidden = hidden_states(model, input_ids=padded)
        places = [(row, number) for row, ids in enumerate(batch) for number in alike[ids]]
        asked = [pairs[number][1][-len(batch[row]) :] for row, number in places]
        parts = [
            hidden[row, len(batch[row]) - len(tokens) : len(batch[row])]
            for (row, _), tokens in zip(places, asked, strict=True)
        ]
        nats = _nats(head, torch.cat(parts), [len(part) for part in parts], asked)
        for (_, number), one in zip(places, nats, strict=True):
            found[number] = one
            answered(number, one)
    return [found[number] for number in range(len(pairs))]


def _nats(
    head: Head, hidden: torch.Tensor, lengths: Sequence[int], asked: Sequence[list[int]]
) -> list[Nats]:
    """Of continuations whose [N, d] hidden states stand one after the other."""
    true_ids = torch.tensor([token for tokens in asked for token in tokens], device=hidden.device)
    log_probs, is_likeliest = [], []
    for rows in range(0, len(hidden), head.rows_to_read()):
        part = slice(rows, rows + head.rows_to_read())
        logits = head.logits(hidden[part]).log_softmax(dim=-1)
        log_probs.append(logits.gather(1, true_ids[part, None])[:, 0])
        is_likeliest.append(logits.argmax(dim=-1) == true_ids[part])
    pairs = zip(
        torch.cat(log_probs).split(list(lengths)),
        torch.cat(is_likeliest).split(list(lengths)),
        strict=True,
    )
    return [(float(nats.sum()), bool(greedy.all())) for nats, greedy in pairs]
