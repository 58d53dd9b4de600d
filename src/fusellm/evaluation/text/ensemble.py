"""Several models of different tokenizers as one, at inference: a mixture over the target's tokens.

A source speaks in its own tokens. By the common partition (docs/method.md) each token v of the
target is in a class c that the source can tell apart as well. What the source says of v is the
mass that it gives the class, divided inside it as the target divides it:

    p_s(v) = P_s(c) · p_t(v) / P_t(c)

where P_s(c) is a sum over the source's tokens of the class, and P_t(c) over the target's. Mass on
tokens whose class no token of the target is in (the source's special tokens, as a rule) is left out
beforehand. Over all v these sum to one, as the P_s(c) do over all classes. The ensemble is the mean

    p(v) = Σ_m w_m p_m(v) / Σ_m w_m

over the target and those sources that have read the same bytes; the others sleep at this position.
`uniform`: all w are equal. `bayes`: all begin equal, and after each token those that were awake are
multiplied by p_m(v) / p(v), which leaves their sum as it is; who sleeps keeps its weight
(specialists that sleep: Freund et al. 1997, doi 10.1145/258533.258616). Where none ever sleeps that
is Bayes' rule: the ensemble costs at most log(M) nats more for a text than the best of M members.

*Example.* A source gives the class {`·re`, `·rep`} 0.5, the target 0.4, of which `·rep` has 0.1.
Then the source's p(`·rep`) is 0.5 · 0.1 / 0.4 = 0.125, and the plain mean 0.1125.

Which of a source's tokens end where the target's do is seen in the whole text, as for fusion: the
bytes that come next have a small say in who is awake.

M members, the target first; N positions of the target, all texts one after another; Q questions to
a model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fusellm.alignment.strategies import boundary_aligner, vocabulary_map
from fusellm.alignment.translation import VocabularyMap
from fusellm.arrays.outcome_sets import OutcomeSets
from fusellm.arrays.source_distributions import tokens_of_texts
from fusellm.arrays.tokens import Tokens
from fusellm.errors import ArgumentError
from fusellm.fusion.cross_entropy import nats_by_byte
from fusellm.models.adapters import without_adapters
from fusellm.models.heads import head_of, hidden_states, input_device, left_as_it_was
from fusellm.objective.chunked import Head
from fusellm.progress import Progress, Silent
from fusellm.reading.batches import read_blocks
from fusellm.reading.encoded_texts import encoded_for
from fusellm.tokens.encode import Encoder, as_encoder

_TINY = float(np.finfo(float).tiny)
Weights = Literal["uniform", "bayes"]


@dataclass(frozen=True, eq=False)
class Member:
    """A model of an ensemble, in memory only while it is asked.

    Attributes:
        encoder: its tokenizer.
        load: gives the model.
    """

    encoder: Encoder
    load: Callable[[], PreTrainedModel]

    @classmethod
    def of(
        cls, given: "Member | tuple[PreTrainedModel, Encoder | PreTrainedTokenizerBase]"
    ) -> "Member":
        """One that is a member already, or a loaded model with its tokenizer."""
        if isinstance(given, Member):
            return given
        try:
            model, tokenizer = given
        except (TypeError, ValueError):
            raise ArgumentError(
                f"a member is a model with its tokenizer, and this is a {type(given).__name__}; "
                "give (model, tokenizer), as fusellm.load_pretrained does"
            ) from None
        rows = without_adapters(model).config.get_text_config().vocab_size
        return cls(as_encoder(tokenizer, rows), lambda: model)


class Ensemble:
    """A target and sources as one model of the target's tokens; nothing is trained.

    >>> from fusellm import load_pretrained
    >>> models = {n: load_pretrained(f"zoo/{n}", device="cpu") for n in ("prose", "python", "cpp")}
    >>> target = models.pop("prose")
    >>> ensemble = Ensemble(target, models)
    >>> alone = Ensemble(target, {})
    >>> text = "for name in names:\\n    print(name)\\n"
    >>> [round(float(np.nansum(one.nats([text])[0]))) for one in (alone, ensemble)]
    [35, 24]
    >>> ensemble.generate("import numpy as", max_new_tokens=1)
    ' np'
    """

    def __init__(
        self,
        target: Member | tuple[PreTrainedModel, Encoder | PreTrainedTokenizerBase],
        sources: Mapping[str, Member | tuple[PreTrainedModel, Encoder | PreTrainedTokenizerBase]],
        weights: Weights = "uniform",
        *,
        progress: Progress | None = None,
    ) -> None:
        """Map the sources' vocabularies; no model is asked yet.

        Args:
            target: a loaded model with its tokenizer, as `fusellm.load_pretrained` gives it; or a
                `Member`, whose model is in memory only while it is asked.
            sources: likewise, by name.
            weights: `uniform` or `bayes`, as above.
            progress: is shown how far it is, here and later.

        Raises:
            ArgumentError: there are no such weights, or a member is none.
            TokenizerError: a tokenizer's tokens cannot be told as bytes.
        """
        if weights not in get_args(Weights):
            raise ArgumentError(
                f"there are no weights {weights!r}; known: {', '.join(get_args(Weights))}"
            )
        self.weights, self._progress = weights, progress or Silent()
        self._target = Member.of(target)
        self._sources = {name: Member.of(source) for name, source in sources.items()}
        self._maps = {
            name: vocabulary_map(source.encoder, self._target.encoder, progress=progress)
            for name, source in self._sources.items()
        }

    def nats(
        self,
        texts: Sequence[str],
        last: Sequence[bool] | None = None,
        batch_tokens: int | None = None,
    ) -> list[np.ndarray | None]:
        """What texts cost the ensemble, each read from its beginning.

        Args:
            last: of each text, whether it ends a document, and so is followed by EOS; all do if
                None.
            batch_tokens: of one forward pass, padding included; None for what suits the device.

        Returns:
            Of each text [its bytes] float64 nats by byte, NaN where the target predicts nothing;
            None where the target's tokenizer changes the text.

        Raises:
            ArgumentError: a text is too long for a member.
        """
        encoder = self._target.encoder
        encoded = encoder.encode(texts, last)
        tokens = tokens_of_texts(encoded)
        log_probs, asked = self._log_probs(texts, last, tokens, batch_tokens)
        mixed = np.zeros(log_probs.shape[1])
        for start, stop in zip(tokens.position_offsets, tokens.position_offsets[1:], strict=False):
            weights = np.zeros(len(log_probs))
            for n in range(start, stop):
                mixed[n], after = _mixed(log_probs[:, n], weights)
                if self.weights == "bayes" and asked[n]:
                    weights = after
        lengths = np.array([len(text.encode()) for text in texts])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        by_byte = nats_by_byte(tokens.ends, tokens.offsets, mixed, offsets, tokens.prefix_tokens)
        return [
            None if block.ends is None else by_byte[offsets[n] : offsets[n + 1]]
            for n, block in enumerate(encoded)
        ]

    def _log_probs(
        self,
        texts: Sequence[str],
        last: Sequence[bool] | None,
        tokens: Tokens,
        batch_tokens: int | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """([M, N] log p_m of the true next token, NaN where a member sleeps; [N] tokens.asked)."""
        block = np.repeat(np.arange(len(texts)), np.diff(tokens.position_offsets))
        true = tokens.ids[tokens.predicting + 1]
        every = np.arange(len(true))
        single = np.arange(len(self._target.encoder.vocabulary))
        about_target = [_Question(every, true, OutcomeSets(single, single + 1, single))]
        of_source, nowhere = [], []
        for name, source in self._sources.items():
            map_, read = self._maps[name], tokens_of_texts(source.encoder.encode(texts, last))
            aligned = boundary_aligner(source.encoder, self._target.encoder, map_)(tokens, read)
            there = np.flatnonzero(aligned.source >= 0)
            rows = read.position_offsets[block[there]] + aligned.source[there]
            classes = _class_of(map_.outcome_of_target, map_)[true[there]]
            about_target.append(_Question(there, classes, map_.sets))
            of_source.append((there, _Question(rows, classes, _source_sets(map_))))
            nowhere.append(_Question(rows, np.ones_like(rows), _without_target(map_)))
        own, *of_classes = self._ask(
            "the target", self._target, texts, last, about_target, batch_tokens
        )
        log_probs = np.full((1 + len(of_source), len(true)), np.nan)
        log_probs[0] = own
        for m, (name, source) in enumerate(self._sources.items()):
            there, question = of_source[m]
            asked = [question, nowhere[m]]
            of_class, lost = self._ask(name, source, texts, last, asked, batch_tokens)
            said = of_class - np.log1p(-np.exp(lost))
            log_probs[m + 1, there] = said + own[there] - of_classes[m]
        return log_probs, tokens.asked

    def _ask(
        self,
        name: str,
        member: Member,
        texts: Sequence[str],
        last: Sequence[bool] | None,
        questions: Sequence["_Question"],
        batch_tokens: int | None,
    ) -> list[np.ndarray]:
        model = member.load()
        _, encoded = encoded_for(model, member.encoder, texts, last)
        ids = [block.ids if block.ends is not None else block.ids[:0] for block in encoded]
        shown = self._progress.start(f"asking {name}", len(texts), "texts")
        with left_as_it_was(model), shown as bar:
            model.eval()
            # Of a source's head only rows that are tokens count; of the target's all, as where
            # it is measured alone.
            rows = None if member is self._target else len(member.encoder.vocabulary)
            asked = without_adapters(model), ids, questions, rows, batch_tokens
            return _answers(*asked, bar.advance)

    def generate(self, prompt: str, max_new_tokens: int = 64) -> str:
        """The most probable continuation, token by token (greedy).

        Each token asks every model anew from the prompt's beginning: for looking at, not for
        serving. A source reads the text so far as its tokenizer cuts that, though it may cut it
        otherwise once the text goes on (no token healing); where it cannot read it, as within a
        character, it sleeps.

        Args:
            prompt: text that all members read.
            max_new_tokens: of the target; fewer if it ends the text.

        Raises:
            ArgumentError: the prompt is empty, or the target's tokenizer changes it.
        """
        (block,) = self._target.encoder.encode([prompt], [False])
        if block.ends is None or not prompt:
            raise ArgumentError(
                f"the target's tokenizer cannot read the prompt {prompt[:40]!r} as it is; give "
                "other text"
            )
        models = [member.load() for member in (self._target, *self._sources.values())]
        weights = self._weights_after(prompt)
        vocabulary = self._target.encoder.vocabulary
        ids, written = block.ids, b""
        for _ in range(max_new_tokens):
            given = np.stack(list(self._next(models, ids, prompt.encode() + written)))
            awake = ~np.isnan(given[:, 0])
            share = np.exp(weights[awake] - np.logaddexp.reduce(weights[awake]))
            chosen = int((share[:, None] * given[awake]).sum(axis=0).argmax())
            token = vocabulary.token_bytes[chosen]
            if not vocabulary.is_text[chosen] or token is None:
                break
            if self.weights == "bayes":
                with np.errstate(divide="ignore"):
                    weights = _mixed(np.log(given[:, chosen]), weights)[1]
            ids, written = np.append(ids, chosen), written + token
        return written.decode("utf-8", "replace")

    def _weights_after(self, prompt: str) -> np.ndarray:
        weights = np.zeros(1 + len(self._sources))
        if self.weights == "uniform":
            return weights
        tokens = tokens_of_texts(self._target.encoder.encode([prompt], [False]))
        log_probs, asked = self._log_probs([prompt], [False], tokens, None)
        for n in np.flatnonzero(asked):
            weights = _mixed(log_probs[:, n], weights)[1]
        return weights

    @torch.no_grad()
    def _next(
        self, models: Sequence[PreTrainedModel], ids: np.ndarray, text: bytes
    ) -> Iterator[np.ndarray]:
        """Of each member [Vt] what comes next in the target's tokens; NaN where it sleeps."""
        size = len(self._target.encoder.vocabulary)
        target = _last_probabilities(models[0], ids)[:size]
        yield target
        for model, (name, source) in zip(models[1:], self._sources.items(), strict=True):
            map_ = self._maps[name]
            try:
                (block,) = source.encoder.encode([text.decode("utf-8")], [False])
            except UnicodeDecodeError:
                yield np.full(size, np.nan)
                continue
            if block.ends is None or not len(block.ids):
                yield np.full(size, np.nan)
                continue
            said = _last_probabilities(model, block.ids)[: len(map_.outcome_of_source)]
            of_source = _class_of(map_.outcome_of_source, map_)[: len(said)]
            of_target = _class_of(map_.outcome_of_target, map_)[: len(target)]
            masses = np.bincount(of_source, said, map_.outcomes + 1)
            own = np.bincount(of_target, target, map_.outcomes + 1)
            masses[own == 0] = 0
            yield target * (masses / masses.sum() / np.maximum(own, _TINY))[of_target]


