"""What a recipe can say. Every field has a sentence with its unit."""

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from fusellm.config.base import Name, SettingsBlock, Share
from fusellm.config.corpus import BuiltinDocuments as BuiltinDocuments
from fusellm.config.corpus import CorpusSettings as CorpusSettings
from fusellm.config.corpus import Documents as Documents
from fusellm.config.corpus import FileDocuments as FileDocuments
from fusellm.config.corpus import GeneratedSettings as GeneratedSettings
from fusellm.config.corpus import HubDocuments as HubDocuments
from fusellm.config.fusion import FusionSettings as FusionSettings
from fusellm.config.objective import ObjectiveSettings as ObjectiveSettings

RESERVED_NAMES = ("target", "clm", "fused", "fused-clm")
Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"]
Spread = Literal["auto", "balanced", "balanced_low_0", "sequential"]


class ModelSettings(SettingsBlock):
    """Where a model is and how it is loaded."""

    model: str
    """A folder, a GGUF file, a name on the Hugging Face hub, or zoo/prose, zoo/python, zoo/cpp."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    gguf_file: str | None = None
    """Name of a GGUF file in that folder or repository (`fusellm[gguf]`); it is dequantized."""
    tokenizer: str | None = None
    """Folder or hub name of a tokenizer that the model is read with in place of its own."""
    prefix: list[str] | None = None
    """Tokens that are put before each block in place of those that the tokenizer puts before a text
    by itself, as in ["[gMASK]", "<sop>"]; [] puts none. null leaves it to the tokenizer."""
    chat_template: str | None = None
    """Of conversations: file with a chat template in Jinja, relative to the recipe's folder, in
    place of the one that the model comes with."""
    system: str | None = None
    """Of conversations: what this model alone is told as system message, where they have none."""
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
    """Whether code that comes with the model is wanted. It runs if who types the command has read
    it, and gives --trust-remote-code as well."""

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
    referee: bool = False
    """Compare it with the others, and never teach it: a source that costs as much as a referee
    around a position is not heard there. The target itself as a referee keeps sources silent where
    it knows better (docs/method.md)."""


def model_block(given: Any) -> Any:
    """What a text alone means in the place of a model.

    >>> model_block("zoo/prose")
    {'model': 'zoo/prose'}
    """
    return {"model": given} if isinstance(given, str) else given


def source_block(given: Any) -> Any:
    """What a text alone means in the place of a source, whose name is the end of its model's.

    >>> source_block("models/my model.gguf")
    {'model': 'models/my model.gguf', 'name': 'my-model'}
    """
    if not isinstance(given, str):
        return given
    end = PurePosixPath(given).name.removesuffix(".gguf")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", end).lstrip("._-")
    return {"model": given, "name": name}


class ExternalizeSettings(SettingsBlock):
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
    changed_share: Share = 0.5
    """Most blocks that a tokenizer may change (lower case, NFC, unknown characters), as a share of
    all; they are left out for its model. Above it nothing is read."""


class LoraSettings(SettingsBlock):
    """Low-rank adapters (PEFT), trained in place of the target's weights."""

    r: Annotated[int, Field(gt=0)] = 16
    """Rank."""
    alpha: Annotated[int, Field(gt=0)] = 32
    """What an adapter adds is scaled by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that are set to zero at each step."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Names of the layers that have an adapter, by their ends; `all-linear` is all linear layers
    but the head, which can be named."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Names of layers that are trained whole."""
    merge: bool = True
    """Whether the saved model is an ordinary one, adapters merged into its weights, or a folder of
    the adapters alone."""


class TrainingSettings(SettingsBlock):
    """Training. Besides the fields here it takes every name of transformers' TrainingArguments.

    Weights are trained in float32 whatever the target's dtype is: small steps would be lost in
    half precision. `bf16: true` computes in bfloat16 around them. With `lora` and no
    `modules_to_save` the target's own weights, which stay as they are, have its dtype.
    """

    model_config = ConfigDict(extra="allow")

    rows: Literal["block", "packed"] = "block"
    """One block a row, or several in a row of `row_tokens`, each attending only to itself."""
    row_tokens: Annotated[int, Field(gt=0)] = 2048
    """Tokens of a packed row. A longer block has a row of its own."""
    clm_baseline: bool = True
    """Whether to train the same target with λ = 1 too, for comparison."""
    clm: dict[str, Any] = Field(default_factory=dict)
    """TrainingArguments that the CLM baseline has instead, found by a search of its own."""
    validations: Annotated[int, Field(ge=0)] = 10
    """How often bits per byte of the validation part are measured during training."""
    keep: Literal["last", "best"] = "last"
    """Which model is saved: that of the last step, or that of the best validation (bits per byte,
    mean over the domains)."""
    early_stop_validations: Annotated[int, Field(gt=0)] | None = None
    """Stop after so many validations in a row without a better one than before; null never does."""
    lora: LoraSettings | None = None
    """Train low-rank adapters in place of all weights; needs `fusellm[lora]`."""

    @property
    def arguments(self) -> dict[str, Any]:
        """The names that go to TrainingArguments."""
        return dict(self.model_extra or {})


