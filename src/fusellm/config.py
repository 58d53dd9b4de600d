"""The recipe: one YAML file says everything about a run.

Every field has a sentence with its unit; unknown keys are refused with the nearest known one, and
every error gives its path in the file.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from fusellm.errors import RecipeError

RESERVED_NAMES = ("target", "clm", "fused", "fused-clm")

Dtype = Literal["float32", "bfloat16", "float16"]
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
    trust_remote_code: bool = False
    """Whether code that comes with the model may run. Off unless you have read it."""


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
    batch_tokens: Annotated[int, Field(gt=0)] = 8192
    """Tokens in one forward pass, padding included."""


class FusionSettings(_Block):
    """How aligned distributions become one."""

    strategy: Literal["partition", "bytes"] = "partition"
    """`partition`: compare over the classes that both tokenizers have; `bytes`: map each source
    token to the first target token of its bytes."""
    function: Literal["mince"] = "mince"
    """`mince`: the distribution of the source with the least cross-entropy against the text."""
    granularity: Literal["block", "window"] = "window"
    """Over which text sources are compared: the block (the paper), or a window around it."""
    window_bytes: Annotated[int, Field(gt=0)] = 64
    """The window's reach to each side, in bytes; the next token is part of it."""
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

    batch_tokens: Annotated[int, Field(gt=0)] = 8192
    """Tokens in one forward pass, padding included."""
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
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"sources: two are named {name!r}; give each a name of its own")
            if name in RESERVED_NAMES:
                reserved = ", ".join(RESERVED_NAMES)
                raise ValueError(f"sources: {name!r} is a result's name; choose none of {reserved}")
        if any(entry.domain == "mean" for entry in self.corpus.documents):
            raise ValueError("corpus.documents: 'mean' is the mean over domains; name it otherwise")
        if self.externalize.scheme == "sampled" and self.fusion.rest == "renormalize":
            raise ValueError(
                "fusion.rest: renormalize has no meaning with externalize.scheme: sampled, whose "
                "draws leave nothing out; use bucket"
            )
        return self


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 1e-5 is one, which YAML 1.1 reads as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        changes: `a.b=value` settings that go over the file's, values in YAML.

    Raises:
        RecipeError: the file is missing, not YAML, or not a recipe; every fault is named with its
            path in the file.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise RecipeError(
            f"there is no recipe {path}; `fusellm init {path}` writes a commented one"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{path} is not YAML: {reason}") from None
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{path} must be a mapping of keys to values, and is {type(raw).__name__}; "
            "`fusellm init` writes an example"
        )
    for change in changes:
        _apply(raw, change)
    return check_recipe(raw, str(path))


def check_recipe(raw: dict[str, Any], where: str) -> Recipe:
    """Check a recipe that is already a mapping.

    Raises:
        RecipeError: with every fault and its path.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        faults = "; ".join(_explain(fault) for fault in error.errors())
        raise RecipeError(f"{where}: {faults}") from None


def schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    return Recipe.model_json_schema(by_alias=True)


def _apply(raw: dict[str, Any], change: str) -> None:
    path, equals, text = change.partition("=")
    if not equals:
        raise RecipeError(f"--set {change!r} must be KEY=VALUE, like fusion.lambda=0.7")
    *parents, last = path.strip().split(".")
    node: Any = raw
    for parent in parents:
        if isinstance(node, list) and parent.isdigit() and int(parent) < len(node):
            node = node[int(parent)]
            continue
        if isinstance(node, dict) and node.get(parent) is None:
            node[parent] = {}
        node = node.get(parent) if isinstance(node, dict) else None
        if not isinstance(node, dict | list):
            raise RecipeError(f"--set {change!r}: {parent!r} is not a block of the recipe")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise RecipeError(f"--set {change!r}: the value {text!r} is not YAML") from None
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            raise RecipeError(f"--set {change!r}: the list has {len(node)} entries, from 0")
        node[int(last)] = value
    else:
        node[last] = value


def _explain(fault: Any) -> str:
    steps, kind = list(fault["loc"]), None
    if steps[:2] == ["corpus", "documents"] and len(steps) > 3:
        kind = steps.pop(3)  # pydantic's tag of the union, which is not in the file
    place = ".".join(str(step) for step in steps)
    if fault["type"] == "extra_forbidden":
        key = str(steps[-1])
        known = _known_keys(steps[:-1], kind)
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known) or 'none'}"
        return f"unknown key {place}{hint}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "missing":
        return f"{place} is missing"
    given = "" if fault["type"] == "value_error" else f", got {fault['input']!r}"
    return f"{place}: {message}{given}" if place else message


def _known_keys(steps: Sequence[Any], kind: str | None) -> list[str]:
    """Keys of the block at `steps`; of a union's blocks, those of the one that has key `kind`."""
    blocks: list[type[BaseModel]] = [Recipe]
    for step in steps:
        if isinstance(step, int):
            continue
        blocks = [
            inner
            for block in blocks
            for name, field in block.model_fields.items()
            if (field.alias or name) == step
            for inner in _blocks_in(field.annotation)
        ]
    return [
        field.alias or name
        for block in blocks
        if kind is None or kind in block.model_fields
        for name, field in block.model_fields.items()
    ]


def _blocks_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [block for part in get_args(annotation) for block in _blocks_in(part)]
