"""Models as lm_eval's: prompts are measured before they are read, and nothing is computed in vain.

lm_eval's model of transformers (HFLM) cuts long prompts from the left in silence. It makes logits
and their softmax at every position of a batch, where only those of the continuations are asked for:
with a vocabulary of 262,144 that is most of the time, and gigabytes. And it lets a batch write on
until all its rows have met the *same* stop string, so that rows of different ones go on to their
last token, which is then cut off.

B rows, T positions, N positions of continuations, d hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from fusellm.config import EvaluationSettings
from fusellm.errors import EvaluationError
from fusellm.evaluation.harness.lm_eval import quiet
from fusellm.models.heads import head_of, hidden_states, input_device
from fusellm.objective.chunked import Head
from fusellm.progress import Bar, Progress

_LOOKED_BACK = 2  # tokens more than a stop string's own, as in lm_eval: it may be cut otherwise

Pair = tuple[list[int], list[int]]
"""Ids of a context, and of what is to follow it."""
Nats = tuple[float, bool]
"""Log-probability of a continuation, and whether each token of it is the likeliest one."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, its tokenizer, and its longest input where it has one.

    `system` is what it is told first where it is asked by its chat template.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context_tokens: int | None = None
    system: str | None = None


class MeasuredModel:
    """Stands before a model of lm_eval's (HFLM), which cuts long prompts from the left in silence.

    Attributes:
        cut: numbers of the documents of which a prompt was cut.
        system: what the model is told first where it is asked by its chat template.
    """

    def __init__(
        self,
        lm: Any,
        too_long: Literal["error", "truncate"],
        progress: Progress,
        what: str,
        system: str | None = None,
    ) -> None:
        self._lm, self._too_long, self.system = lm, too_long, system
        self._progress, self._what = progress, what
        self.cut: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lm, name)

    def generate_until(self, requests: Sequence[Any]) -> Any:
        """Write on from each prompt.

        Raises:
            EvaluationError: a prompt is too long, or what is to be written is.
        """
        self._measure_prompts(requests)
        return self._run("generate_until", requests)

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        """Nats of each continuation.

        Raises:
            EvaluationError: a prompt with its continuation is too long.
        """
        self._measure_whole(requests)
        return self._run("loglikelihood", requests)

    def require_room(self, requests: Sequence[Any]) -> None:
        """Check that requests fit, and run nothing.

        Raises:
            EvaluationError: one does not.
        """
        self._measure_prompts([r for r in requests if r.request_type == "generate_until"])
        self._measure_whole([r for r in requests if r.request_type == "loglikelihood"])

    def _measure_prompts(self, requests: Sequence[Any]) -> None:
        from lm_eval.models.utils import normalize_gen_kwargs

        context = self._lm.max_length
        rooms = []
        for request in requests:
            new_tokens = normalize_gen_kwargs(request.args[1], self._lm.max_gen_toks)[
                "max_gen_toks"
            ]
            if new_tokens >= context:
                raise EvaluationError(
                    f"{self._what} lets a model write {new_tokens} tokens, and this one reads "
                    f"{context}, prompt included; set a lower --max-new-tokens"
                )
            rooms.append(context - new_tokens)
        self._measure(requests, [request.args[0] for request in requests], rooms)

    def _measure_whole(self, requests: Sequence[Any]) -> None:
        room = self._lm.max_length + 1  # the last token is not read
        texts = ["".join(request.args) for request in requests]
        self._measure(requests, texts, [room] * len(requests))

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> Any:
        """Nats of each text, in as many windows as it needs."""
        return self._run("loglikelihood_rolling", requests)

    def _measure(self, requests: Sequence[Any], texts: list[str], rooms: list[int]) -> None:
        lengths: dict[str, int] = {}
        for text in texts:
            if text not in lengths:
                lengths[text] = len(self._lm.tok_encode(text))
        over = [
            (lengths[text], room, request.doc_id)
            for text, room, request in zip(texts, rooms, requests, strict=True)
            if lengths[text] > room
        ]
        if over and self._too_long == "error":
            longest, room, _ = max(over, key=lambda told: told[0])
            documents = len({document for _, _, document in over})
            raise EvaluationError(
                f"{documents} documents of {self._what} have prompts longer than the model reads "
                f"(the longest has {longest} tokens, and there is room for {room}); "
                "--too-long truncate cuts them from the left, examples first, and counts them"
            )
        self.cut |= {document for _, _, document in over}

    def _run(self, kind: str, requests: Sequence[Any]) -> Any:
        with self._progress.start(self._what, len(requests), "requests") as bar:
            self._lm.set_cache_hook(_Hook(bar))
            return getattr(self._lm, kind)(requests, disable_tqdm=True)


@dataclass(frozen=True)
class Ruler:
    """In the place of a model of lm_eval's, where only lengths are wanted.

    Tokens that some tokenizers put before a text are not counted: a ruler refuses nothing that the
    model would take.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    max_gen_toks: int = 256
    system: str | None = None

    def tok_encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages as the model's chat template says them; lm_eval's own way."""
        from lm_eval.models.huggingface import HFLM

        rendered: str = HFLM.apply_chat_template(self, messages, add_generation_prompt)
        return rendered

    @property
    def chat_template_args(self) -> dict[str, Any]:
        """What a template is given besides."""
        return {}


class _Hook:
    """Where lm_eval's models report each answer; meant for a cache."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """One more request is answered."""
        self._bar.advance()


@contextmanager
def measured_model(
    loaded: LoadedModel, settings: EvaluationSettings, progress: Progress, what: str
) -> Iterator[MeasuredModel]:
    """A model as lm_eval's, for use in a `with` statement; left in the mode that it was in.

    Raises:
        EvaluationError: its tokenizer has no EOS, or puts one after every text.
    """
    require_readable(loaded.tokenizer)
    was_training = loaded.model.training
    with quiet():
        lm = harness_model(loaded, deepcopy(loaded.tokenizer), settings.batch_size)
    try:
        yield MeasuredModel(lm, settings.too_long, progress, what, loaded.system)
    finally:
        loaded.model.train(was_training)


def require_readable(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that lm_eval can use a tokenizer.

    Raises:
        EvaluationError: it has no EOS, or puts one after every text.
    """
    if tokenizer.eos_token_id is None:
        raise EvaluationError(
            f"the tokenizer of {tokenizer.name_or_path} has no token that ends a text, and lm_eval "
            "needs one; set eos_token in its tokenizer_config.json"
        )
    if tokenizer("a").input_ids[-1] == tokenizer.eos_token_id:
        raise EvaluationError(
            f"the tokenizer of {tokenizer.name_or_path} ends every text with "
            f"{tokenizer.eos_token}, so that prompts would end before the answer; set "
            "add_eos_token: false in its tokenizer_config.json"
        )


def harness_model(loaded: LoadedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
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
    answers: dict[int, Nats] = {}
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
            answers[number] = one
            answered(number, one)
    return [answers[number] for number in range(len(pairs))]


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