class EvaluationSettings(SettingsBlock):
    """What is measured in the end."""

    batch_tokens: Annotated[int, Field(gt=0)] | None = None
    """Tokens in one forward pass, padding included; null takes 16,384 on a GPU, and 2,048 on a CPU,
    where a batch should stay in its caches."""
    resamplings: Annotated[int, Field(ge=100)] = 10_000
    """How many subsets of the documents are drawn for tests and 95 % intervals."""
    continuations: Annotated[int, Field(ge=0, le=64)] = 4
    """Beginnings of held-out documents that every model goes on with, for the report; 0 has none.
    Another number measures nothing anew."""
    suites: list[str] = Field(default_factory=list)
    """What is measured besides bits per byte: `smoke`, `bbh`, `bbh_harness`, `commonsense`,
    `textgen`, `multiple`, `humaneval`, or tasks of lm_eval by their names (`fusellm[eval]`). The
    keys below are of these suites."""
    data_dir: str | None = None
    """Folder with the suites' data."""
    allow_download: bool = False
    """Whether data that is not in `data_dir` may be fetched from the Hugging Face hub."""
    tasks: list[str] = Field(default_factory=list)
    """Only these tasks of the suites; all if empty."""
    limit: Annotated[int, Field(gt=0)] | None = None
    """Only so many documents of each task, from the first."""
    batch_size: Annotated[int, Field(gt=0)] = 8
    """Documents at a time; another one can change the last digits of a score."""
    too_long: Literal["error", "truncate"] = "error"
    """What becomes of a prompt that does not fit a model's context: stop, or cut it from the left,
    its examples first, and count it."""
    max_new_tokens: Annotated[int, Field(gt=0)] | None = None
    """Most tokens that a model writes, where a task allows more; for small contexts."""
    samples: Annotated[int, Field(gt=0)] = 1
    """Programs for each problem of `multiple` and `humaneval`."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Of programs; 0 takes the likeliest token each time."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the mass that programs are sampled from, with a temperature."""
    pass_at: Annotated[int, Field(gt=0)] = 1
    """k of pass@k: how likely one of k programs passes."""
    toolchains: list[str] = Field(default_factory=list)
    """Folders outside of /usr with compilers and interpreters in their `bin`, which programs under
    test may read."""
    chat: bool = False
    """Whether suites ask each model by its chat template, a task's examples as turns, as lm_eval's
    `--apply_chat_template` does."""
    published: bool = False
    """Whether the paper's figures are shown beside a suite's table."""

    @property
    def data_folder(self) -> Path | None:
        """`data_dir`, with `~` as the user's home."""
        return Path(self.data_dir).expanduser() if self.data_dir else None

    @model_validator(mode="after")
    def _can_be_sampled(self) -> "EvaluationSettings":
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples: {self.samples} at temperature 0 are all equal; set temperature, 0.2 for "
                "instance, or samples: 1"
            )
        if self.pass_at > self.samples:
            raise ValueError(
                f"pass_at: {self.pass_at} needs as many samples, and samples is {self.samples}; "
                f"set samples: {self.pass_at} or more"
            )
        return self


