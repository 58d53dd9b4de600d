"""A conversation as one model reads it: its own template around the text that all models share.

The template is rendered twice: as it is, and with a mark in the place of each text that a message
brings along. Between the marks stands what the template says, and only there special tokens are
special. A text is then looked for in the first rendering, between what stands around its mark in
the second. One that the template strips or rewrites is read as the template has it, and not learnt.
(transformers' own `sanitize_control_tokens`, which is new, does not say where a text stands.)

What stands between two special tokens is cut into tokens as one text, as the model's tokenizer does
it. Only where a token would reach over the beginning or the end of a learnt text, that is cut by
itself, as a model does that writes it. T tokens of a conversation.
"""

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fusellm.errors import TokenizerError
from fusellm.tokens.conversation import Conversation
from fusellm.tokens.encode import Encoded, Encoder
from fusellm.tokens.spelling import TextIds
from fusellm.tokens.text_ids import text_ids_of
from fusellm.tokens.walk import walked

CHANGED = "its chat template changes what is said"
# What templates ask for, or want to be of a form: left as it is, unless it spells a special token.
_STRUCTURE = frozenset({"role", "type", "id", "tool_call_id"})
# Of templates that say the date: one that is the same on every day and machine, as Llama's.
_TODAY = (
    "{%- macro strftime_now(format) -%}"
    "{{ '2024-07-26' if format == '%Y-%m-%d' else '26 Jul 2024' }}"
    "{%- endmacro %}"
)
_TRIES = 100  # of a text's forms, over all of them: texts of white space could fit in many ways
_ANSWER = "b"
_PROBE = Conversation(({"role": "user", "content": "a"},), ()).answered(_ANSWER)


class _UnreadableError(Exception):
    """A conversation that a model cannot read, and why."""


@dataclass(frozen=True)
class _Piece:
    """A part of a rendering.

    Attributes:
        text: of it.
        message: number of the message whose content it is; None for all else.
        is_template: whether the template says it, and not a message.
    """

    text: str
    message: int | None = None
    is_template: bool = False


@dataclass(frozen=True)
class _Part:
    """What a learnt message has of a section's bytes.

    Attributes:
        start, end: bytes of the section.
        learnt: its number among the learnt messages.
        whole: whether it is the message's content as it is.
    """

    start: int
    end: int
    learnt: int
    whole: bool


@dataclass(frozen=True)
class _Section:
    """A special token, or the text between two of them.

    Attributes:
        text: of it; of a special token nothing.
        special: the special token's id.
        parts: what learnt messages have of it, ascending.
        is_first: whether nothing stands before it.
    """

    text: str
    special: int | None = None
    parts: tuple[_Part, ...] = ()
    is_first: bool = False

    @property
    def cuts(self) -> list[int]:
        """Bytes at which a learnt message begins or ends within it."""
        edges = {0, *(edge for part in self.parts for edge in (part.start, part.end))}
        return [*sorted(edges), len(self.text.encode())]


@dataclass(frozen=True)
class _Cut:
    """A section as tokens.

    Attributes:
        ids: of them.
        ends: in bytes of the section, where each ends; of tokens that are not the text's bytes the
            last one has all of them.
        known: [T] bool, whether its bytes are known.
    """

    ids: list[int]
    ends: np.ndarray
    known: np.ndarray


