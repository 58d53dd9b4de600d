"""The `corpus:` block of a recipe: where text comes from, and how it is cut."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from fusellm.config.base import Name, SettingsBlock, Share


class BuiltinDocuments(SettingsBlock):
    """The built-in corpus: text of the installed Python packages."""

    builtin: Literal["prose", "python", "cpp"]
    """Which of its domains."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the training budget, relative to the other entries."""

    @property
    def domain(self) -> str:
        """The domain that these documents are counted under."""
        return self.builtin

    def identity(self) -> dict[str, Any]:
        """What the documents depend on, in this block."""
        return self.model_dump()


_LONGEST_ANSWER_BYTES = 65_535  # all of one may be a single token's in a store
_OF_CONVERSATIONS = {"tools_field": None, "turns": "all", "thinking": "keep"}
_OF_PLAIN_TEXT = {"text_field": "text", "context_fields": [], "field_separator": "\n"}


class GeneratedSettings(SettingsBlock):
    """How a model writes the answers that are trained on."""

    by: Name = "target"
    """Whose they are: `target`, as it is before the training, or the name of a source."""
    prompts: Annotated[int, Field(gt=0)] | None = None
    """How many prompts are answered, from the first; null answers all."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Of the sampling; 0 takes the likeliest token each time."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the mass that tokens are sampled from."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 512
    """Most tokens of an answer; one that is longer is cut, and does not end."""
    batch_size: Annotated[int, Field(gt=0, le=128)] = 8
    """Prompts at a time."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the sampling; round n has `seed` + n - 1."""


class _Records(SettingsBlock):
    """Documents whose text is in fields of records."""

    text_field: str | Annotated[list[str], Field(min_length=1)] = "text"
    """Field that holds the text, or several that are joined in this order."""
    context_fields: list[str] = Field(default_factory=list)
    """Those of several fields that a model reads and is not asked to predict, such as a prompt:
    they are left out of the losses, and of bits per byte. A record should fit into a block."""
    field_separator: str = "\n"
    """What stands between two fields; it belongs to the one before it."""
    where: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Only records whose fields have these values: `{lang: python}`. With an entry and a `domain`
    for each value of a label, `fusion.routes` can send each to a source."""

    messages: str | list[str] | None = None
    """Records are conversations: the field that holds their messages, as OpenAI or ShareGPT have
    them, or two, of a prompt and its completion. Every model reads them by its own chat template,
    and what the assistant says is learnt."""
    tools_field: str | None = None
    """Field with the tools that the assistant of a conversation may call, where records have it."""
    turns: Literal["all", "last"] = "all"
    """Which of the assistant's answers are learnt; the others are read."""
    thinking: Literal["keep", "drop"] = "keep"
    """Whether `<think>…</think>` at the beginning of an answer is learnt, or taken away."""
    generated: GeneratedSettings | None = None
    """Records are prompts, and a model writes the answers that are trained on: to the last question
    of a conversation, or to a text, of which `context_fields` are then the prompt. Validation and
    held-out text are what records themselves answer (docs/generated.md)."""

    @model_validator(mode="after")
    def _conversations_have_no_text(self) -> "_Records":
        of_other_kind = _OF_CONVERSATIONS if self.messages is None else _OF_PLAIN_TEXT
        for key, default in of_other_kind.items():
            if getattr(self, key) != default:
                raise ValueError(
                    f"{key} is of conversations; name their field with messages"
                    if self.messages is None
                    else f"{key} is of plain text, and messages of conversations; leave one out"
                )
        if isinstance(self.messages, list):
            if len(self.messages) != 2:
                raise ValueError(
                    "messages names a field, or two: of the prompt and of its completion; got "
                    f"{self.messages}"
                )
            if self.messages[0] == self.messages[1]:
                raise ValueError(f"messages names {self.messages[0]!r} twice")
        return self

    @model_validator(mode="after")
    def _something_to_predict(self) -> "_Records":
        names = [self.text_field] if isinstance(self.text_field, str) else self.text_field
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"text_field names {twice!r} twice; name each field once")
        for name in self.context_fields:
            if name not in names:
                raise ValueError(
                    f"context_fields: {name!r} is not among text_field ({', '.join(names)})"
                )
        if self.generated is not None:
            if names[: len(self.context_fields)] != self.context_fields:
                raise ValueError(
                    "context_fields are the prompt, and what is generated comes behind it; name "
                    f"them first in text_field, in its order: got {self.context_fields} of {names}"
                )
        elif set(names) <= set(self.context_fields):
            raise ValueError("context_fields: all of text_field; nothing is left to predict")
        return self

    def identity(self) -> dict[str, Any]:
        """What the documents depend on, in this block; the files count by their content."""
        without = {"files", *([] if self.where else ["where"])}
        without |= {"messages", *_OF_CONVERSATIONS} if self.messages is None else {*_OF_PLAIN_TEXT}
        if self.generated is None:
            return self.model_dump(exclude=without | {"generated"})
        generated = self.generated.model_dump(exclude={"batch_size"})  # it changes no answer's law
        return self.model_dump(exclude=without | {"generated"}) | {"generated": generated}


