"""A model's distributions over texts, in memory: no recipe, no folder."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fusellm.arrays.given_texts import GivenTexts, Texts
from fusellm.arrays.source_distributions import (
    SourceDistributions,
    predicted_of,
    tokens_of_texts,
)
from fusellm.config import ExternalizeSettings
from fusellm.models.adapters import without_adapters
from fusellm.models.heads import left_as_it_was
from fusellm.progress import Progress, Silent
from fusellm.reading.encoded_texts import encoded_for
from fusellm.reading.source_reader import SourceReader
from fusellm.recipe_file import checked_settings
from fusellm.tokens.encode import Encoder


def read_distributions(
    model: PreTrainedModel,
    tokenizer: Encoder | PreTrainedTokenizerBase,
    texts: Texts,
    draws: int = 32,
    *,
    top_k: int | None = None,
    mass: float | None = 0.99,
    last: Sequence[bool] | None = None,
    batch_tokens: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> SourceDistributions:
    """What a model says comes next, at every token of some texts.

    What is kept of each distribution is a number of seeded draws, whose expectation is the
    distribution itself, or its most probable tokens (docs/method.md).

    Args:
        model: a causal language model of transformers, where it is to run; adapters (PEFT) stay on.
        tokenizer: the model's, of fusellm or of transformers.
        texts: each is read from its beginning, and has to fit into the model's context. Or
            conversations: `Conversation`s, or lists of messages as OpenAI has them. The model reads
            them by the chat template of its tokenizer, as far as its context goes, and what the
            assistant says is kept (docs/chat.md).
        draws: how many are kept at each position, 1 to 255.
        top_k: how many of the most probable tokens are kept instead.
        mass: with `top_k`, keep no more than reach this probability; None always keeps `top_k`.
        last: of each plain text, whether it ends a document, and so is followed by EOS; all do if
            None.
        batch_tokens: of one forward pass, padding included; None for what suits the device.
        seed: of the draws, with the text.
        progress: is shown how far it is.

    Raises:
        ArgumentError, TokenizerError: a setting is wrong, or as `encoded_for` does.
        ModelError: the architecture's head is not known, or memory is too small for one text.

    >>> from fusellm import load_pretrained
    >>> model, tokenizer = load_pretrained("zoo/python")
    >>> distributions = read_distributions(model, tokenizer, ["for item in items:"], top_k=2)
    >>> distributions
    SourceDistributions(1 texts, 5 distributions, 0 texts not read)
    >>> after_for_item = distributions[0].at(1)
    >>> tokenizer.spelled(after_for_item.ids[0])
    ' in'
    """
    given: dict[str, Any] = {"scheme": "sampled", "draws": draws}
    if top_k is not None:
        given = {"scheme": "top", "k": top_k, "mass": mass}
    settings = checked_settings(ExternalizeSettings, given | {"batch_tokens": batch_tokens})
    given_texts = GivenTexts.of(texts)
    encoder, encoded = encoded_for(model, tokenizer, given_texts, last, cuts=True)
    ends = tuple([True] * len(given_texts) if last is None else last)
    reader = SourceReader(without_adapters(model), len(encoder.vocabulary), settings, seed)
    shown = (progress or Silent()).start("reading", len(given_texts), "texts")
    with left_as_it_was(model), shown as bar:
        model.eval()
        read = reader.read(given_texts.texts, encoded, bar.advance)
    reasons = {
        number: block.reason or "the tokenizer changes this text"
        for number, block in enumerate(encoded)
        if block.ends is None
    }
    reasons |= dict.fromkeys(read.not_finite, "its distributions are not finite")
    tokens, predicted = tokens_of_texts(encoded, read.usable), None
    if given_texts.conversations is not None:
        predicted = predicted_of(encoded, read.usable)
    what = given_texts.texts, ends, encoder, tokens, read.kept, reasons
    return SourceDistributions(*what, given_texts.conversations, predicted)