class ChatEncoder(Encoder):
    """A tokenizer that reads conversations by a chat template.

    Its vocabulary's `eos_id` is the token that ends a turn: the special token, if there is one,
    that the template has directly behind what an assistant says.

    Attributes:
        template: in Jinja; transformers renders it in its sandbox.
        system: what this model is told first where a conversation has no system message.
        context_tokens: the longest input of its model, as far as which a conversation is read; None
            where that is not known, or there is no longest.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: int | None = None,
        template: str | None = None,
        system: str | None = None,
        context_tokens: int | None = None,
    ) -> None:
        """Read a tokenizer's tokens, and try its template.

        Args:
            rows: as `Encoder` takes them.
            template: in place of the tokenizer's own.

        Raises:
            TokenizerError: there is none, it raises on a question and an answer, or it does not
                say the answer as it is.
        """
        super().__init__(tokenizer, rows)
        self._name = tokenizer.name_or_path or type(tokenizer).__name__
        own = template or own_template(tokenizer)
        if own is None:
            raise TokenizerError(
                f"{self._name!r} has no chat template, and the corpus is of conversations; give "
                "this model one in the recipe, as chat_template: FILE.jinja, or leave it out"
            )
        self.template, self.system = own, system
        self.context_tokens = context_tokens
        special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = {token.content: token for token in special}
        added = tokenizer.added_tokens_decoder.items()
        self._ids = {token.content: int(id_) for id_, token in added}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._later_ids = _later_ids_of(tokenizer, self._text_ids)
        self.vocabulary = replace(self.vocabulary, eos_id=self._end_of_turn(), prefix_ids=())
        (probe,) = self._encode_whole([_PROBE])
        if probe.predicted is None:
            raise self._says_no_answer()
        first = probe.ids[probe.predicted][0]
        self._has_dummy_prefix = bool(self.vocabulary.may_be_dummy[first])

    def _end_of_turn(self) -> int | None:
        try:
            sections = list(self._sections(_PROBE, self._pieces(_PROBE)))
        except _UnreadableError as error:
            raise TokenizerError(f"{self._name!r}: {error}") from None
        said = [n for n, one in enumerate(sections) if any(part.whole for part in one.parts)]
        if not said:
            raise self._says_no_answer()
        last = sections[said[-1]]
        stands_behind = last.parts[-1].end == len(last.text.encode())
        after = sections[said[-1] + 1 : said[-1] + 2]
        return after[0].special if after and stands_behind else None

    def _says_no_answer(self) -> TokenizerError:
        return TokenizerError(
            f"the chat template of {self._name!r} does not say an answer as it is, so that nothing "
            "can be learnt by it; give this model another one in the recipe, as chat_template: "
            "FILE.jinja"
        )

    @property
    def has_dummy_prefix(self) -> bool:
        """Whether an answer's first token may stand for a space that is not there."""
        return self._has_dummy_prefix

    @property
    def said_around(self) -> tuple[str | None, ...]:
        """The template, what the model is told first, and the special tokens that it knows."""
        named = json.dumps(self.tokenizer.special_tokens_map, sort_keys=True, default=str)
        return (self.template, self.system, named)

    @property
    def prefix_tokens(self) -> int:
        """One: before each learnt text stands a token that has read nothing of it."""
        return 1

    def encode_conversations(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Encode conversations.

        Returns:
            Of each the ids of all that is rendered, boundaries in its shared text, and which tokens
            are predicted: those of learnt messages, and the ends of their turns. Of one that cannot
            be read `ends` is None, and `reason` says why. One that is longer than the model's
            context ends with it: what stands behind is not learnt from this model.
        """
        whole = self._encode_whole(conversations)
        return [within_context(one, self.context_tokens) for one in whole]

    def _encode_whole(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """As `encode_conversations` does, whatever the model's context is."""
        read: list[list[_Section] | str] = []
        for conversation in conversations:
            try:
                read.append(list(self._sections(conversation, self._pieces(conversation))))
            except _UnreadableError as error:
                read.append(str(error))
        cut = iter(self._cut_all([s for one in read if not isinstance(one, str) for s in one]))
        return [
            Encoded(np.zeros(0, dtype=np.int64), None, reason=one)
            if isinstance(one, str)
            else self._joined(conversation, [(section, next(cut)) for section in one])
            for conversation, one in zip(conversations, read, strict=True)
        ]

    def prompt_ids(self, prompts: Sequence[Conversation]) -> list[np.ndarray | str]:
        """The tokens after which this model writes its answer to each prompt.

        They are those that stand before an answer when one is read. Of a prompt that cannot be
        read it is the reason.

        Args:
            prompts: conversations that end with what is to be answered.
        """
        encoded = self._encode_whole([one.answered(_ANSWER) for one in prompts])
        return [
            (one.reason or CHANGED)
            if one.predicted is None
            else one.ids[: int(one.predicted.argmax())]
            for one in encoded
        ]

    def _cut_all(self, sections: Sequence[_Section]) -> list[_Cut]:
        """Sections as tokens, many at once.

        A section is cut as one text. Where a token would reach over the beginning or the end of a
        learnt message, what is before, in and behind it are cut each by itself.
        """
        wholes = self._tokens([(s.text, s.is_first) for s in sections])
        apart: list[tuple[int, list[int]]] = []
        pieces: list[tuple[str, bool]] = []
        for n, (section, one) in enumerate(zip(sections, wholes, strict=True)):
            cuts = section.cuts
            if section.parts and not (one.known.all() and set(cuts) <= {0, *one.ends.tolist()}):
                apart.append((n, cuts))
                data = section.text.encode()
                pieces += [
                    (data[a:b].decode(), section.is_first and a == 0) for a, b in pairwise(cuts)
                ]
        each = iter(self._tokens(pieces))
        for n, cuts in apart:
            of_pieces = [(start, next(each)) for start in cuts[:-1]]
            wholes[n] = _Cut(
                [id_ for _, one in of_pieces for id_ in one.ids],
                np.concatenate([start + one.ends for start, one in of_pieces]),
                np.concatenate([one.known for _, one in of_pieces]),
            )
        return wholes

    def _tokens(self, texts: Sequence[tuple[str, bool]]) -> list[_Cut]:
        """Texts as tokens, each with whether nothing stands before it."""
        rows = [list[int]() for _ in texts]
        for first, ids_of in ((True, self._text_ids), (False, self._later_ids)):
            own = [n for n, (_, is_first) in enumerate(texts) if is_first == first]
            for n, ids in zip(own, ids_of([texts[n][0] for n in own]), strict=True):
                rows[n] = list(ids)
        data = [text.encode() for text, _ in texts]
        walk = walked(data, rows, self.vocabulary)
        cut = []
        for n, ids in enumerate(rows):
            known = bool(walk.covered[n])
            ends = walk.ends[walk.offsets[n] : walk.offsets[n + 1]]
            if not known:
                ends = np.zeros(len(ids), dtype=np.int64)
                ends[-1:] = len(data[n])
            cut.append(_Cut(ids, ends, np.full(len(ids), known)))
        return cut

    def _joined(self, conversation: Conversation, cut: Sequence[tuple[_Section, _Cut]]) -> Encoded:
        """Sections with their tokens as one, with boundaries in what is shared."""
        ids, ends, predicted = list[int](), list[int](), list[bool]()
        starts, last = (0, *conversation.span_ends), len(conversation.learnt) - 1
        shared, behind = 0, False  # bytes that have been read; whether an answer was, to its end
        for section, tokens in cut:
            if section.special is not None:
                is_end = behind and section.special == self.vocabulary.eos_id
                ids.append(section.special)
                ends.append(shared)
                predicted.append(is_end)
                behind = False
                continue
            begins = np.concatenate([[0], tokens.ends])[: len(tokens.ids)]
            own = np.full(len(tokens.ids), shared)
            asked = np.zeros(len(tokens.ids), dtype=np.bool_)
            behind = False
            for part in section.parts:
                start, shared = starts[part.learnt], starts[part.learnt + 1]
                inside = (begins >= part.start) & (begins < part.end)
                own[begins >= part.start] = shared
                is_read = part.whole and bool(tokens.known[inside].all()) and bool(inside.any())
                if is_read:
                    own[inside] = start + tokens.ends[inside] - part.start
                    asked |= inside & (tokens.ends > part.start)  # and not a dummy prefix alone
                is_whole = not (conversation.cut and part.learnt == last)
                behind = is_read and is_whole and part.end == len(section.text.encode())
            ids += tokens.ids
            ends += own.tolist()
            predicted += asked.tolist()
        return _encoded(conversation, ids, ends, predicted)

    def _sections(self, conversation: Conversation, pieces: Sequence[_Piece]) -> Iterator[_Section]:
        """Special tokens, and the texts between them."""
        number = {message: n for n, message in enumerate(conversation.learnt)}
        text, parts, strips, is_first = "", list[_Part](), False, True
        before = -1
        for piece in pieces:
            at = None if piece.message is None else number.get(piece.message)
            if at is not None:
                if at <= before:
                    raise _UnreadableError("its chat template says an answer twice, or too late")
                before = at
                start = len(text.encode())
                said = conversation.messages[conversation.learnt[at]]["content"]
                end = start + len(piece.text.encode())
                parts.append(_Part(start, end, at, piece.text == said))
            split = self._cut.split(piece.text) if piece.is_template else [piece.text]
            for place, part in enumerate(split):
                if place % 2 == 0:
                    text += part.lstrip() if strips and piece.is_template else part
                    strips = strips and not part
                    continue
                token = self._special[part]
                if token.lstrip and not parts:
                    text = text.rstrip()
                if text or parts:
                    yield _Section(text, None, tuple(parts), is_first)
                if self._ids[part] >= len(self.vocabulary):
                    raise _UnreadableError(
                        f"its chat template says {part}, which is beyond the "
                        f"{len(self.vocabulary):,} rows of its model"
                    )
                yield _Section("", self._ids[part])
                text, parts, strips, is_first = "", [], bool(token.rstrip), False
        if text or parts:
            yield _Section(text, None, tuple(parts), is_first)

    def _pieces(self, conversation: Conversation) -> list[_Piece]:
        """A rendering, in parts.

        Raises:
            _UnreadableError: the template raises, or changes the messages in a way that is not
                known.
        """
        messages = list(conversation.messages)
        told = self.system is not None and all(m["role"] != "system" for m in messages)
        if told:
            messages.insert(0, {"role": "system", "content": self.system})
        given = {"messages": messages, "tools": list(conversation.tools)}
        rendered = self._render(given)
        salt = hashlib.sha256(rendered.encode("utf-8", "replace")).hexdigest()[:16]
        texts: list[tuple[str, int | None]] = []
        marked = self._marked(given, (), salt, texts)
        skeleton = re.split(rf"(q{salt}n\d+z)", self._render(marked))
        marks = [int(mark[len(salt) + 2 : -1]) for mark in skeleton[1::2]]
        fillings = _fillings(rendered, skeleton[::2], [texts[mark][0] for mark in marks])
        pieces = [_Piece(skeleton[0], is_template=True)]
        for mark, said, after in zip(marks, fillings, skeleton[2::2], strict=True):
            of = texts[mark][1]
            own = None if of is None or (of < told) else of - told
            pieces += [_Piece(said, own), _Piece(after, is_template=True)]
        return [piece for piece in pieces if piece.text or piece.message is not None]

    def _marked(
        self,
        value: Any,
        place: tuple[str | int, ...],
        salt: str,
        texts: list[tuple[str, int | None]],
    ) -> Any:
        """A value whose texts are marks; `texts` gets each, with the message whose content it is.

        Raises:
            _UnreadableError: the name of a field, which no mark can stand for, spells a special
                token.
        """
        if isinstance(value, str):
            is_structure = not place or place[-1] in _STRUCTURE
            if not value or (is_structure and not self._cut.search(value)):
                return value
            is_content = len(place) == 3 and place[0] == "messages" and place[2] == "content"
            texts.append((value, int(place[1]) if is_content else None))
            return f"q{salt}n{len(texts) - 1}z"
        if isinstance(value, Mapping):
            if any(self._cut.search(key) for key in value):
                raise _UnreadableError("the name of a field in it spells a special token")
            return {
                key: self._marked(inner, (*place, key), salt, texts) for key, inner in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._marked(inner, (*place, n), salt, texts) for n, inner in enumerate(value)]
        return value

    def _render(self, given: Mapping[str, Any]) -> str:
        try:
            rendered = self.tokenizer.apply_chat_template(
                given["messages"],
                tools=given["tools"] or None,
                chat_template=on_one_day(self.template),
                tokenize=False,
            )
        except Exception as error:  # a template is a program, and what it meets can raise anything
            reason = " ".join(str(error).split())[:200]
            raise _UnreadableError(f"its chat template raises: {reason}") from error
        assert isinstance(rendered, str)
        return rendered


def on_one_day(template: str) -> str:
    """A chat template that says the same date on every day, if it says one."""
    return _TODAY * ("strftime_now" in template) + template


def within_context(encoded: Encoded, context_tokens: int | None) -> Encoded:
    """A conversation as far as a model's context goes.

    The last token of the context is read and not learnt: it has all the bytes that are left out,
    as a conversation's last token has those of an answer that is not said.

    Args:
        context_tokens: None where there is no longest input.
    """
    if context_tokens is None or len(encoded.ids) <= context_tokens:
        return encoded
    ids, left_out = encoded.ids[:context_tokens], len(encoded.ids) - context_tokens
    if encoded.ends is None or encoded.predicted is None:
        return replace(encoded, ids=ids, left_out=left_out)
    whole = encoded.ends[-1]
    ends, predicted = (one[:context_tokens].copy() for one in (encoded.ends, encoded.predicted))
    ends[-1], predicted[-1] = whole, False
    if predicted.any():
        return Encoded(ids, ends, predicted=predicted, left_out=left_out)
    reason = f"nothing that is learnt begins within the {context_tokens:,} tokens of its context"
    return Encoded(ids, None, reason=reason, left_out=left_out)


def own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template that a tokenizer comes with; the default, where it has several."""
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, Mapping):
        own = own.get("default")
    return own if isinstance(own, str) and own else None


def _encoded(
    conversation: Conversation, ids: list[int], ends: list[int], predicted: list[bool]
) -> Encoded:
    """A conversation's tokens, if anything of it is learnt.

    The bytes of an answer that is not learnt are those of the first token behind it. Of one that is
    not said at all they are those of the token before the next answer, or of the last one.
    """
    whole = len(conversation.text.encode())
    array = np.array(ids, dtype=np.int64)
    if not any(predicted) or predicted[0] or (ends[-1] < whole and predicted[-1]):
        return Encoded(array, None, reason=CHANGED)
    ends[-1] = whole
    starts = (0, *conversation.span_ends)
    for n in range(1, len(ids)):
        if predicted[n] and not predicted[n - 1] and ends[n] > ends[n - 1]:
            span = bisect_left(conversation.span_ends, ends[n])
            ends[n - 1] = starts[span]
    return Encoded(array, np.array(ends, dtype=np.int64), predicted=np.array(predicted))


def _later_ids_of(tokenizer: PreTrainedTokenizerBase, text_ids: TextIds) -> TextIds:
    """From texts that follow a special token to their ids.

    Some tokenizers put a dummy prefix before the first text alone; here none is first.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return text_ids
    layout = json.loads(backend.to_str())
    outer = layout["pre_tokenizer"] or {}
    steps = [step for step in (outer, *outer.get("pretokenizers", ())) if step]
    firsts = [step for step in steps if step.get("prepend_scheme") == "first"]
    if not firsts:
        return text_ids
    for step in firsts:
        step["prepend_scheme"] = "never"
    own = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(layout)))
    return text_ids_of(own)


