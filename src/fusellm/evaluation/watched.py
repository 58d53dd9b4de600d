"""A model of lm_eval's whose prompts are measured before it reads them, and that shows its work."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from fusellm.errors import EvaluationError
from fusellm.evaluation.harness_model import harness_model
from fusellm.evaluation.lm_eval_import import quiet
from fusellm.evaluation.settings import Loaded, Settings
from fusellm.progress import Bar, Progress


class Watched:
    """Stands before a model of lm_eval's (HFLM), which cuts long prompts from the left in silence.

    Attributes:
        cut: numbers of the documents of which a prompt was cut.
    """

    def __init__(
        self, lm: Any, too_long: Literal["error", "truncate"], progress: Progress, what: str
    ) -> None:
        self._lm, self._too_long = lm, too_long
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
            longest, room, _ = max(over, key=lambda found: found[0])
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

    def tok_encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids


class _Hook:
    """Where lm_eval's models report each answer; meant for a cache."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """One more request is answered."""
        self._bar.advance()


@contextmanager
def watched(loaded: Loaded, settings: Settings, progress: Progress, what: str) -> Iterator[Watched]:
    """A model as lm_eval's, for use in a `with` statement; left in the mode that it was in.

    Raises:
        EvaluationError: its tokenizer has no EOS, or puts one after every text.
    """
    require_readable(loaded.tokenizer)
    was_training = loaded.model.training
    with quiet():
        lm = harness_model(loaded, deepcopy(loaded.tokenizer), settings.batch_size)
    try:
        yield Watched(lm, settings.too_long, progress, what)
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