@dataclass(frozen=True)
class _Question:
    """How probable sets of a model's ids are, at some of its positions.

    Attributes:
        rows: [Q] positions, ascending; of all texts one after another.
        numbers: [Q] sets.
        sets: of the model's own ids.
    """

    rows: np.ndarray
    numbers: np.ndarray
    sets: OutcomeSets


def _class_of(outcome: np.ndarray, map_: VocabularyMap) -> np.ndarray:
    """The class of each id; those without one are together the last."""
    return np.where(outcome < 0, map_.outcomes, outcome)


def _source_sets(map_: VocabularyMap) -> OutcomeSets:
    """The source ids of each class, as `map_.sets` has the target's."""
    return OutcomeSets.of(_class_of(map_.outcome_of_source, map_), map_.outcomes + 1)


def _without_target(map_: VocabularyMap) -> OutcomeSets:
    """Set 1: the source ids whose class no target id is in; set 0: the others."""
    there = np.bincount(_class_of(map_.outcome_of_target, map_), minlength=map_.outcomes + 1) > 0
    of_source = there[_class_of(map_.outcome_of_source, map_)]
    return OutcomeSets.of((~of_source).astype(np.int64), 2)


def _answers(
    model: PreTrainedModel,
    ids: Sequence[np.ndarray],
    questions: Sequence[_Question],
    rows: int | None,
    batch_tokens: int | None,
    advance: Callable[[int], None],
) -> list[np.ndarray]:
    """Of each question [Q] float64 log-probabilities.

    Args:
        rows: of the head that count, from the first on; all if None.
    """
    head = head_of(model).widened()
    lengths = np.array([max(len(row) - 1, 0) for row in ids])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    answers = [np.full(len(question.rows), np.nan) for question in questions]

    def use(batch: list[int], hidden: torch.Tensor, _: torch.Tensor) -> None:
        first = 0
        for n in batch:
            stop = first + lengths[n]
            _answer(head, hidden[first:stop], rows, offsets[n], questions, answers)
            first = stop

    for batch, _ in read_blocks(model, ids, batch_tokens, use):
        advance(len(batch))
    return answers