def _forms(text: str) -> list[str]:
    """How a template may say a text: as it is, stripped, or as in JSON."""
    quoted = (json.dumps(text, ensure_ascii=escaped)[1:-1] for escaped in (False, True))
    return list(dict.fromkeys([text, text.strip(), text.rstrip(), text.lstrip(), *quoted]))


def _fillings(rendered: str, between: Sequence[str], texts: Sequence[str]) -> list[str]:
    """What a rendering has in the places of marks.

    Args:
        between: [M+1] what stands before, between and after the marks.
        texts: [M] what was marked.

    Raises:
        _UnreadableError: no form of the texts fits.

    >>> _fillings("<a> x<b>y ", ["<a>", "<b>", " "], [" x", "y "])
    [' x', 'y']
    """
    if not rendered.startswith(between[0]):
        raise _UnreadableError(CHANGED)
    chosen: list[str] = []
    ends = [len(between[0])]  # where the rendering goes on, after each that is chosen
    left = [_forms(text) for text in texts[:1]]  # forms that are still to be tried, of each place
    tries = 0
    while len(chosen) < len(texts):
        tries += 1
        if not left or tries > _TRIES * len(texts):
            raise _UnreadableError(CHANGED)
        if not left[-1]:  # none fits here: another one has to be tried at the place before
            left.pop()
            if chosen:
                chosen.pop()
                ends.pop()
            continue
        form = left[-1].pop(0)
        after = between[len(chosen) + 1]
        if not rendered.startswith(form + after, ends[-1]):
            continue
        end = ends[-1] + len(form) + len(after)
        if len(chosen) + 1 == len(texts) and end != len(rendered):
            continue
        chosen.append(form)
        ends.append(end)
        if len(chosen) < len(texts):
            left.append(_forms(texts[len(chosen)]))
    return chosen
