"""A model's distributions over texts, in memory: no recipe, no folder."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fusellm.arrays.source_distributions import SourceDistributions, tokens_of_texts
from fusellm.config import ExternalizeSettings
from fusellm.errors import ArgumentError
from fusellm.models.adapters import without_adapters
from fusellm.models.configurations import context_tokens
from fusellm.models.heads import require_known_head
from fusellm.progress import Progress, Silent
from fusellm.reading.source_reader import SourceReader
from fusellm.recipe_file import checked_settings
from fusellm.tokens.encode import Encoder, as_encoder


def read_distributions(
    model: PreTrainedModel,
    tokenizer: Encoder | PreTrainedTokenizerBase,
    texts: Sequence[str],
    draws: int | None = 32,
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
    distribution itself, or its most probable tokens (docs/method.md). The same seed and text give
    the same draws.

    Args:
        model: a causal language model of transformers, already where it is to run, in whatever
            precision; it is left in evaluation mode. Adapters of PEFT stay on.
        tokenizer: the model's, of fusellm or of transformers.
        texts: each is read from its beginning, and has to fit into the model's context.
        draws: how many are kept at each position, 1 to 255; None with `top_k`.
        top_k: how many of the most probable tokens are kept instead.
        mass: with `top_k`, keep no more than reach this probability; None always keeps `top_k`.
        last: of each text, whether it ends a document, and so is followed by EOS; all do if None.
        batch_tokens: of one forward pass, padding included; None for what suits the device.
        progress: is shown how far it is.

    Raises:
        ArgumentError: a text is too long for the model, or there are both draws and `top_k`.
        ModelError: the architecture is not one whose logits can be told, or memory does not suffice
            for one text.
        TokenizerError: the tokenizer's tokens cannot be told as bytes.

    >>> from fusellm import load_pretrained
    >>> model, tokenizer = load_pretrained("zoo/python")
    >>> found = read_distributions(model, tokenizer, ["for item in items:"], top_k=2, draws=None)
    >>> found
    SourceDistributions(1 texts, 5 distributions, 0 texts not read)
    >>> after_for_item = found[0].at(1)
    >>> tokenizer.spelled(after_for_item.ids[0])
    ' in'
    """
    if isinstance(texts, str):
        raise ArgumentError("texts is one text; give a list of them")
    if (draws is None) == (top_k is None):
        raise ArgumentError("give draws, or top_k and draws=None: one of the two is kept")
    given: dict[str, Any] = {"scheme": "sampled", "draws": draws}
    if top_k is not None:
        given = {"scheme": "top", "k": top_k, "mass": mass}
    settings = checked_settings(ExternalizeSettings, given | {"batch_tokens": batch_tokens})
    rows = model.config.get_text_config().vocab_size
    encoder = as_encoder(tokenizer, rows)
    ends = tuple([True] * len(texts) if last is None else last)
    if len(ends) != len(texts):
        raise ArgumentError(f"last has {len(ends)} entries, and there are {len(texts)} texts")
    encoded = encoder.encode(texts, ends)
    room = context_tokens(model.config)
    for number, block in enumerate(encoded):
        if room is not None and len(block.ids) > room:
            raise ArgumentError(
                f"text {number} has {len(block.ids)} tokens, and the model's context is {room}; "
                "cut it first"
            )
    model.eval()
    require_known_head(without_adapters(model))
    reader = SourceReader(without_adapters(model), len(encoder.vocabulary), settings, seed)
    with (progress or Silent()).start("reading", len(texts), "texts") as bar:
        found = reader.read(texts, encoded, bar.advance)
    reasons = {
        number: f"the tokenizer changes this text ({texts[number][:40]!r}…)"
        for number, block in enumerate(encoded)
        if block.ends is None
    }
    reasons |= dict.fromkeys(found.not_finite, "its distributions are not finite")
    tokens = tokens_of_texts(encoded, found.usable)
    return SourceDistributions(tuple(texts), ends, encoder, tokens, found.kept, reasons)
