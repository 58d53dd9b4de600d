"""Texts on their way into a model that a program has loaded: encoded, and checked against it."""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fusellm.arrays.given_texts import GivenTexts, Texts
from fusellm.errors import ArgumentError
from fusellm.models.adapters import without_adapters
from fusellm.models.configurations import context_tokens
from fusellm.models.heads import require_known_head
from fusellm.tokens.chat import within_context
from fusellm.tokens.encode import Encoded, Encoder


def encoded_for(
    model: PreTrainedModel,
    tokenizer: Encoder | PreTrainedTokenizerBase,
    texts: Texts | GivenTexts,
    last: Sequence[bool] | None,
    cuts: bool = False,
) -> tuple[Encoder, list[Encoded]]:
    """The tokenizer with its tokens as bytes, and the texts as the model reads them.

    Args:
        texts: plain, or conversations.
        last: of each plain text, whether it ends a document; all do if None.
        cuts: whether a conversation that is too long for the model is read as far as it goes.

    Raises:
        ArgumentError: `texts` is no list of texts or conversations, a text is too long for the
            model, the tokenizer is another model's, or what is given as the model is none.
        ModelError: the model makes its logits in a way that is not known.
        TokenizerError: the tokenizer's tokens cannot be told as bytes.
    """
    base = without_adapters(model)
    if not isinstance(base, PreTrainedModel):
        raise ArgumentError(
            f"a model of transformers is needed, and this is a {type(model).__name__}; give the "
            "model first, then its tokenizer"
        )
    rows = base.config.get_text_config().vocab_size
    given = GivenTexts.of(texts)
    encoder = given.encoder(tokenizer, rows)
    encoded = given.encode(encoder, last)
    room = context_tokens(base.config)
    if cuts and given.conversations is not None:
        encoded = [within_context(one, room) for one in encoded]
    for number, block in enumerate(encoded):
        tokens = len(block.ids) + (0 if cuts else block.left_out)
        if tokens > len(block.ids) or (room is not None and tokens > room):
            raise ArgumentError(
                f"text {number} has {tokens} tokens, and the model's context is "
                f"{len(block.ids) if block.left_out else room}; cut it first"
            )
        if len(block.ids) and block.ids.max() >= rows:
            raise ArgumentError(
                f"text {number} has the token {block.ids.max()}, and the model has {rows}: is this "
                "tokenizer the model's own?"
            )
    require_known_head(base)
    return encoder, encoded