def _answer(
    head: Head,
    hidden: torch.Tensor,
    rows: int | None,
    first: int,
    questions: Sequence[_Question],
    answers: Sequence[np.ndarray],
) -> None:
    """Answer what is asked of one text, whose positions begin at `first`."""
    chunk = head.rows_to_read()
    for start in range(0, len(hidden), chunk):
        logits = head.logits(hidden[start : start + chunk])[:, :rows]
        logits = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
        here = first + start
        for question, answer in zip(questions, answers, strict=True):
            low, high = np.searchsorted(question.rows, [here, here + len(logits)])
            places, numbers = question.rows[low:high] - here, question.numbers[low:high]
            answer[low:high] = _log_masses(logits, places, numbers, question.sets)


def _log_masses(
    log_probs: torch.Tensor, rows: np.ndarray, numbers: np.ndarray, sets: OutcomeSets
) -> np.ndarray:
    """[Q] float64 logs of the sums over sets of ids; −inf of an empty one."""
    ids, which = sets.take(numbers)
    known = ids < log_probs.shape[1]  # a tokenizer may have more tokens than a head has rows
    ids, which = ids[known], which[known]
    place = log_probs.device
    asked = torch.from_numpy(rows[which]).to(place), torch.from_numpy(ids).to(place)
    masses = torch.zeros(len(rows), dtype=torch.float64, device=place)
    masses.index_add_(0, torch.from_numpy(which).to(place), log_probs[asked].double().exp())
    result: np.ndarray = masses.log().cpu().numpy()
    return result


def _mixed(log_probs: np.ndarray, log_weights: np.ndarray) -> tuple[float, np.ndarray]:
    """(log of the weighted mean over those awake, [M] log-weights after Bayes' rule).

    >>> mean, after = _mixed(np.log([0.2, 0.6, np.nan]), np.zeros(3))
    >>> round(float(np.exp(mean)), 3), np.exp(after).round(3).tolist()
    (0.4, [0.5, 1.5, 1.0])
    """
    awake = ~np.isnan(log_probs)
    own, weights = log_probs[awake], log_weights[awake]
    joint = float(np.logaddexp.reduce(own + weights))
    if joint == -np.inf:
        return joint, log_weights
    mean = joint - float(np.logaddexp.reduce(weights))
    after = log_weights.copy()
    after[awake] += own - mean
    return mean, after


def _last_probabilities(model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """[V] float64 what comes after some tokens."""
    inputs = torch.from_numpy(ids)[None].to(input_device(model))
    with left_as_it_was(model):
        model.eval()
        hidden = hidden_states(without_adapters(model), input_ids=inputs)[0, -1:]
        logits = head_of(without_adapters(model)).logits(hidden)[0]
    result: np.ndarray = torch.softmax(logits.double(), dim=-1).cpu().numpy()
    return result
