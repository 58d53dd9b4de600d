"""A model that reads the corpus, found with its tokenizer; no weight is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fusellm.config import ModelSettings, Recipe
from fusellm.errors import FusellmError, ModelError, StoreError
from fusellm.models.gguf import read_header
from fusellm.models.gguf_tokenizer import CHAT_TEMPLATE
from fusellm.models.load import Located, load_tokenizer, locate
from fusellm.models.remote_code import require_trusted
from fusellm.models.tokenizer import Tokenizer
from fusellm.progress import Progress
from fusellm.store.externalized import TARGET
from fusellm.store.facts import StoreFacts
from fusellm.store.identity import tokenizer_fingerprint
from fusellm.tokens.chat import ChatEncoder, own_template
from fusellm.tokens.encode import Encoder


@dataclass(frozen=True)
class Reader:
    """A model that reads the corpus: found, with its tokenizer, weights not loaded."""

    located: Located
    encoder: Encoder
    tokenizer_fingerprint: str

    @property
    def for_dialogue(self) -> bool:
        """Whether it comes with a chat template, as models tuned for dialogue do."""
        if getattr(self.encoder.tokenizer, "chat_template", None):
            return True
        path = self.located.gguf
        return path is not None and bool(read_header(path).get(CHAT_TEMPLATE))


def reader_of(settings: ModelSettings, trusted: bool = False, chat: bool = False) -> Reader:
    """Find a model and its tokenizer.

    Args:
        trusted: whether code that comes with it may run, where the settings want it.
        chat: whether it is to read conversations, by its chat template.

    Raises:
        ModelError: as `locate` and `load_tokenizer` do.
        TokenizerError: its tokens cannot be told as bytes.
    """
    located = locate(settings, trusted)
    encoder = chat_encoder_of(located) if chat else encoder_of(located)
    return Reader(located, encoder, tokenizer_fingerprint(encoder))


def readers_of(recipe: Recipe, trusted: bool = False) -> dict[str, Reader]:
    """The models of a recipe that read the corpus, the target first.

    Raises:
        ModelError, TokenizerError: as `reader_of` does.
    """
    chat = recipe.corpus.has_conversations
    readers = {TARGET: reader_of(recipe.target, trusted, chat)}
    return readers | {source.name: reader_of(source, trusted, chat) for source in recipe.sources}


def encoder_of(located: Located) -> Tokenizer:
    """A located model's tokenizer, with its tokens as bytes.

    Raises:
        ModelError: as `load_tokenizer` does.
        TokenizerError: its tokens cannot be told as bytes.
    """
    return Tokenizer(load_tokenizer(located), located.config.get_text_config().vocab_size)


def chat_encoder_of(located: Located) -> ChatEncoder:
    """A located model's tokenizer, which reads conversations by its chat template.

    Raises:
        ModelError: as `load_tokenizer` does, or a template that the recipe names is not there.
        TokenizerError: its tokens cannot be told as bytes, or it has no template that serves.
    """
    settings, rows = located.settings, located.config.get_text_config().vocab_size
    tokenizer = load_tokenizer(located)
    template = chat_template_of(located, tokenizer)
    around = template, settings.system
    encoder = ChatEncoder(tokenizer, rows, *around, located.context_tokens)
    tokenizer.chat_template = encoder.template  # saved with what is trained
    return encoder


def chat_template_of(located: Located, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template that a model speaks by: the recipe's, or its own; None if there is none.

    Raises:
        ModelError: the recipe's is not there.
    """
    if located.settings.chat_template is not None:
        return template_text(located.settings.chat_template)
    if located.gguf is not None:
        written = read_header(located.gguf).get(CHAT_TEMPLATE)
        if isinstance(written, str) and written:
            return written
    return own_template(tokenizer)


def template_text(given: str) -> str:
    """A chat template that a recipe gives: by the name of its file, or itself.

    Raises:
        ModelError: there is no such file.
    """
    if "{{" in given or "{%" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"chat_template {given!r} cannot be read as a file, and is no template in Jinja "
            f"either: {error}; check the path"
        ) from None


def _as_stored(encoder: Encoder, facts: StoreFacts) -> Encoder:
    """A tokenizer with the chat template that a store was made with, if it was made with one."""
    if facts.around is None:
        return encoder
    return ChatEncoder(encoder.tokenizer, facts.vocabulary, *facts.around)


def tokenizer_of_store(facts: StoreFacts) -> Encoder:
    """The tokenizer that a source's distributions were made with; none of its code is run.

    Args:
        facts: what the store says; its model has to be at hand.

    Raises:
        ModelError, TokenizerError: as `reader_of` does.
        StoreError: it is another one now.
    """
    located = locate(ModelSettings(model=facts.model, revision=facts.commit))
    encoder = _as_stored(encoder_of(located), facts)
    if tokenizer_fingerprint(encoder) != facts.identity.inputs.get("tokenizer"):
        raise StoreError(
            f"the tokenizer of {facts.model} is not the one that the store was made with"
        )
    return encoder


def load_encoder(
    name: str, trusted: bool, progress: Progress, rows: int | None = None
) -> Tokenizer:
    """A tokenizer by its folder, GGUF file, hub name or zoo/NAME; what is to be said of it is said.

    Args:
        trusted: whether code that it brings along may run.
        rows: of the head of its model; if not given, what stands beside the tokenizer says.

    Raises:
        ModelError: it cannot be loaded, or the model beside it has too few rows for it.
        TokenizerError: its tokens cannot be told as bytes.
    """
    require_trusted(ModelSettings(model=name, trust_remote_code=trusted), True, progress)
    tokenizer = Tokenizer.from_pretrained(name, trust_remote_code=trusted, rows=rows)
    if tokenizer.assumed_eos is not None:
        progress.say(
            f"{name} does not say which token ends a text; taken to be {tokenizer.assumed_eos}"
        )
    return tokenizer


def encoder_of_store(
    path: Path, facts: StoreFacts, given: str | None, progress: Progress
) -> Encoder | None:
    """The tokenizer that a store was made with, if it is at hand; no code of a model is run.

    Args:
        given: its name; that of the store's model if None.

    Raises:
        FusellmError: the one that was given is not it, or cannot be loaded.
    """
    if given is None:
        try:
            return tokenizer_of_store(facts)
        except FusellmError as error:
            progress.say(f"ids are shown, and with --tokenizer NAME tokens: {error}")
            return None
    encoder = _as_stored(load_encoder(given, False, progress, facts.vocabulary), facts)
    if tokenizer_fingerprint(encoder) != facts.identity.inputs.get("tokenizer"):
        raise StoreError(
            f"--tokenizer {given} is not the one that {path} was made with, so its ids would be "
            f"shown as other tokens; give that of its model, {facts.model!r}"
        )
    return encoder


def plain_text_note(readers: Mapping[str, Reader]) -> str | None:
    """What a user should know whose models were tuned for dialogue, and read plain text."""
    plain = {name: one for name, one in readers.items() if not one.encoder.said_around}
    named = [name for name, reader in plain.items() if reader.for_dialogue]
    if not named:
        return None
    has = "has a chat template" if len(named) == 1 else "have chat templates"
    return (
        f"note: {', '.join(named)} {has}, as models tuned for dialogue have; here plain text is "
        "read, as by base models"
    )
