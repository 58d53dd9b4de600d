"""Several models of different tokenizers as one, at inference: a mixture over the target's tokens.

A source speaks in its own tokens. By the common partition (docs/method.md) each token v of the
target is in a class c that the source can tell apart as well. What the source says of v is the
mass that it gives the class, divided inside it as the target divides it:

    p_s(v) = P_s(c) · p_t(v) / P_t(c)

where P_s(c) is a sum over the source's tokens of the class, and P_t(c) over the target's. Mass on
special tokens of the source (but EOS), and on classes that no token of the target is in, is left
out beforehand. Over all v these sum to one, as the P_s(c) do. The ensemble is the mean

    p(v) = Σ_m w_m p_m(v) / Σ_m w_m

over the target and the sources that are awake. `uniform`: all w are equal. `bayes`: all begin
equal, and after each token those that were awake are multiplied by p_m(v) / p(v), which leaves
their sum as it is; who sleeps keeps its weight (specialists that sleep: Freund et al. 1997, doi
10.1145/258533.258616). Where none ever sleeps that is Bayes' rule: the ensemble costs at most
log(M) nats more for a text than the best of M members.

*Example.* A source gives the class {`·re`, `·rep`} 0.5, the target 0.4, of which `·rep` has 0.1.
Then the source's p(`·rep`) is 0.5 · 0.1 / 0.4 = 0.125, and the plain mean 0.1125.

What a source says may depend on nothing but the text so far, or the ensemble would know part of
what it is to predict. So it is asked wherever the target is. Where its own token spans the place,
it reads the 64 tokens before that token, and the rest of the bytes as its tokenizer would spell
them if the text ended there (`generate` has it read all of the text so). That it is asked with less
before it there, and where its tokens before the rest end, are traces of what follows, and all that
is left of it. A source sleeps where no text of its own can end: within a character, beside a dummy
space that only one of the two writes, before anything is read if nothing is put before a text; and
where it cannot read a text at all.

What a source says after the rest is not healed: a tokenizer that has `;` and a line end as one
token is asked, after `;` alone, for what it has never read there. `bayes` learns how far to trust
it.

M members, the target first; N positions of the target, all texts one after another.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, get_args

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fusellm.alignment.strategies import boundary_aligner, vocabulary_map
from fusellm.alignment.translation import VocabularyMap, as_continuations
from fusellm.arrays.outcome_sets import OutcomeSets
from fusellm.arrays.ragged import offsets_of
from fusellm.arrays.source_distributions import tokens_of_texts
from fusellm.arrays.tokens import Tokens
from fusellm.config.study import EnsembleWeights
from fusellm.errors import ArgumentError, NumericsError
from fusellm.evaluation.text.masses import SetQuestions, log_masses
from fusellm.fusion.cross_entropy import nats_by_byte
from fusellm.models.adapters import without_adapters
from fusellm.models.configurations import context_tokens
from fusellm.models.heads import head_of, hidden_states, input_device, left_as_it_was
from fusellm.progress import Progress, Silent
from fusellm.reading.encoded_texts import encoded_for
from fusellm.tokens.encode import Encoded, Encoder, as_encoder

_RECALLED = 64  # tokens that a source reads before a rest of bytes that its own token spans
RULE = 1
"""Of how an ensemble's text is predicted: what was measured by another one is measured anew."""
_TINY = float(np.finfo(float).tiny)


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
        """One that is a member already, or a loaded model with its tokenizer.

        Raises:
            ArgumentError: it is neither.
        """
        if isinstance(given, Member):
            return given
        pair = given if isinstance(given, tuple) and len(given) == 2 else (None, None)
        model, tokenizer = pair
        base = None if model is None else without_adapters(model)
        if not isinstance(base, PreTrainedModel) or tokenizer is None:
            kinds = [type(one).__name__ for one in pair if one is not None]
            raise ArgumentError(
                "a member is (model, tokenizer), the model first, as fusellm.load_pretrained gives "
                f"them; this is {' and '.join(kinds) or type(given).__name__}"
            )
        rows = base.config.get_text_config().vocab_size
        return cls(as_encoder(tokenizer, rows), lambda: pair[0])