class Recipe(SettingsBlock):
    """A run of fusellm."""

    name: Name
    """Name of the run; its folder is runs/NAME unless --out says another."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of draws, order and subsets of documents."""
    rounds: Annotated[int, Field(ge=1)] = 1
    """How often answers are generated, read, fused and trained on. Each round begins with the
    target that the one before has trained, and is a run of its own, in `round-N`
    (docs/generated.md)."""
    target: Annotated[
        ModelSettings, BeforeValidator(model_block, json_schema_input_type=str | ModelSettings)
    ]
    """The model that is trained: a block, or where it is and no more."""
    sources: Annotated[
        list[
            Annotated[
                SourceSettings,
                BeforeValidator(source_block, json_schema_input_type=str | SourceSettings),
            ]
        ],
        Field(min_length=1),
    ]
    """The models whose distributions are read; the target may be one of them."""
    corpus: CorpusSettings
    externalize: ExternalizeSettings = ExternalizeSettings()
    fusion: FusionSettings = FusionSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
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
        if all(source.referee for source in self.sources):
            raise ValueError("sources: all are referees; at least one has to teach")
        if self.fusion.compatibility == "paper" and any(s.referee for s in self.sources):
            raise ValueError(
                "fusion.compatibility: paper has no referees; leave referee: true out of sources"
            )
        _check_routes(self)
        _check_generated(self)
        if any(entry.domain == "mean" for entry in self.corpus.documents):
            raise ValueError("corpus.documents: 'mean' is the mean over domains; name it otherwise")
        lora = self.training.lora
        if lora is not None and not lora.merge and self.target.device_map is not None:
            raise ValueError(
                "training.lora.merge: false has no meaning with target.device_map: adapters are "
                "merged to be measured, which a model that is spread cannot be; leave one out"
            )
        if self.training.validations == 0:
            for name in ("keep: best", "early_stop_validations"):
                if getattr(self.training, name.split(":")[0]) not in (None, "last"):
                    raise ValueError(
                        f"training.{name} goes by validations; set training.validations above 0"
                    )
        return self

    @model_validator(mode="after")
    def _objective_has_a_meaning(self) -> "Recipe":
        if self.externalize.scheme == "sampled" and self.objective.rest == "renormalize":
            raise ValueError(
                "objective.rest: renormalize has no meaning with externalize.scheme: sampled, "
                "whose draws leave nothing out; use bucket"
            )
        _check_divergence(self)
        return self


def _check_generated(recipe: Recipe) -> None:
    """Check that every generated answer has a model, and that rounds have something to repeat."""
    names = ["target", *(source.name for source in recipe.sources)]
    for n, generated in recipe.corpus.generated.items():
        if generated.by not in names:
            raise ValueError(
                f"corpus.documents.{n}.generated.by: there is no model {generated.by!r}; there are "
                f"{', '.join(names)}"
            )
    lora = recipe.training.lora
    if recipe.rounds > 1 and lora is not None and not lora.merge:
        raise ValueError(
            "training.lora.merge: false leaves adapters of one round alone, and the next round "
            "begins with a whole model; leave it out with rounds"
        )
    if recipe.rounds > 1 and not recipe.corpus.generated:
        raise ValueError(
            f"rounds: {recipe.rounds} repeat what is generated, and nothing is; give an entry of "
            "corpus.documents a generated block, or leave rounds out (more epochs are "
            "training.num_train_epochs)"
        )


def _check_routes(recipe: Recipe) -> None:
    """Check that every domain has a route, and that it leads to a source that is heard."""
    routes = recipe.fusion.routes
    if not routes:
        return
    teaching = [source.name for source in recipe.sources if not source.referee]
    domains = list(dict.fromkeys(entry.domain for entry in recipe.corpus.documents))
    for domain, name in routes.items():
        if domain not in domains:
            raise ValueError(
                f"fusion.routes: the corpus has no domain {domain!r}; it has {', '.join(domains)}"
            )
        if name not in teaching:
            raise ValueError(
                f"fusion.routes.{domain}: {name!r} is no source that teaches; there are "
                f"{', '.join(teaching)}"
            )
    missing = [domain for domain in domains if domain not in routes]
    if missing:
        raise ValueError(
            f"fusion.routes: the domain {missing[0]!r} has no source; name one of "
            f"{', '.join(teaching)}"
        )


def _check_divergence(recipe: Recipe) -> None:
    """Check that divergence and temperature have a meaning with what is kept of distributions."""
    objective, fusion, externalize = recipe.objective, recipe.fusion, recipe.externalize
    if objective.divergence == "reverse_kl":
        why = "which asks for the fused probability of every token"
        if externalize.scheme == "sampled":
            raise ValueError(
                f"objective.divergence: reverse_kl, {why}, has no meaning with externalize.scheme: "
                "sampled, where a token that was not drawn has none; use scheme: top"
            )
        if objective.rest == "renormalize":
            raise ValueError(
                f"objective.divergence: reverse_kl, {why}, has no meaning with rest: renormalize, "
                "where what was not kept has none; use bucket"
            )
        if fusion.compatibility == "paper":
            raise ValueError(
                f"objective.divergence: reverse_kl, {why}, has no meaning with compatibility: "
                "paper, which puts all mass on one token where it cannot align; leave that out"
            )
    if objective.temperature == 1.0:
        return
    wanted = []  # all of it at once: one of these alone may be refused for want of another
    if externalize.scheme == "sampled":
        wanted.append("externalize.scheme: top")
    if objective.rest != "renormalize":
        wanted.append("objective.rest: renormalize")
    if fusion.strategy == "partition":
        wanted.append("fusion.strategy: bytes (or mined, em)")
    if wanted:
        raise ValueError(
            f"objective.temperature: {objective.temperature:g} flattens the probabilities of "
            f"single tokens, so that it needs {', '.join(wanted)}; set that, or leave temperature "
            "out"
        )
