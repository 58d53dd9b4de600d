"""Writing on from prompts, for programs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fusellm.errors import EvaluationError
from fusellm.evaluation.lm_eval_import import extra, quiet, seeded
from fusellm.evaluation.settings import Loaded, Settings
from fusellm.evaluation.watched import watched
from fusellm.progress import Progress, Silent


@dataclass(frozen=True)
class Writing:
    """How programs are written.

    Attributes:
        samples: of each prompt.
        temperature: 0 for the likeliest token each time.
        top_p: share of mass that is sampled from.
    """

    max_new_tokens: int
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Written:
    """What a model wrote after one prompt: a text a sample, and whether the prompt was cut."""

    texts: list[str]
    truncated: bool


def complete(
    loaded: Loaded,
    prompts: Sequence[str],
    stop: Sequence[str],
    writing: Writing,
    settings: Settings,
    progress: Progress | None = None,
    what: str = "writing",
) -> list[Written]:
    """What a model writes after each prompt, up to the first of the stop strings.

    Raises:
        EvaluationError: lm_eval is not installed, several equal samples are asked for, or a
            prompt is too long and not to be cut.
    """
    require_different(writing)
    requests = requests_for(prompts, stop, writing, what)
    with (
        watched(loaded, settings, progress or Silent(), what) as lm,
        quiet(),
        seeded(settings.seed),
    ):
        texts: list[str] = lm.generate_until(requests)
    starts = range(0, len(texts), writing.samples)
    return [
        Written(texts[start : start + writing.samples], n in lm.cut)
        for n, start in enumerate(starts)
    ]


def requests_for(
    prompts: Sequence[str], stop: Sequence[str], writing: Writing, what: str
) -> list[Any]:
    """What a model is asked to write, as lm_eval's requests; the samples of a prompt together."""
    extra("lm_eval")
    from lm_eval.api.instance import Instance

    arguments: dict[str, Any] = {
        "until": list(stop),
        "max_gen_toks": writing.max_new_tokens,
        "do_sample": writing.temperature > 0,
    }
    if writing.temperature > 0:
        arguments |= {"temperature": writing.temperature, "top_p": writing.top_p, "top_k": 0}
    return [
        Instance("generate_until", {}, (prompt, arguments), n, metadata=(what, n, 1))
        for n, prompt in enumerate(prompts)
        for _ in range(writing.samples)
    ]


def require_different(writing: Writing) -> None:
    """Check that several samples of a prompt can differ.

    Raises:
        EvaluationError: they cannot.
    """
    if writing.samples > 1 and writing.temperature == 0:
        raise EvaluationError(
            f"{writing.samples} samples at temperature 0 are all equal; ask for one, or set a "
            "temperature"
        )