class Ensemble:
    """A target and sources as one model of the target's tokens; nothing is trained.

    >>> from fusellm import load_pretrained
    >>> models = {n: load_pretrained(f"zoo/{n}", device="cpu") for n in ("prose", "python", "cpp")}
    >>> target = models.pop("prose")
    >>> ensemble = Ensemble(target, models)
    >>> alone = Ensemble(target, {})
    >>> text = "for name in names:\\n    print(name)\\n"
    >>> [round(float(np.nansum(one.nats([text])[0]))) for one in (alone, ensemble)]
    [47, 43]
    >>> ensemble.generate("import numpy as", max_new_tokens=1)
    ' np'
    """

    def __init__(
        self,
        target: Member | tuple[PreTrainedModel, Encoder | PreTrainedTokenizerBase],
        sources: Mapping[str, Member | tuple[PreTrainedModel, Encoder | PreTrainedTokenizerBase]],
        weights: EnsembleWeights = "uniform",
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
        known = get_args(EnsembleWeights)
        if weights not in known:
            raise ArgumentError(f"there are no weights {weights!r}; known: {', '.join(known)}")
        self.weights, self._progress = weights, progress or Silent()
        self._target = Member.of(target)
        self._sources = {name: Member.of(source) for name, source in sources.items()}
        self._voices = {
            name: _Voice.of(source.encoder, self._target.encoder, self._progress)
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
            NumericsError: a member gives NaN or infinity.
        """
        encoded = self._target.encoder.encode(texts, last)
        tokens = tokens_of_texts(encoded)
        said = self._said(texts, last, tokens, batch_tokens)
        mixed = np.zeros(said.log_probs.shape[1])
        bounds = tokens.position_offsets.tolist()
        for start, stop in pairwise(bounds):
            mixed[start:stop] = self._mixed(said, range(start, stop))[0]
        offsets = offsets_of(np.array([len(text.encode()) for text in texts], dtype=np.int64))
        by_byte = nats_by_byte(tokens.ends, tokens.offsets, mixed, offsets, tokens.prefix_tokens)
        return [
            None if block.ends is None else by_byte[offsets[n] : offsets[n + 1]]
            for n, block in enumerate(encoded)
        ]

    def _mixed(self, said: "_Said", positions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(log p of the true tokens at a text's positions, [M] log-weights after them)."""
        weights = np.zeros(len(said.log_probs))
        means = np.zeros(len(positions))
        for place, n in enumerate(positions):
            means[place], after = _mean(said.log_probs[:, n], said.awake[:, n], weights)
            if self.weights == "bayes" and said.asked[n]:
                weights = after
        return means, weights

    def _said(
        self,
        texts: Sequence[str],
        last: Sequence[bool] | None,
        tokens: Tokens,
        batch_tokens: int | None,
    ) -> "_Said":
        """What every member gives the true next token of each position."""
        true = tokens.ids[tokens.predicting + 1]
        single = np.arange(len(self._target.encoder.vocabulary))
        questions = [
            SetQuestions(np.arange(len(true)), true, OutcomeSets(single, single + 1, single))
        ]
        places: dict[str, _Places] = {}
        for name, voice in self._voices.items():
            encoded = self._sources[name].encoder.encode(texts, last)
            places[name] = voice.places(texts, encoded, tokens)
            at = places[name].positions
            questions.append(SetQuestions(at, voice.of_target[true[at]], voice.target_sets))
        read = np.split(tokens.ids, tokens.offsets[1:-1])
        own, *of_classes = self._ask("the target", texts, last, read, questions, batch_tokens)
        log_probs = np.full((1 + len(places), len(true)), -np.inf)
        awake = np.zeros(log_probs.shape, dtype=np.bool_)
        log_probs[0], awake[0] = own, True
        for m, (name, there) in enumerate(places.items(), start=1):
            voice, order = self._voices[name], np.argsort(there.rows, kind="stable")
            rows, numbers = there.rows[order], voice.of_target[true[there.positions[order]]]
            asked = [SetQuestions(rows, numbers, voice.source_sets)]
            (answer,) = self._ask(name, texts, last, there.ids, asked, batch_tokens)
            of_class = answer[np.argsort(order)]
            positions = there.positions
            log_probs[m, positions] = of_class + own[positions] - of_classes[m - 1]
            awake[m, positions] = True
        return _Said(log_probs, awake, tokens.asked)

    def _ask(
        self,
        name: str,
        texts: Sequence[str],
        last: Sequence[bool] | None,
        ids: Sequence[np.ndarray],
        questions: Sequence[SetQuestions],
        batch_tokens: int | None,
    ) -> list[np.ndarray]:
        """What a member answers; `ids` are the rows that it reads, the texts' first.

        Raises:
            ArgumentError: a text is too long for it.
            NumericsError: it gives NaN.
        """
        member = self._sources.get(name, self._target)
        model = member.load()
        encoded_for(model, member.encoder, texts, last)
        left_out = None  # of the target nothing, as where it is measured alone
        base = without_adapters(model)
        if name in self._voices:
            left_out = self._voices[name].left_out(len(head_of(base).weight))
        shown = self._progress.start(f"asking {name}", len(ids), "rows")
        with left_as_it_was(model), shown as bar:
            model.eval()
            answers = log_masses(base, ids, questions, left_out, batch_tokens, bar.advance)
        if any(np.isnan(answer).any() for answer in answers):
            raise _broken(name)
        return answers

    def generate(self, prompt: str, max_new_tokens: int = 64) -> str:
        """The most probable continuation, token by token (greedy).

        Each token asks every model anew from the prompt's beginning: for looking at, not for
        serving. A source reads the text so far as its tokenizer cuts that, though it may cut it
        otherwise once the text goes on (no token healing); where it cannot read it, as within a
        character or beyond its context, it sleeps.

        Args:
            prompt: text that all members read.
            max_new_tokens: of the target; fewer if it ends the text, or its context does.

        Raises:
            ArgumentError: the prompt is empty, the target's tokenizer changes it, or it is too
                long for a member.
            NumericsError: a member gives NaN or infinity.
        """
        (block,) = self._target.encoder.encode([prompt], [False])
        if block.ends is None or not prompt:
            raise ArgumentError(
                f"the target's tokenizer cannot read the prompt {prompt[:40]!r} as it is; give "
                "other text"
            )
        members = [self._target, *self._sources.values()]
        models = [member.load() for member in members]
        for model, member in zip(models, members, strict=True):
            encoded_for(model, member.encoder, [prompt], [False])
        weights = self._weights_after(prompt)
        vocabulary, room = self._target.encoder.vocabulary, _room(models[0])
        ids, written = block.ids, b""
        for _ in range(max_new_tokens):
            if len(ids) > room:
                break
            given = list(self._next(models, ids, prompt.encode() + written))
            awake = np.array([one is not None for one in given])
            share = np.exp(weights[awake] - np.logaddexp.reduce(weights[awake]))
            spoken = np.stack([one for one in given if one is not None])
            chosen = int((share[:, None] * spoken).sum(axis=0).argmax())
            token = vocabulary.token_bytes[chosen]
            if not vocabulary.is_text[chosen] or token is None:
                break
            if self.weights == "bayes":
                log_probs = np.zeros(len(given))
                with np.errstate(divide="ignore"):
                    log_probs[awake] = np.log(spoken[:, chosen])
                weights = _mean(log_probs, awake, weights)[1]
            ids, written = np.append(ids, chosen), written + token
        return written.decode("utf-8", "replace")

    def _weights_after(self, prompt: str) -> np.ndarray:
        """[M] log-weights."""
        if self.weights == "uniform":
            return np.zeros(1 + len(self._sources))
        tokens = tokens_of_texts(self._target.encoder.encode([prompt], [False]))
        said = self._said([prompt], [False], tokens, None)
        return self._mixed(said, range(len(said.asked)))[1]

    @torch.no_grad()
    def _next(
        self, models: Sequence[PreTrainedModel], ids: np.ndarray, text: bytes
    ) -> Iterator[np.ndarray | None]:
        """Of each member [Vt] what comes next in the target's tokens; None where it sleeps."""
        size = len(self._target.encoder.vocabulary)
        target = _last_probabilities("the target", models[0], ids)[:size]
        yield target
        for model, (name, source) in zip(models[1:], self._sources.items(), strict=True):
            block = None
            with suppress(UnicodeDecodeError):  # within a character
                (block,) = source.encoder.encode([text.decode("utf-8")], [False])
            if block is None or block.ends is None or len(block.ids) > _room(model):
                yield None
            else:
                said = _last_probabilities(name, model, block.ids)
                yield self._voices[name].spoken(said, target)


class _Said(NamedTuple):
    """What members give the true next tokens.

    Attributes:
        log_probs: [M, N] nats; −inf where a member sleeps.
        awake: [M, N] bool.
        asked: [N] bool, whether the target is asked for the token there.
    """

    log_probs: np.ndarray
    awake: np.ndarray
    asked: np.ndarray


class _Places(NamedTuple):
    """Where a source is asked.

    Attributes:
        ids: rows of tokens that it reads: the texts, then a row for each place that a token spans.
        positions: [Q] of the target, ascending.
        rows: [Q] positions of the source, all rows one after another.
    """

    ids: list[np.ndarray]
    positions: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True, eq=False)
class _Voice:
    """A source beside the target: U classes, and U for what has none.

    Attributes:
        of_target: [Vt] class of each target id.
        of_source: [Vs] class of each source id; U + 1 for what is left out.
        lost: U + 1, or how many sets of the target's ids there are.
    """

    source: Encoder
    target: Encoder
    map_: VocabularyMap
    of_target: np.ndarray
    of_source: np.ndarray
    lost: int

    @classmethod
    def of(cls, source: Encoder, target: Encoder, progress: Progress) -> "_Voice":
        """The two by the common partition."""
        map_ = vocabulary_map(source, target, progress=progress)
        u = map_.outcomes
        of_target = np.where(map_.outcome_of_target < 0, u, map_.outcome_of_target)
        of_source = np.where(map_.outcome_of_source < 0, u, map_.outcome_of_source)
        special = ~source.vocabulary.is_text & (map_.outcome_of_source < 0)
        there = np.bincount(of_target, minlength=u + 1) > 0
        of_source = np.where(special | ~there[of_source], u + 1, of_source)
        return cls(source, target, map_, of_target, of_source, u + 1)

    @cached_property
    def target_sets(self) -> OutcomeSets:
        """The target's ids of each class."""
        return OutcomeSets.of(self.of_target, self.lost)

    @cached_property
    def source_sets(self) -> OutcomeSets:
        """The source's ids of each class, and of what is left out."""
        return OutcomeSets.of(self.of_source, self.lost + 1)

    def left_out(self, rows: int) -> np.ndarray:
        """The source's ids that count for nothing, of a head of so many rows."""
        known = np.flatnonzero(self.of_source[:rows] == self.lost)
        return np.concatenate([known, np.arange(len(self.of_source), rows)])

    def spoken(self, said: np.ndarray, target: np.ndarray) -> np.ndarray | None:
        """[Vt] the source's distribution in the target's tokens; None if nothing of it is left.

        Args:
            said: the source's, [Vs] and what more its head has.
            target: [Vt] the target's.
        """
        said = said[: len(self.of_source)]
        masses = np.bincount(self.of_source[: len(said)], said, self.lost + 1)[: self.lost]
        of_target = self.of_target[: len(target)]
        own = np.bincount(of_target, target, self.lost)
        masses[own == 0] = 0
        if masses.sum() == 0:
            return None
        return np.asarray(target * (masses / masses.sum() / np.maximum(own, _TINY))[of_target])

    def places(self, texts: Sequence[str], encoded: Sequence[Encoded], target: Tokens) -> _Places:
        """Where the source is asked for what follows the target's positions.

        Args:
            encoded: the texts as the source reads them.
            target: the texts as the target does.
        """
        read = tokens_of_texts(encoded)
        aligned = boundary_aligner(self.source, self.target, self.map_)(target, read)
        block = np.repeat(np.arange(len(texts)), np.diff(target.position_offsets))
        ids = [row.ids if row.ends is not None else row.ids[:0] for row in encoded]
        here = np.flatnonzero(aligned.source >= 0)
        rows = read.position_offsets[block[here]] + aligned.source[here]
        spanned = self._spanned(texts, encoded, target, block, aligned.source, aligned.first)
        first = int(read.position_offsets[-1])
        lengths = np.array([len(row) - 1 for _, row in spanned], dtype=np.int64)
        ends = first + np.cumsum(lengths) - 1
        positions = np.concatenate([here, np.array([n for n, _ in spanned], dtype=np.int64)])
        every = np.concatenate([rows, ends])
        order = np.argsort(positions, kind="stable")
        return _Places(ids + [row for _, row in spanned], positions[order], every[order])

    def _spanned(
        self,
        texts: Sequence[str],
        encoded: Sequence[Encoded],
        target: Tokens,
        block: np.ndarray,
        aligned: np.ndarray,
        first: np.ndarray,
    ) -> list[tuple[int, np.ndarray]]:
        """(position, row of the source's tokens) where its token spans the target's boundary.

        The row ends with a token that is not read: a model is asked what comes before it.
        """
        ends = target.ends[target.predicting]
        data = [text.encode() for text in texts]
        waiting: list[tuple[int, int, int, bytes]] = []
        beginnings: list[tuple[int, bytes]] = []
        for n in np.flatnonzero((aligned < 0) & ~first).tolist():
            text, end = int(block[n]), int(ends[n])
            own = encoded[text].ends
            if own is None or end == 0:
                continue
            read = int(np.searchsorted(own, end, side="right"))  # tokens that end there or before
            begin = int(own[read - 1]) if read else 0
            if begin == 0:
                beginnings.append((n, data[text][:end]))
            elif begin < end:  # where it has a boundary, and no position, a document ends
                waiting.append((n, text, read, data[text][begin:end]))
        rows = self._begun(beginnings)
        spelled = as_continuations(self.source, {rest for *_, rest in waiting})
        for n, text, read, rest in waiting:
            tail = spelled[rest]
            if tail is not None:
                whole, prefix = encoded[text].ids, encoded[text].prefix_tokens
                before = whole[max(prefix, read - _RECALLED) : read]
                parts = (whole[:prefix], before, tail.ids, tail.ids[-1:])
                rows.append((n, np.concatenate(parts).astype(np.int64)))
        return rows

    def _begun(self, places: Sequence[tuple[int, bytes]]) -> list[tuple[int, np.ndarray]]:
        """The same where the token that spans the place is a text's first."""
        rows = []
        for n, start in places:
            with suppress(UnicodeDecodeError):  # within a character
                (block,) = self.source.encode([start.decode("utf-8")], [False])
                if block.ends is not None:
                    rows.append((n, np.append(block.ids, block.ids[-1])))
        return rows


def _mean(
    log_probs: np.ndarray, awake: np.ndarray, log_weights: np.ndarray
) -> tuple[float, np.ndarray]:
    """(log of the weighted mean over those awake, [M] log-weights after Bayes' rule).

    >>> awake = np.array([True, True, False])
    >>> mean, after = _mean(np.log([0.2, 0.6, 1]), awake, np.zeros(3))
    >>> round(float(np.exp(mean)), 3), np.exp(after).round(3).tolist()
    (0.4, [0.5, 1.5, 1.0])
    """
    own, weights = log_probs[awake], log_weights[awake]
    joint = float(np.logaddexp.reduce(own + weights))
    if joint == -np.inf:
        return joint, log_weights
    mean = joint - float(np.logaddexp.reduce(weights))
    after = log_weights.copy()
    after[awake] += own - mean
    return mean, after


def _room(model: PreTrainedModel) -> float:
    """Tokens that a model reads at most."""
    return context_tokens(without_adapters(model).config) or float("inf")


def _last_probabilities(name: str, model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """[V] float64 what comes after some tokens.

    Raises:
        NumericsError: that is no distribution.
    """
    inputs = torch.from_numpy(ids)[None].to(input_device(model))
    with left_as_it_was(model):
        model.eval()
        hidden = hidden_states(without_adapters(model), input_ids=inputs)[0, -1:]
        logits = head_of(without_adapters(model)).logits(hidden)[0]
    probabilities: np.ndarray = torch.softmax(logits.double(), dim=-1).cpu().numpy()
    if not np.isfinite(probabilities).all():
        raise _broken(name)
    return probabilities


def _broken(name: str) -> NumericsError:
    return NumericsError(
        f"{name} gives NaN or infinity, of which no ensemble can be made; load it in float32 or "
        "bfloat16, or leave it out"
    )
