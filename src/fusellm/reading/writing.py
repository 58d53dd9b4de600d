"""A model writing answers to prompts. B prompts of a batch, T tokens."""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from fusellm.config import GeneratedSettings
from fusellm.errors import ModelError
from fusellm.models.heads import input_device
from fusellm.reading.batches import is_out_of_memory
from fusellm.tokens.chat import ChatEncoder
from fusellm.tokens.conversation import Conversation
from fusellm.tokens.encode import Encoder

_LOGITS_ALIKE = 0.25  # of their deviation: half precision moves them by a hundredth


class WrittenAnswer(NamedTuple):
    """What a model wrote after a prompt.

    Attributes:
        text: of it; nothing after a prompt that the model cannot read.
        ends: whether the model has ended it, by the end of a turn or of a text.
        tokens: that it wrote.
        left_out: why the prompt was not read; None where it was.
    """

    text: str
    ends: bool = False
    tokens: int = 0
    left_out: str | None = None


class Writer:
    """A model that answers prompts.

    An answer ends where the model ends its turn, or its text. It is cut at `max_new_tokens`, at the
    first token that stands for no text, such as the beginning of another turn, and at bytes that
    are no character.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        context_tokens: int | None,
        settings: GeneratedSettings,
    ) -> None:
        """`context_tokens`: the longest input of the model, if it has a longest."""
        self._model, self._encoder, self._settings = model, encoder, settings
        room = None if context_tokens is None else context_tokens - settings.max_new_tokens
        if room is not None and room < 1:
            raise ModelError(
                f"generated.max_new_tokens: {settings.max_new_tokens} leaves no room for a prompt "
                f"in the {context_tokens} tokens that {model.name_or_path} reads; lower it"
            )
        self._room = room
        known, own = len(encoder.vocabulary), model.generation_config
        ends = [encoder.vocabulary.eos_id, encoder.tokenizer.eos_token_id]
        named = getattr(own, "eos_token_id", None)
        ends += named if isinstance(named, list) else [named]
        rows = model.get_output_embeddings().weight.shape[0]
        self._ends = sorted({int(id_) for id_ in ends if id_ is not None and id_ < rows})
        sampled: dict[str, Any] = {"do_sample": False}
        if settings.temperature > 0:
            sampled = {"do_sample": True, "temperature": settings.temperature, "top_k": 0}
            sampled["top_p"] = settings.top_p
        # In the place of what comes with the model, which may have penalties and a top k.
        self._written_with = GenerationConfig(
            **sampled,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=self._ends or None,
            pad_token_id=self._ends[0] if self._ends else 0,
            suppress_tokens=[*range(known, rows)] or None,
        )
        self._may_pad = self._reads_alike_when_padded()

    def write(
        self,
        prompts: Sequence[Conversation | str],
        seed: Sequence[int],
        advance: Callable[[int], object] = lambda count: None,
    ) -> list[WrittenAnswer]:
        """Answer prompts, those of like length together.

        Args:
            prompts: conversations for a model that reads them by a chat template, else texts.
            seed: numbers that the sampling is seeded with; the same give the same answers.
            advance: is told how many more prompts are answered.

        Raises:
            ModelError: memory does not suffice.
        """
        asked = list(self._ids_of(prompts))
        written = [
            WrittenAnswer("", left_out=one) if isinstance(one, str) else None for one in asked
        ]
        left = [n for n, one in enumerate(asked) if not isinstance(one, str)]
        advance(len(asked) - len(left))
        left.sort(key=lambda n: (-len(asked[n]), n))
        for number, batch in enumerate(self._batches(left, [len(one) for one in asked])):
            rows = [np.asarray(asked[n]) for n in batch]
            for n, ids in zip(batch, self._batch(rows, [*seed, number]), strict=True):
                is_answer = not isinstance(prompts[n], str)
                written[n] = self._read(ids, is_answer)
            advance(len(batch))
        return [one for one in written if one is not None]

    def _batches(self, order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """Prompts that are answered together: of one length each, where padding would be read."""
        batches: list[list[int]] = []
        for n in order:
            full = not batches or len(batches[-1]) == self._settings.batch_size
            if full or not (self._may_pad or lengths[batches[-1][0]] == lengths[n]):
                batches.append([])
            batches[-1].append(n)
        return batches

    def _reads_alike_when_padded(self) -> bool:
        """Whether a row says the same behind padding; some architectures, as RWKV, read it."""
        known = np.flatnonzero(self._encoder.vocabulary.is_text)[-3:]
        rows = [known, np.concatenate([known, known])]
        alone = self._next_logits(rows[:1])
        padded = self._next_logits(rows)[:1]
        return float((alone - padded).abs().max()) < _LOGITS_ALIKE * float(alone.std())

    def _next_logits(self, rows: Sequence[np.ndarray]) -> torch.Tensor:
        """[B, V] float32 logits after each row."""
        settings = copy(self._written_with)
        settings.do_sample, settings.max_new_tokens = False, 1
        settings.temperature = settings.top_p = settings.top_k = None
        settings.eos_token_id = settings.suppress_tokens = None
        asked = {"output_logits": True, "return_dict_in_generate": True}
        told = self._generate(rows, settings, **asked)
        logits: torch.Tensor = told.logits[0].float()
        return logits

    @torch.no_grad()
    def _generate(
        self, rows: Sequence[np.ndarray], settings: GenerationConfig, **asked: Any
    ) -> Any:
        """What transformers writes after B rows, by these settings and no others."""
        device = input_device(self._model)
        longest = max(map(len, rows))
        ids = np.full((len(rows), longest), settings.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for n, row in enumerate(rows):  # padded on the left, as the model writes on the right
            ids[n, longest - len(row) :] = row
            mask[n, longest - len(row) :] = 1
        # transformers would fill up what settings leave open by those that came with the model.
        model: Any = self._model  # whose `generate` has no types
        kept, model.generation_config = model.generation_config, settings
        try:
            return model.generate(
                input_ids=torch.from_numpy(ids).to(device),
                attention_mask=torch.from_numpy(mask).to(device),
                **asked,
            )
        finally:
            model.generation_config = kept

    def _ids_of(self, prompts: Sequence[Conversation | str]) -> Iterator[np.ndarray | str]:
        """The tokens of each prompt; of one that cannot be read, why."""
        chats = [one for one in prompts if isinstance(one, Conversation)]
        texts = [one for one in prompts if isinstance(one, str)]
        if chats:
            assert isinstance(self._encoder, ChatEncoder)
            rows: Iterator[np.ndarray | str] = iter(self._encoder.prompt_ids(chats))
        else:
            encoded = self._encoder.encode(texts, [False] * len(texts))
            rows = iter([one.ids for one in encoded])
        for ids in rows:
            if isinstance(ids, str):
                yield ids
            elif len(ids) == 0:
                yield "it has no token"
            elif self._room is not None and len(ids) > self._room:
                yield f"its {len(ids):,} tokens leave no room for an answer"
            else:
                yield ids

    def _batch(self, rows: Sequence[np.ndarray], seed: Sequence[int]) -> list[list[int]]:
        """What is written after each of B rows, from the first new token on."""
        longest, device = max(map(len, rows)), input_device(self._model)
        drawn = int(np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0] >> 1)
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(drawn)
                whole = self._generate(rows, self._written_with)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise ModelError(
                f"memory does not suffice to answer {len(rows)} prompts of {longest} tokens at a "
                "time; set a smaller generated.batch_size. What has been written is kept"
            ) from error
        new: list[list[int]] = whole[:, longest:].tolist()
        return new

    def _read(self, ids: Sequence[int], is_answer: bool) -> WrittenAnswer:
        """What a model's tokens say; `is_answer`: behind a template, where no space is before."""
        vocabulary = self._encoder.vocabulary
        data, ends, tokens = b"", False, 0
        for id_ in ids:
            token = vocabulary.token_bytes[id_]
            ends = id_ in self._ends
            if ends or token is None:
                break
            if not data and is_answer and self._encoder.has_dummy_prefix:
                token = token[1:] if vocabulary.may_be_dummy[id_] else token
            data, tokens = data + token, tokens + 1
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:  # half a character, or bytes that are none
            text, ends = data[: error.start].decode("utf-8"), False
        return WrittenAnswer(text, ends, tokens)
