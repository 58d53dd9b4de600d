"""A tokenizer by its name, for programs and for the command line."""

from os import PathLike, fspath
from typing import Self

from fusellm.models.tokenizers import require_rows, rows_beside, tokenizer_at
from fusellm.tokens.chat import ChatEncoder
from fusellm.tokens.encode import Encoder

# For folders that hold a tokenizer.json and nothing that says which token ends a text.
_USUAL_EOS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>")


class Tokenizer(Encoder):
    """A tokenizer whose tokens are known as bytes, exactly or not at all.

    `Tokenizer(tokenizer)` takes one of transformers, of any kind: byte-level, SentencePiece, with
    or without a prefix that it puts before each text.

    Attributes:
        tokenizer: that of transformers.
        vocabulary: its tokens as bytes.
        assumed_eos: the token that is taken to end a text, where the files of a tokenizer do not
            say; None where they do.

    >>> tokenizer = Tokenizer.from_pretrained("zoo/prose")
    >>> encoded = tokenizer.encode(["Hello."])[0]
    >>> [tokenizer.spelled(id_) for id_ in encoded.ids.tolist()]
    ['<s>', ' Hel', 'lo', '.', '</s>']
    >>> encoded.ends.tolist()
    [0, 3, 5, 6, 6]
    """

    assumed_eos: str | None = None

    def for_chat(
        self,
        template: str | None = None,
        system: str | None = None,
        context_tokens: int | None = None,
    ) -> ChatEncoder:
        """One that reads conversations.

        Args:
            template: a chat template in Jinja; the tokenizer's own if None.
            system: what the model is told first, where a conversation has no system message.
            context_tokens: as far as which conversations are read; None reads them whole.

        Raises:
            TokenizerError: there is no template, or none that says an answer as it is.

        >>> import fusellm
        >>> template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        >>> tokenizer = Tokenizer.from_pretrained("zoo/prose").for_chat(template)
        >>> asked = {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "A list."}
        >>> (encoded,) = tokenizer.encode_conversations([fusellm.Conversation.of(asked)])
        >>> [tokenizer.spelled(id_) for id_ in encoded.ids[encoded.predicted].tolist()]
        ['A', ' list', '.', '</s>']
        """
        rows = len(self.vocabulary)
        return ChatEncoder(self.tokenizer, rows, template, system, context_tokens)

    @classmethod
    def from_pretrained(
        cls, name: str | PathLike[str], *, trust_remote_code: bool = False, rows: int | None = None
    ) -> Self:
        """Load a tokenizer by its folder, GGUF file, hub name or zoo/NAME.

        Args:
            trust_remote_code: whether code that it brings along may run.
            rows: of the head of its model; if not given, what stands beside the tokenizer says.

        Raises:
            ModelError: it cannot be loaded, or the model beside it has too few rows for it.
            TokenizerError: its tokens cannot be told as bytes.
        """
        name = fspath(name)
        tokenizer = tokenizer_at(name, trust_remote_code)
        assumed = None
        if tokenizer.eos_token is None:
            special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
            assumed = next((token for token in _USUAL_EOS if token in special), None)
            if assumed is not None:
                tokenizer.eos_token = assumed
        if rows is None and (rows := rows_beside(name)) is not None:
            require_rows(name, tokenizer, rows)
        encoder = cls(tokenizer, rows)
        encoder.assumed_eos = assumed
        return encoder
