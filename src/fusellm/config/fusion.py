"""How a recipe's distributions become one: `fusion:`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fusellm.config.base import Name, SettingsBlock


class FusionSettings(SettingsBlock):
    """How aligned distributions become one."""

    strategy: Literal["partition", "bytes", "bpm", "mined", "em"] = "partition"
    """`partition`: compare over the classes that both tokenizers have; `bytes`: map each source
    token to the first target token of its bytes; `bpm`: to the longest target token that its bytes
    begin with, and on along the text (BPM); `mined` and `em`: the paper's token alignment, and the
    target token of nearest or of equal spelling (MinED, EM)."""
    refine: Literal["none", "path"] | None = None
    """`path`: split the class of the true next token by what the source says further on, along the
    text (docs/method.md); `none`: leave it whole. null splits with `partition`, where else there
    are no classes."""
    compatibility: Literal["none", "paper"] = "none"
    """`paper`: the authors' rules where `mined` and `em` cannot align a position (all mass on the
    token just read, off by one) and where ids meet (all but the first dropped); for comparison."""
    token_healing: bool | None = None
    """Whether a source's distributions are corrected for its own token boundaries: what comes after
    `;` where `;` and a line end are one token to it (docs/method.md). null does so with `partition`
    and `bytes`, and not with `bpm`, whose authors do not; `mined` and `em` have no boundaries to
    heal at."""
    inside_tokens: bool = False
    """Whether a source is asked where the target's boundary is within one of its tokens, by what it
    said of the bytes read since (docs/method.md). Needs token healing."""
    function: Literal["mince", "avgce", "avgce_paper", "uniform", "best", "bayes", "route"] = (
        "mince"
    )
    """`mince`: the distribution of the source with the least cross-entropy against the text;
    `avgce`: the average, weights ∝ exp(−beta · cross-entropy); `avgce_paper`: by the authors'
    formula; `uniform`: the plain average; `best`: an oracle that sees the true next token; `bayes`:
    each source by its probability, given the block so far; `route`: the one that `routes` names."""
    routes: dict[str, Name] = Field(default_factory=dict)
    """For `route`: each domain of the corpus with the source that alone is heard there."""
    cross_entropy: Literal["bits_per_byte", "nats_per_token"] = "bits_per_byte"
    """What sources are compared by. Nats per token, the paper's, favours short tokens."""
    granularity: Literal["block", "window"] = "window"
    """Over which text sources are compared: the block (the paper), or a window around it."""
    window_bytes: Annotated[int, Field(gt=0)] = 64
    """The window's reach to each side, in bytes; the next token is part of it."""
    hindsight: bool = True
    """Whether what comes after a position counts where sources are compared: the true next token,
    and the window's or block's text behind it. `false` compares them by what stands before; where
    positions have not read the same (`mined`, `em`, `inside_tokens`) a source's token that reaches
    past one counts by its share before it."""
    beta: Annotated[float, Field(ge=0)] = 5.0
    """Sharpness of `avgce`: 0 is the plain average, a large one `mince`."""

    @model_validator(mode="after")
    def _has_a_meaning(self) -> Self:
        if self.compatibility == "paper" and self.strategy not in ("mined", "em"):
            raise ValueError(
                f"fusion.compatibility: paper belongs to strategy mined or em, not to "
                f"{self.strategy}; leave it out"
            )
        if self.token_healing and not self.by_boundaries:
            raise ValueError(
                f"fusion.token_healing: true belongs to strategy partition, bytes or bpm, not to "
                f"{self.strategy}, whose positions have not read the same; leave it out"
            )
        if self.inside_tokens and not self.heals:
            raise ValueError(
                "fusion.inside_tokens: true needs token_healing: true (partition, bytes or bpm)"
            )
        if self.refine == "path" and self.strategy != "partition":
            raise ValueError(
                f"fusion.refine: path belongs to strategy partition, not to {self.strategy}, which "
                "has no classes to split; leave it out"
            )
        if self.refine == "none" and self.strategy == "bpm":
            raise ValueError(
                "fusion.refine: none does not go with strategy bpm, which follows the text by its "
                "definition; leave it out"
            )
        if self.cross_entropy == "nats_per_token" and self.granularity == "window":
            raise ValueError(
                "fusion.cross_entropy: nats_per_token is of whole blocks; add granularity: block"
            )
        return self

    @model_validator(mode="after")
    def _compares_what_it_can(self) -> Self:
        if self.function == "route" and not self.routes:
            raise ValueError(
                "fusion.function: route needs fusion.routes, a source for each domain: "
                "{python: coder, prose: writer}"
            )
        if self.routes and self.function != "route":
            raise ValueError(
                f"fusion.routes has no meaning with function: {self.function}; set function: route"
            )
        if self.hindsight:
            return self
        for key, value in {
            "function: best": self.function == "best",
            "function: avgce_paper": self.function == "avgce_paper",
            "cross_entropy: nats_per_token": self.cross_entropy == "nats_per_token",
        }.items():
            if value:
                why = "sees the true next token" if "best" in key else "is of whole blocks"
                raise ValueError(
                    f"fusion.hindsight: false does not go with {key}, which {why}; leave one out"
                )
        return self

    @property
    def refines(self) -> bool:
        """Whether a source's distributions further on in the text are used."""
        return self.strategy == "bpm" or (self.strategy == "partition" and self.refine != "none")

    @property
    def by_boundaries(self) -> bool:
        """Whether positions are aligned that have read the same bytes."""
        return self.strategy in ("partition", "bytes", "bpm")

    @property
    def heals(self) -> bool:
        """Whether tokens are healed."""
        default = self.strategy in ("partition", "bytes")
        return default if self.token_healing is None else self.token_healing
