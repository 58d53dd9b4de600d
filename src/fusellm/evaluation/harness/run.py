"""Running tasks through lm_eval, which is imported where it is used: it is an extra."""

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np

from fusellm.config import EvaluationSettings
from fusellm.evaluation.compare.records import Answer, Header, Kind, TaskRecord
from fusellm.evaluation.harness.lm_eval import SEED, quiet, seeded, silently_building
from fusellm.evaluation.harness.model import LoadedModel, measured_model
from fusellm.progress import Progress, Silent
from fusellm.store.identity import digest

_SOFTWARE = ("lm_eval", "transformers", "torch", "datasets")
Render = Callable[..., str]
"""From a list of messages to text, as lm_eval calls it: with `add_generation_prompt` by name."""

_NOT_PROTOCOL = ("task", "dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset")


@dataclass(frozen=True)
class Task(ABC):
    """A task that is ready to run, by the settings that it was made with.

    Attributes:
        header: without a model.
    """

    header: Header
    settings: EvaluationSettings

    @property
    def place(self) -> str:
        """How messages call it."""
        return f"{self.header.suite}/{self.header.task}"

    def of_model(self, facts: Mapping[str, str]) -> Header:
        """The header for a model.

        Args:
            facts: name, fingerprints of weights and tokenizer, precision.
        """
        return replace(
            self.header, model=dict(facts) | {"batch_size": str(self.settings.batch_size)}
        )

    @abstractmethod
    def requests(self, render: Render | None = None, system: str | None = None) -> list[Any]:
        """What the task asks a model, as lm_eval's requests.

        Args:
            render: how a model's chat template says messages; None for a model that is asked plain
                text.
            system: what it is told first then.
        """

    @abstractmethod
    def run(
        self, loaded: LoadedModel, facts: Mapping[str, str], progress: Progress | None = None
    ) -> TaskRecord:
        """Run the task on a model, which is left in the mode that it was in.

        Raises:
            EvaluationError: prompts do not fit the model's context, and are not to be cut.
        """


@dataclass(frozen=True)
class HarnessTask(Task):
    """A task that lm_eval runs.

    Attributes:
        task: lm_eval's object.
        metric, filter: of the score.
        unread: why an answer cannot be read from a response.
    """

    task: Any
    metric: str
    filter: str
    unread: Callable[[str], str] = lambda _: ""

    def run(
        self, loaded: LoadedModel, facts: Mapping[str, str], progress: Progress | None = None
    ) -> TaskRecord:
        with measured_model(loaded, self.settings, progress or Silent(), self.place) as lm:
            answers = self.answers(lm)
            cut = lm.cut
        return TaskRecord(
            self.of_model(facts),
            tuple(replace(one, truncated=number in cut) for number, one in enumerate(answers)),
        )

    def requests(self, render: Render | None = None, system: str | None = None) -> list[Any]:
        chat: dict[str, Any] = {}
        if render is not None:
            chat = {"apply_chat_template": True, "fewshot_as_multiturn": True}
            chat |= {"chat_template": render, "system_instruction": system}
        with self._begun():
            self.task.build_all_requests(limit=self.settings.limit, rank=0, world_size=1, **chat)
        return list(self.task.instances)

    @contextmanager
    def _begun(self) -> Iterator[None]:
        """With lm_eval silent, and at the same examples for every model."""
        with quiet(), seeded(), silently_building(self.task):
            self.task.set_fewshot_seed(seed=SEED)
            yield

    def answers(self, lm: Any) -> list[Answer]:
        """What a model of lm_eval's interface answers to each document."""
        import lm_eval

        name = self.header.task
        with self._begun():
            results = lm_eval.evaluate(
                lm=lm,
                task_dict={"tasks": {name: self.task}},
                limit=self.settings.limit,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=self.settings.chat,
                fewshot_as_multiturn=self.settings.chat,
                system_instruction=lm.system if self.settings.chat else None,
            )
        means = means_of(self.task)
        seen: Counter[str] = Counter()
        answers = []
        for sample in results["samples"][name]:
            if sample["filter"] == self.filter:
                document = sample["doc_hash"]
                seen[document] += 1
                if seen[document] > 1:  # a task may ask the same thing twice
                    document = digest([document, seen[document]])
                answers.append(self._answer(sample, document, means))
        return answers

    def _answer(self, sample: dict[str, Any], document: str, means: set[str]) -> Answer:
        prompt, score = sample["prompt_hash"], sample[self.metric]
        if self.header.kind == "bleu":
            reference, response = score
            return Answer(document, prompt, response, 0.0, reference=reference)
        others = {
            name: float(sample[name])
            for name in sample["metrics"]
            if name in means and name != self.metric
        }
        response, reason = self._response(sample), ""
        if self.task.OUTPUT_TYPE == "generate_until":
            invalid = sample["filtered_resps"][0] == "[invalid]"
            reason = "no answer found" if invalid else self.unread(response)
        return Answer(document, prompt, response, float(score), reason=reason, others=others)

    def _response(self, sample: dict[str, Any]) -> str:
        """What was written, or the choice that was taken."""
        task = self.task
        if task.OUTPUT_TYPE == "generate_until":
            return str(sample["resps"][0][0])
        if task.OUTPUT_TYPE == "multiple_choice":
            choices = task.doc_to_choice(sample["doc"])
            nats = np.array([told[0] for told in sample["filtered_resps"][: len(choices)]])
            if self.metric == "acc_norm":
                nats = nats / np.array([float(len(choice)) for choice in choices])
            return str(choices[int(np.argmax(nats))])
        is_greedy = sample["filtered_resps"][0][1]
        return str(sample["arguments"][0][1]) if is_greedy else ""


