"""What a recipe can say. Every field has a sentence with its unit."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

RESERVED_NAMES = ("target", "clm", "fused", "fused-clm")

Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"]
Spread = Literal["auto", "balanced", "balanced_low_0", "sequential"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Share = Annotated[float, Field(ge=0, le=1)]


class _Block(BaseModel):
    model_config = ConfigDict(
        extra="forbid", populate_by_name=True, use_attribute_docstrings=True, frozen=True
    )


class ModelSettings(_Block):
    """Where a model is and how it is loaded."""

    model: str
    """A folder, a name on the Hugging Face hub, or zoo/prose, zoo/python, zoo/cpp."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Dtype = "float32"
    """Precision of the weights while the model runs."""
    quantization: Literal["8bit", "4bit"] | None = None
    """Quantize the weights while loading, with bitsandbytes (`fusellm[quantized]`); what is not
    quantized, the head among it, has `dtype`. For models that are only read."""
    device_map: Spread | Annotated[dict[str, int | str], Field(min_length=1)] | None = None
    """How a model larger than one device is spread, as transformers' from_pretrained takes it:
    `auto`, `balanced`, `balanced_low_0`, `sequential`, or modules with their places, which are
    numbers of GPUs, `cpu` or `disk`. null keeps it on one device."""
    attention: Attention = "auto"
    """Attention implementation; `auto` takes the fastest that the architecture and the machine
    have. `flash_attention_2` and `_3` need a GPU and half precision."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run. Off unless you have read it."""

    @property
    def precision(self) -> str:
        """What of these settings changes a model's numbers: `dtype`, and any quantization."""
        return self.dtype if self.quantization is None else f"{self.dtype}, {self.quantization}"

    @model_validator(mode="after")
    def _flash_is_half(self) -> "ModelSettings":
        if self.attention.startswith("flash") and self.dtype == "float32":
            raise ValueError(
                f"attention: {self.attention} needs dtype bfloat16 or float16, not float32; set "
                "one of them, or attention: auto"
            )
        return self


class SourceSettings(ModelSettings):
    """A model whose distributions are read."""

    name: Name
    """Its name in folders and tables."""


class BuiltinDocuments(_Block):
    """The built-in corpus: text of the installed Python packages."""

    builtin: Literal["prose", "python", "cpp"]
    """Which of its domains."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the training budget, relative to the other entries."""

    @property
    def domain(self) -> str:
        """The domain that these documents are counted under."""
        return self.builtin


class HubDocuments(_Block):
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
    text_field: str = "text"
    """Field that holds the text."""
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


class FileDocuments(_Block):
    """Local files: one document a row of parquet or jsonl, one a text file."""

    files: str | list[str]
    """Paths or globs, relative to the recipe's folder: .parquet, .jsonl, or text."""
    text_field: str = "text"
    """Field that holds the text, in parquet and jsonl."""
    domain: Name = "corpus"
    """The domain that these documents are counted under."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the training budget, relative to the other entries."""


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


class CorpusSettings(_Block):
    """The text that all models read, cut into blocks."""

    documents: Annotated[list[Documents], Field(min_length=1)]
    """Where the text comes from; an entry begins with `builtin:`, `hub:` or `files:`."""
    block_bytes: Annotated[int, Field(ge=4)] = 4096
    """Longest block, in bytes of UTF-8; it must fit the context of every model."""
    train_bytes: Annotated[int, Field(gt=0)] | None = None
    """Text to train on, in bytes over all entries; null takes all of it."""
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

    @model_validator(mode="after")
    def _one_budget(self) -> "CorpusSettings":
        if self.train_bytes is not None and self.train_tokens is not None:
            raise ValueError("set train_bytes or train_tokens, not both")
        return self


class ExternalizeSettings(_Block):
    """What is kept of a source's distribution at each position."""

    scheme: Literal["top", "sampled"] = "sampled"
    """`top`: the most probable tokens; `sampled`: seeded draws, unbiased where `top` is not."""
    draws: Annotated[int, Field(ge=1, le=255)] = 32
    """Draws per position (`sampled`)."""
    k: Annotated[int, Field(ge=1, le=65_535)] = 32
    """Most tokens kept per position (`top`)."""
    mass: Annotated[float, Field(gt=0, le=1)] | None = 0.99
    """Keep no more than reach this probability (`top`); null always keeps `k`."""
    batch_tokens: Annotated[int, Field(gt=0)] | None = None
    """Tokens in one forward pass, padding included; null takes 16,384 on a GPU, and 2,048 on a CPU,
    where a batch should stay in its caches."""
    not_finite_share: Share = 0.01
    """Most blocks that may give NaN or infinity, as a share of all; they are put aside."""