class HubDocuments(_Records):
    """A dataset on the Hugging Face hub."""

    hub: str
    """Its name."""
    config: str | None = None
    """Its configuration, where it has several."""
    split: str = "train"
    """Split to train on."""
    validation_split: str | None = None
    """Split to validate on; without it, `validation_share` of the documents is kept apart."""
    held_out_split: str | None = None
    """Split to measure on; without it, `held_out_share` of the documents is kept apart."""
    revision: str | None = None
    """Branch, tag or commit."""
    streaming: bool = True
    """Whether to read it over the network as needed, or to download it first."""
    domain: Name = "corpus"
    """The domain that these documents are counted under."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the training budget, relative to the other entries."""

    @property
    def has_own_splits(self) -> bool:
        """Whether validation and held-out documents come from splits of their own."""
        return self.validation_split is not None and self.held_out_split is not None


class FileDocuments(_Records):
    """Local files: one document a record, or one a text file."""

    files: str | list[str]
    """Paths or globs, relative to the recipe's folder; `**` stands for any folders. jsonl, json,
    csv, parquet and arrow have records, text has no fields; each may be packed (gz, bz2, zst,
    xz)."""
    format: Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "arrow"] | None = None
    """What the files are, where their endings do not say it."""
    domain: Name = "corpus"
    """The domain that these documents are counted under."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the training budget, relative to the other entries."""

    def identity(self) -> dict[str, Any]:
        """What the documents depend on, in this block; the files count by their content."""
        settings = super().identity()
        if self.format is None:  # the endings, which count with the content
            del settings["format"]
        return settings


_KINDS_OF_DOCUMENTS = ("builtin", "hub", "files")


def _kind_of_documents(entry: Any) -> str | None:
    for kind in _KINDS_OF_DOCUMENTS:
        if kind in entry if isinstance(entry, dict) else hasattr(entry, kind):
            return kind
    return None


Documents = Annotated[
    Annotated[BuiltinDocuments, Tag("builtin")]
    | Annotated[HubDocuments, Tag("hub")]
    | Annotated[FileDocuments, Tag("files")],
    Discriminator(
        _kind_of_documents,
        custom_error_type="kind_of_documents",
        custom_error_message="an entry needs one of the keys builtin, hub, files",
    ),
]


class CorpusSettings(SettingsBlock):
    """The text that all models read, cut into blocks."""

    documents: Annotated[list[Documents], Field(min_length=1)]
    """Where the text comes from; an entry begins with `builtin:`, `hub:` or `files:`."""
    block_bytes: Annotated[int, Field(ge=4)] = 4096
    """Longest block, in bytes of UTF-8. Plain text must fit the context of every model; of a
    conversation each model reads as much as does."""
    train_bytes: Annotated[int, Field(gt=0)] | None = None
    """Text to train on, in bytes over all entries, to a block; null takes all of it."""
    train_tokens: Annotated[int, Field(gt=0)] | None = None
    """The same budget in tokens of the target's tokenizer, instead of `train_bytes`."""
    validation_bytes: Annotated[int, Field(gt=0)] = 200_000
    """Most text to validate on, in bytes per domain, to a block."""
    held_out_bytes: Annotated[int, Field(gt=0)] = 400_000
    """Most text to measure on, in bytes per domain, to a block."""
    validation_share: Share = 0.01
    """Share of the documents kept for validation, by a hash of their text."""
    held_out_share: Share = 0.02
    """Share of the documents kept to measure on, by a hash of their text."""
    shard_blocks: Annotated[int, Field(gt=0)] = 256
    """Blocks in one shard: the unit of work that is never done twice."""

    @property
    def has_conversations(self) -> bool:
        """Whether the text is conversations, which each model reads by its chat template."""
        return any(isinstance(e, _Records) and e.messages is not None for e in self.documents)

    @property
    def has_context(self) -> bool:
        """Whether some text is read and not predicted."""
        return any(
            isinstance(e, _Records) and (e.context_fields or e.generated) and e.messages is None
            for e in self.documents
        )

    @property
    def generated(self) -> dict[int, GeneratedSettings]:
        """The entries whose answers a model writes, by their numbers."""
        return {
            n: entry.generated
            for n, entry in enumerate(self.documents)
            if isinstance(entry, _Records) and entry.generated is not None
        }

    def identity(self) -> dict[str, Any]:
        """The settings that blocks are made from; files count by their content."""
        documents = [entry.identity() for entry in self.documents]
        return {"documents": documents} | self.model_dump(exclude={"documents"})

    @model_validator(mode="after")
    def _one_kind(self) -> "CorpusSettings":
        plain = [e.domain for e in self.documents if not (isinstance(e, _Records) and e.messages)]
        if self.has_conversations and plain:
            raise ValueError(
                f"documents: {plain[0]!r} is plain text, and others are conversations, whose turns "
                "end with another token than a text does; train on one kind at a time"
            )
        if self.has_conversations and self.block_bytes > _LONGEST_ANSWER_BYTES:
            raise ValueError(
                f"block_bytes: {self.block_bytes} is more than a conversation may have, "
                f"{_LONGEST_ANSWER_BYTES}"
            )
        return self

    @model_validator(mode="after")
    def _one_budget(self) -> "CorpusSettings":
        if self.train_bytes is not None and self.train_tokens is not None:
            raise ValueError("set train_bytes or train_tokens, not both")
        return self
