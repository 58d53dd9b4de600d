"""Writing on from prompts, for programs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fusellm.config import EvaluationSettings
from fusellm.evaluation.harness.lm_eval import extra, quiet, seeded
from fusellm.evaluation.harness.model import LoadedModel, measured_model
from fusellm.progress import Progress, Silent

MOST_NEW_TOKENS = 512


@dataclass(frozen=True)
class Written:
    """What a model wrote after one prompt: a text a sample, and whether the prompt was cut."""

    texts: list[str]
    truncated: bool


def new_tokens(settings: EvaluationSettings) -> int:
    """Most tokens that a model writes of a program."""
    return min(MOST_NEW_TOKENS, settings.max_new_tokens or MOST_NEW_TOKENS)


def complete(
    loaded: LoadedModel,
    prompts: Sequence[str],
    stop: Sequence[str],
    settings: EvaluationSettings,
    progress: Progress | None = None,
    what: str = "writing",
) -> list[Written]:
    """What a model writes after each prompt, up to the first of the stop strings.

    Raises:
        EvaluationError: lm_eval is not installed, or a prompt is too long and not to be cut.
    """
    requests = requests_for(prompts, stop, settings, what)
    with measured_model(loaded, settings, progress or Silent(), what) as lm, quiet(), seeded():
        texts: list[str] = lm.generate_until(requests)
    starts = range(0, len(texts), settings.samples)
    return [
        Written(texts[start : start + settings.samples], n in lm.cut)
        for n, start in enumerate(starts)
    ]


def requests_for(
    prompts: Sequence[str], stop: Sequence[str], settings: EvaluationSettings, what: str
) -> list[Any]:
    """What a model is asked to write, as lm_eval's requests; the samples of a prompt together."""
    extra("lm_eval")
    from lm_eval.api.instance import Instance

    arguments: dict[str, Any] = {
        "until": list(stop),
        "max_gen_toks": new_tokens(settings),
        "do_sample": settings.temperature > 0,
    }
    if settings.temperature > 0:
        arguments |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    return [
        Instance("generate_until", {}, (prompt, arguments), n, metadata=(what, n, 1))
        for n, prompt in enumerate(prompts)
        for _ in range(settings.samples)
    ]