class FusionSettings(_Block):
    """How aligned distributions become one."""

    strategy: Literal["partition", "bytes", "mined", "em"] = "partition"
    """`partition`: compare over the classes that both tokenizers have; `bytes`: map each source
    token to the first target token of its bytes; `mined` and `em`: the paper's token alignment,
    and the target token of nearest or of equal spelling (MinED, EM)."""
    compatibility: Literal["none", "paper"] = "none"
    """`paper`: the authors' rules where `mined` and `em` cannot align a position (all mass on the
    token just read, off by one) and where ids meet (all but the first dropped); for comparison."""
    function: Literal["mince", "avgce", "avgce_paper", "uniform", "best"] = "mince"
    """`mince`: the distribution of the source with the least cross-entropy against the text;
    `avgce`: the average, weights ∝ exp(−beta · cross-entropy); `avgce_paper`: by the authors'
    formula; `uniform`: the plain average; `best`: an oracle that sees the true next token."""
    cross_entropy: Literal["bits_per_byte", "nats_per_token"] = "bits_per_byte"
    """What sources are compared by. Nats per token, the paper's, favours short tokens."""
    granularity: Literal["block", "window"] = "window"
    """Over which text sources are compared: the block (the paper), or a window around it."""
    window_bytes: Annotated[int, Field(gt=0)] = 64
    """The window's reach to each side, in bytes; the next token is part of it."""
    beta: Annotated[float, Field(ge=0)] = 5.0
    """Sharpness of `avgce`: 0 is the plain average, a large one `mince`."""
    lambda_: Annotated[float, Field(ge=0, le=1, alias="lambda")] = 0.9
    """Weight of L_CLM in L = λ·L_CLM + (1−λ)·L_Fusion."""
    rest: Literal["bucket", "renormalize"] = "bucket"
    """What was not kept: one more outcome (`bucket`), or scaled away (`renormalize`, the paper)."""


class TrainingSettings(_Block):
    """Training. Besides the fields here it takes every name of transformers' TrainingArguments.

    Weights are trained in float32 whatever the target's dtype is: small steps would be lost in
    half precision. `bf16: true` computes in bfloat16 around them.
    """

    model_config = ConfigDict(extra="allow")

    rows: Literal["block", "packed"] = "block"
    """One block a row, or several in a row of `row_tokens`, each attending only to itself."""
    row_tokens: Annotated[int, Field(gt=0)] = 2048
    """Tokens of a packed row."""
    clm_baseline: bool = True
    """Whether to train the same target with λ = 1 too, for comparison."""
    clm: dict[str, Any] = Field(default_factory=dict)
    """TrainingArguments that the CLM baseline has instead, found by a search of its own."""
    validations: Annotated[int, Field(ge=0)] = 10
    """How often bits per byte of the validation part are measured during training."""

    @property
    def arguments(self) -> dict[str, Any]:
        """The names that go to TrainingArguments."""
        return dict(self.model_extra or {})


class EvaluationSettings(_Block):
    """What is measured in the end."""

    batch_tokens: Annotated[int, Field(gt=0)] | None = None
    """Tokens in one forward pass, padding included; null takes 16,384 on a GPU, and 2,048 on a CPU,
    where a batch should stay in its caches."""
    bootstrap: Annotated[int, Field(ge=100)] = 10_000
    """Resamplings of the documents for the 95 % intervals."""


class Recipe(_Block):
    """A run of fusellm."""

    name: Name
    """Name of the run; its folder is runs/<name> unless --out says another."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of draws, order and bootstrap."""
    target: ModelSettings
    """The model that is trained."""
    sources: Annotated[list[SourceSettings], Field(min_length=1)]
    """The models whose distributions are read; the target may be one of them."""
    corpus: CorpusSettings
    externalize: ExternalizeSettings = ExternalizeSettings()
    fusion: FusionSettings = FusionSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.target.quantization is not None:
            raise ValueError(
                f"target.quantization: {self.target.quantization} is for sources; quantized "
                "weights cannot be trained. Leave it out"
            )
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"sources: two are named {name!r}; give each a name of its own")
            if name in RESERVED_NAMES:
                reserved = ", ".join(RESERVED_NAMES)
                raise ValueError(f"sources: {name!r} is a result's name; choose none of {reserved}")
        if any(entry.domain == "mean" for entry in self.corpus.documents):
            raise ValueError("corpus.documents: 'mean' is the mean over domains; name it otherwise")
        fusion = self.fusion
        if fusion.compatibility == "paper" and fusion.strategy not in ("mined", "em"):
            raise ValueError(
                f"fusion.compatibility: paper belongs to strategy mined or em, not to "
                f"{fusion.strategy}; leave it out"
            )
        if fusion.cross_entropy == "nats_per_token" and fusion.granularity == "window":
            raise ValueError(
                "fusion.cross_entropy: nats_per_token is of whole blocks; add granularity: block"
            )
        if self.externalize.scheme == "sampled" and self.fusion.rest == "renormalize":
            raise ValueError(
                "fusion.rest: renormalize has no meaning with externalize.scheme: sampled, whose "
                "draws leave nothing out; use bucket"
            )
        return self
