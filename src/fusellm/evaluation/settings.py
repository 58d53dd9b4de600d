"""How suites are run, and on what."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fusellm.config import EvaluationSettings

# How errors name settings, which a run and a check have from a recipe alone.
DATA_DIR = "evaluation.data_dir, or --data-dir of fusellm evaluate"
DOWNLOAD = "evaluation.allow_download: true, or --allow-download of fusellm evaluate"


@dataclass(frozen=True)
class Settings:
    """How suites are run.

    Attributes:
        data_dir: folder that data is looked for in.
        allow_download: whether the hub may be asked for what is not there.
        only: names of tasks, to run no others of a suite.
        batch_size: requests at a time; fixed, as it can change the last digits of a score.
        limit: only so many documents of each task, from the first.
        seed: of examples that are drawn, and of writing that is sampled.
        too_long: what to do with a prompt that does not fit the model's context beside what is
            to be written: stop, or cut it from the left and count it.
        max_new_tokens: upper limit of what is written, under that of a task; for small contexts.
        samples, temperature, top_p: of programs; other tasks say themselves how they are written.
        toolchains: folders outside of /usr with compilers and interpreters in their `bin`.
    """

    data_dir: Path | None = None
    allow_download: bool = False
    only: tuple[str, ...] = ()
    batch_size: int = 8
    limit: int | None = None
    seed: int = 1234
    too_long: Literal["error", "truncate"] = "error"
    max_new_tokens: int | None = None
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    toolchains: tuple[Path, ...] = ()


def settings_of(evaluation: EvaluationSettings) -> Settings:
    """What a recipe says of suites, as settings."""
    return Settings(
        data_dir=Path(evaluation.data_dir).expanduser() if evaluation.data_dir else None,
        allow_download=evaluation.allow_download,
        only=tuple(evaluation.tasks),
        batch_size=evaluation.batch_size,
        limit=evaluation.limit,
        too_long=evaluation.too_long,
        max_new_tokens=evaluation.max_new_tokens,
        samples=evaluation.samples,
        temperature=evaluation.temperature,
        top_p=evaluation.top_p,
        toolchains=tuple(Path(folder).expanduser() for folder in evaluation.toolchains),
    )


@dataclass(frozen=True)
class Loaded:
    """A model in memory, its tokenizer, and its longest input where it has one."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context_tokens: int | None = None
