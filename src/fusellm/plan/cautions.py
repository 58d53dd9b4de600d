"""What a user should know of a run before it begins."""

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from fusellm.models.hub import HUB_FAULTS
from fusellm.models.load import Located
from fusellm.models.readers import Reader
from fusellm.plan.shapes import Shapes
from fusellm.store.externalized import TARGET
from fusellm.store.planned import PlannedPair

_CARD, _CARD_BYTES = "README.md", 1_000_000
_LICENCES = {  # how the names of licences begin, and what these say of a model's outputs
    "llama2": "forbids improving other language models with its outputs",
    "llama3.": "asks that a model improved with its outputs be named Llama-…, under its terms",
    "llama4": "asks that a model improved with its outputs be named Llama-…, under its terms",
    "llama3": "forbids improving other language models with its outputs",
    "gemma": "counts a model trained on its outputs as made from it, under its terms",
    "cc-by-nc": "allows no commercial use",
    "qwen-research": "allows research alone",
    "mrl": "allows research alone",
    "bigscience-": "restricts uses",
    "creativeml-": "restricts uses",
    "openrail": "restricts uses",
    "other": "is its own: see what it says of training on outputs",
}
# Rates of AdamW that were best for fusion here (docs/results.md, docs/real-models.md), by
# parameters: a line through them on logarithmic scales.
_BEST_RATES = ((1.85e6, 2e-3), (1.35e8, 1e-4))
_FAR = 10.0


def cautions(
    readers: Mapping[str, Reader],
    shapes: Mapping[str, Shapes],
    pairs: Mapping[str, PlannedPair],
    rate: float | None,
    referees: Collection[str] = (),
) -> Iterator[str]:
    """Sentences, the most important first.

    Args:
        pairs: by sources; none where nothing was tried.
        rate: that all weights are trained with by fusion; None for adapters, which want others.
        referees: sources that are compared and never taught.
    """
    yield from _weak_sources({n: pair for n, pair in pairs.items() if not pair.is_referee})
    for name, reader in readers.items():
        if name not in referees:  # whose outputs teach nobody
            yield from _licence(name, reader.located)
    if rate is not None:
        yield from _rate(rate, shapes[TARGET].parameters)
    for name, reader in readers.items():
        yield from _head(name, reader, shapes[name])
    without = [name for name, reader in readers.items() if reader.encoder.prefix_tokens == 0]
    if without:
        yield (
            f"{', '.join(without)}: nothing is put before a text, so that the first token of each "
            "block is read and not predicted"
        )


def _weak_sources(pairs: Mapping[str, PlannedPair]) -> Iterator[str]:
    """Where a source has nothing to teach, which no training can mend."""
    helps = {
        domain for pair in pairs.values() for domain, better in pair.better_by.items() if better > 0
    }
    domains = {domain for pair in pairs.values() for domain in pair.better_by}
    if domains and not helps:
        yield (
            "no source costs less than the target on any of the text: there is nothing to learn "
            "from them. Take text that they know better, or other sources"
        )
        return
    for domain in sorted(domains - helps):
        yield (
            f"on {domain} no source costs less than the target: leave it out, or let the target "
            "be a source that is a referee (docs/usage.md)"
        )
    for name, pair in pairs.items():
        worse = {
            domain: -better
            for domain, better in pair.better_by.items()
            if (interval := pair.interval.get(domain)) is not None and interval[1] < 0
        }
        if worse and len(worse) == len(pair.better_by):
            most = max(worse, key=lambda domain: worse[domain])
            yield (
                f"{name} costs more than the target on all of the text ({worse[most]:.2f} bits per "
                f"byte more on {most}): as a source it teaches little here"
            )


def _licence(name: str, located: Located) -> Iterator[str]:
    front = card_of(located)
    told, named = front.get("license"), front.get("license_name")
    if isinstance(told, list):
        told = told[0] if told else None
    names = [one.lower() for one in (named, told) if isinstance(one, str)]
    for begins, says in _LICENCES.items():
        if any(licence.startswith(begins) for licence in names):
            says = "goes with what is trained from it" if name == TARGET else says
            yield f"{name}: the licence of {located.settings.model}, {names[0][:60]}, {says}"
            return


def card_of(located: Located) -> Mapping[str, Any]:
    """What a model's card says at its head; nothing where there is no card at hand.

    Of a hub model it is fetched, or taken from the local cache where there is no hub.
    """
    path = Path(located.place) / _CARD
    if located.commit is not None:
        try:
            path = Path(hf_hub_download(located.place, _CARD, revision=located.commit))
        except (EntryNotFoundError, LocalEntryNotFoundError, *HUB_FAULTS):
            return {}
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_CARD_BYTES)
    except OSError:
        return {}
    head = text.removeprefix("---\n").partition("\n---")[0] if text.startswith("---\n") else ""
    try:
        front = yaml.safe_load(head)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return front if isinstance(front, dict) else {}


def _rate(rate: float, parameters: int) -> Iterator[str]:
    usual = usual_rate(parameters)
    if rate > 0 and not usual / _FAR <= rate <= usual * _FAR:
        yield (
            f"the learning rate of {rate:g} is far from {usual:.0e}, about what was best for "
            f"models of this size ({parameters / 1e6:,.0f} M parameters, docs/real-models.md)"
        )


def usual_rate(parameters: float) -> float:
    """The learning rate that was best for models of this size, roughly.

    >>> f"{usual_rate(1.35e8):.0e}"
    '1e-04'
    """
    (small, of_small), (large, of_large) = _BEST_RATES
    slope = math.log(of_large / of_small) / math.log(large / small)
    bounded = min(max(parameters, small / 10), 1e11)
    return float(of_small * (bounded / small) ** slope)


def _head(name: str, reader: Reader, shapes: Shapes) -> Iterator[str]:
    """Rows of a head that are no token of the tokenizer."""
    tokens = len(reader.encoder.vocabulary)
    if shapes.rows > tokens:
        yield (
            f"{name}: {shapes.rows - tokens:,} of the {shapes.rows:,} rows of its head are no "
            "tokens, and are left out of its distributions"
        )
