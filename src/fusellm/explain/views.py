"""What is shown of a block: every model's tokens, and what became of its distributions.

T tokens of one model's reading; N target positions that predict; S sources, in the recipe's order.
"""

import string
from dataclasses import dataclass
from typing import Any

from fusellm.config import Recipe
from fusellm.explain.grid import Strip


def letter_of(source: int) -> str:
    """By which a source is named where there is little room; numbers after z.

    >>> letter_of(0), letter_of(25), letter_of(26)
    ('a', 'z', '27')
    """
    return string.ascii_lowercase[source] if source < 26 else str(source + 1)


@dataclass(frozen=True)
class ModelTokens:
    """A block as one model reads it.

    Attributes:
        read: whether it could: a tokenizer may change the text.
        ids: [T] token ids, prefix and EOS included; none where it could not.
        spelled: [T] what the tokens stand for; a special token as its tokenizer writes it.
        ends: [T] boundaries in bytes.
    """

    read: bool
    ids: tuple[int, ...]
    spelled: tuple[str, ...]
    ends: tuple[int, ...]

    @property
    def strip(self) -> Strip:
        """Its row in a grid of boundaries."""
        strip = Strip(self.ends)
        return Strip(self.ends, {n: self.spelled[n] for n, a, b in strip.tokens() if a == b})


@dataclass(frozen=True)
class SourceView:
    """One source's part in a block.

    Attributes:
        name: the source's.
        tokens: its reading.
        positions: [N] the place of its aligned position, -1 for none.
        situations: [N] names of `Situation` in lower case: by boundaries, whatever the alignment.
        weights: [N] its share of the fused distributions, rounded as stored; 0 where it has none.
        cross_entropy: [N] by which sources are compared there; the recipe says in what.
        bits_per_byte: over the block's bytes that it scored; None where it did not read it.
        referee: whether it is compared and never taught.
    """

    name: str
    tokens: ModelTokens
    positions: tuple[int, ...]
    situations: tuple[str, ...]
    weights: tuple[float, ...]
    cross_entropy: tuple[float, ...]
    bits_per_byte: float | None
    referee: bool


@dataclass(frozen=True)
class Entry:
    """A kept token: `outcome` is the number of what it becomes, None for nothing."""

    id: int
    spelled: str
    probability: float
    outcome: int | None


@dataclass(frozen=True)
class OutcomeView:
    """A set of target tokens that are one under a source's vocabulary map.

    Attributes:
        number: within the source's map.
        spelled: the target tokens, the shortest first.
        probability: its mass.
        true: whether the true next token is in it.
        leftover: whether these are the tokens that no outcome takes.
    """

    number: int
    spelled: tuple[str, ...]
    probability: float
    true: bool
    leftover: bool


@dataclass(frozen=True)
class Before:
    """A source's distribution at its aligned position, before and after the vocabulary map.

    Attributes:
        place: the source's position.
        next_spelled: the tokens it reads next, until the target's next boundary or past it.
        kept: by probability; of equals the lower id first.
        healed: whether these are healed, and not as they were read.
        tail: mass that was not kept.
        becomes: by probability.
        nowhere: mass of kept tokens that become nothing.
        true_outcome: number of the outcome of the true next token; None where it has none.
        source: its name.
    """

    place: int
    next_spelled: tuple[str, ...]
    kept: tuple[Entry, ...]
    healed: bool
    tail: float
    becomes: tuple[OutcomeView, ...]
    nowhere: float
    true_outcome: int | None
    source: str


@dataclass(frozen=True)
class Share:
    """One source's part of the fused distribution; with `rest` it sums to `weight`."""

    source: str
    weight: float
    outcomes: tuple[OutcomeView, ...]
    rest: float


@dataclass(frozen=True)
class PositionView:
    """A chosen position.

    Attributes:
        position: its number, from 0: after the token of this number.
        read_bytes: how much of the block it has read.
        next_spelled: the true next token.
        before: [S] distributions; None where the source is not aligned.
        fused: the parts of the fused distribution; none where no source is aligned.
    """

    position: int
    read_bytes: int
    next_spelled: str
    before: tuple[Before | None, ...]
    fused: tuple[Share, ...]


@dataclass(frozen=True)
class BlockView:
    """A block as the target and every source see it.

    Attributes:
        block: its number, of the part that sources read; `blocks` is how many that has.
        document, domain: what it is from.
        bytes: of its text in UTF-8.
        recipe: the settings by which its distributions were made and fused.
        positions: N.
        winners: [N] name of the source of most weight, of equals the first; None for none.
        at: the chosen position; None where the block has none.
        answer: of a conversation, the answer that is shown, from 0, and `answers` how many are
            learnt; text, bytes and positions are that answer's.
        asked: what the target has read since the answer before, its template included.
    """

    block: int
    blocks: int
    document: str
    domain: str
    bytes: int
    text: str
    recipe: dict[str, Any]
    positions: int
    target: ModelTokens
    sources: tuple[SourceView, ...]
    winners: tuple[str | None, ...]
    at: PositionView | None
    answer: int | None = None
    answers: int = 0
    asked: str = ""

    @property
    def is_split(self) -> bool:
        """Whether several sources have a share in one distribution."""
        shares = zip(*(source.weights for source in self.sources), strict=True)
        return any(sum(weight > 0 for weight in weights) > 1 for weights in shares)

    def silence(self, at: PositionView, s: int) -> str:
        """Why source s says nothing at a position."""
        source = self.sources[s]
        if not source.tokens.read:
            return "could not read this block"
        if source.weights[at.position] > 0 and self.recipe["inside_tokens"]:
            return "not aligned: what it said before its token, of the bytes read since"
        if source.weights[at.position] > 0:
            return "not aligned: by the authors' rule all mass is on the token just read"
        if at.read_bytes not in source.tokens.ends[:-1]:
            return "not aligned: no position of it has read exactly this text"
        if self.recipe["token_healing"] and at.read_bytes > 0:
            return "says only what the target would not cut off here"
        return "not aligned, though it has read this text"


def settings_in_words(recipe: Recipe) -> dict[str, str]:
    """How a run's distributions were kept and fused."""
    fusion, kept = recipe.fusion, recipe.externalize
    side = "to each side" if fusion.hindsight else "before the position"
    over = f"sources compared over a window of {fusion.window_bytes} bytes {side}"
    if fusion.granularity == "block":
        over = f"sources compared over the {'whole block' if fusion.hindsight else 'block so far'}"
    if fusion.function == "bayes":
        over = "sources by their probability, given the block so far"
    if fusion.function == "route":
        over = ", ".join(f"{domain} to {name}" for domain, name in fusion.routes.items())
    scheme = f"{kept.draws} draws" if kept.scheme == "sampled" else f"top {kept.k}"
    rules = [
        *([", healed"] if fusion.heals else []),
        *([", split along the text"] if fusion.refines else []),
        *([", asked within tokens"] if fusion.inside_tokens else []),
    ]
    paper = ", as the authors" if fusion.compatibility == "paper" else ""
    return {
        "strategy": f"{fusion.strategy}{paper}{''.join(rules)}",
        "function": f"{fusion.function}, {over}",
        "kept": f"{scheme} at each position",
    }