def ready(
    suite: str,
    name: str,
    task: Any,
    measure: tuple[str, str],
    kind: Kind,
    data: Mapping[str, str],
    settings: EvaluationSettings,
    notes: Sequence[str] = (),
    unread: Callable[[str], str] = lambda _: "",
) -> HarnessTask:
    """An lm_eval task with the settings applied, and its header.

    Args:
        measure: metric and filter of the score.
        data: digest of each file that the task reads.
    """
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SEED)
    _limit_writing(task, settings)
    config = {k: _plain(v) for k, v in vars(task.config).items() if k not in _NOT_PROTOCOL}
    config["metadata"] = {
        k: v for k, v in (config.get("metadata") or {}).items() if k != "config_source"
    }
    protocol = {
        "config": digest(config),
        "version": config["metadata"].get("version"),
        "output": task.OUTPUT_TYPE,
        "examples": task.get_config("num_fewshot"),
        "metric": measure[0],
        "filter": measure[1],
        "writing": config.get("generation_kwargs"),
        "too_long": settings.too_long,
        "limit": settings.limit,
        "seed": SEED,
        "notes": list(notes),
    } | ({"chat": True} if settings.chat else {})
    software = {package: version(package) for package in _SOFTWARE}
    header = Header(suite, name, protocol, kind, dict(data), {}, software)
    return HarnessTask(header, settings, task, *measure, unread)


def means_of(task: Any) -> set[str]:
    """Measures of a task that are averaged over documents, higher being better."""
    from lm_eval.api.metrics import mean

    better = task.higher_is_better()
    return {name for name, how in task.aggregation().items() if how is mean and better.get(name)}


def _limit_writing(task: Any, settings: EvaluationSettings) -> None:
    if task.OUTPUT_TYPE != "generate_until" or settings.max_new_tokens is None:
        return
    from lm_eval.models.utils import normalize_gen_kwargs

    wanted = dict(task.config.generation_kwargs)
    most = normalize_gen_kwargs(wanted)["max_gen_toks"]
    for alias in ("max_new_tokens", "max_tokens", "max_completion_tokens"):
        wanted.pop(alias, None)
    wanted["max_gen_toks"] = min(most, settings.max_new_tokens)
    task.set_config(key="generation_kwargs", value=wanted)


def _plain(value: Any) -> Any:
    """A task's configuration as JSON; functions by their source, ours by their name."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if not callable(value):  # lm_eval's own objects, as of examples
        return _plain(vars(value))
    module = getattr(value, "__module__", "")
    name = getattr(value, "__qualname__", type(value).__name__)
    if module.split(".")[0] == "fusellm":
        return f"fusellm.{name}"  # not by its module: code that moves makes no other protocol
    try:
        source = inspect.getsource(value)
    except (OSError, TypeError):
        return name
    return hashlib.sha256(source.encode()).hexdigest()
