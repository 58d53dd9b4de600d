"""The suites, by name: what is in each, where its data comes from and what its number means."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

from fusellm.errors import EvaluationError
from fusellm.evaluation.suites import paper_tasks, row_formats, smoke
from fusellm.evaluation.suites.data import Hub, Origin, Row, of_task
from fusellm.evaluation.suites.task import Definition, Inputs, Plan
from fusellm.evaluation.yaml_table import yaml_table

_TABLE = yaml_table(__file__)
BBH_SIZES: Mapping[str, int] = _TABLE["sizes"]["bbh"]
_INSTRUCTIONS = "instruction answer"


@dataclass(frozen=True)
class Suite:
    """A suite: its number is the plain mean of its tasks' scores, each in per cent.

    Attributes:
        contains: what is in it, in words.
        data: where its data comes from, in words.
        plans: its tasks on lm_eval.
        others: tasks that another module runs, with their numbers of documents.
    """

    name: str
    about: str
    contains: str
    data: str
    plans: tuple[Plan, ...] = ()
    others: Mapping[str, int] = field(default_factory=dict)

    @property
    def tasks(self) -> dict[str, int]:
        """Documents of each task."""
        return {plan.name: plan.documents for plan in self.plans} | dict(self.others)

    @property
    def documents(self) -> int:
        """Of all tasks."""
        return sum(self.tasks.values())

    def require(self, tasks: Iterable[str]) -> None:
        """Check that the suite has tasks of some names.

        Raises:
            EvaluationError: it has not.
        """
        for task in tasks:
            if task not in self.tasks:
                names = ", ".join(self.tasks)
                raise EvaluationError(f"{self.name} has no task {task!r}; it has {names}")


def _stock(
    file: str,
    split: str,
    rows_as: Callable[[Sequence[Row]], tuple[Row, ...]] = tuple,
    shots: int | None = 0,
) -> Callable[[Inputs], Definition]:
    """A task of lm_eval's own, on rows that were read here."""

    def define(inputs: Inputs) -> Definition:
        config = {} if shots is None else {"num_fewshot": shots}
        return Definition(rows_as(inputs.rows["rows"]), config, split, file)

    return define


def _boolq(inputs: Inputs) -> Definition:
    rows = row_formats.boolq_rows(inputs.rows["rows"])
    file, config = "super_glue/boolq/default.yaml", {"num_fewshot": 0}
    if all("passage" in row for row in rows):
        return Definition(rows, config, "validation", file)
    without = config | {
        "doc_to_text": "Question: {{question}}?\nAnswer:",
        "should_decontaminate": False,
    }
    note = "without the passages, which these records do not have: not comparable with BoolQ proper"
    return Definition(rows, without, "validation", file, (note,))


def _drop(inputs: Inputs) -> Definition:
    rows = inputs.rows["rows"]
    flat = any("answers_spans" in row for row in rows)
    note = "ucinlp/drop's rows: each span is an answer of its own, also of an answer of several"
    notes = (note,) if flat else ()
    config = {"num_fewshot": 0}
    return Definition(row_formats.drop_rows(rows), config, "validation", "drop/default.yaml", notes)


def _of_hub(plan: Plan, hub: Hub, keys: Sequence[str], paths: tuple[str, ...] = ()) -> Plan:
    """A task whose rows are a dataset on the hub; `keys` are alternatives, parted by spaces."""
    parted = tuple(tuple(one.split()) for one in keys)
    return replace(plan, rows={"rows": of_task(plan.name, hub, parted, paths)})


def _bbh_questions(task: str) -> Origin:
    return Origin(
        (f"bbh/{task}.json", f"BIG-Bench-Hard/bbh/{task}.json"),
        f"github.com/suzgunmirac/BIG-Bench-Hard (bbh/{task}.json)",
        Hub("SaylorTwift/bbh", task, "test"),
        (("input", "target"),),
    )


def _bbh_prompt(task: str) -> Origin:
    folders = ("bbh-cot-prompts", "cot-prompts", "BIG-Bench-Hard/cot-prompts")
    return Origin(
        tuple(f"{folder}/{task}.txt" for folder in folders),
        f"github.com/suzgunmirac/BIG-Bench-Hard (cot-prompts/{task}.txt)",
    )


def _bbh_plan(task: str, documents: int) -> Plan:
    plan = Plan(task, "exact_match", "binary", documents, paper_tasks.bbh)
    return replace(
        plan, rows={"questions": _bbh_questions(task)}, texts={"prompt": _bbh_prompt(task)}
    )


def _bbh_harness_plan(task: str, documents: int) -> Plan:
    define = _stock(f"bbh/cot_fewshot/{task}.yaml", "test", shots=None)
    rows = {"rows": _bbh_questions(task)}
    return Plan(task, "exact_match", "binary", documents, define, rows, filter="get-answer")


def _arc(name: str, config: str, documents: int) -> Plan:
    define = _stock(f"arc/{name}.yaml", "test", row_formats.arc_rows)
    return _of_hub(
        Plan(name, "acc_norm", "binary", documents, define),
        Hub("allenai/ai2_arc", config, "test"),
        ("question choices answerKey", _INSTRUCTIONS),
        (f"commonsense/{config}.test.json",),
    )


_HELLASWAG = _stock("hellaswag/hellaswag.yaml", "validation", row_formats.hellaswag_rows)
_OPENBOOKQA = _stock("openbookqa/openbookqa.yaml", "test", row_formats.openbookqa_rows)
_TRIVIAQA = _stock("triviaqa/default.yaml", "validation", row_formats.triviaqa_rows)
_LAMBADA = _stock("lambada/lambada_openai.yaml", "test")
_COMMONSENSE = (
    _arc("arc_easy", "ARC-Easy", 2376),
    _arc("arc_challenge", "ARC-Challenge", 1172),
    _of_hub(
        Plan("boolq", "acc", "binary", 3270, _boolq),
        Hub("google/boolq", None, "validation"),
        ("question passage answer", "question passage label", _INSTRUCTIONS),
        ("commonsense/boolq.test.json", "super_glue/boolq/validation-*.parquet"),
    ),
    _of_hub(
        Plan("hellaswag", "acc_norm", "binary", 10042, _HELLASWAG),
        Hub("Rowan/hellaswag", None, "validation"),
        ("activity_label ctx_a ctx_b endings label",),
        ("hellaswag_val.jsonl",),
    ),
    _of_hub(
        Plan("openbookqa", "acc_norm", "binary", 500, _OPENBOOKQA),
        Hub("allenai/openbookqa", "main", "test"),
        ("question_stem choices answerKey", _INSTRUCTIONS),
        ("commonsense/openbookqa.test.json",),
    ),
)


def _iwslt_origin(split: str) -> Origin:
    hub = Hub("IWSLT/iwslt2017", "iwslt2017-en-de", split, "refs/convert/parquet")
    return of_task(f"iwslt2017-en-de.{split}", hub, (("translation",),))


def _scibench_origin(book: str) -> Origin:
    folders = ("scibench/dataset/original", "dataset/original", "scibench")
    return Origin(
        tuple(f"{folder}/{book}.json" for folder in folders),
        f"github.com/mandyyyyii/scibench (dataset/original/{book}.json)",
        keys=(("problem_text", "answer_number", "unit"),),
    )


_IWSLT = {split: _iwslt_origin(split) for split in ("validation", "test")}
_SCIBENCH = {book: _scibench_origin(book) for book in paper_tasks.SCIBENCH_BOOKS}
_TEXTGEN = (
    _of_hub(
        Plan("triviaqa", "exact_match", "binary", 17944, _TRIVIAQA, filter="remove_whitespace"),
        Hub("mandarjoshi/trivia_qa", "rc.nocontext", "validation"),
        ("question answer",),
    ),
    _of_hub(
        Plan("drop", "f1", "value", 9536, _drop),
        Hub("EleutherAI/drop", None, "validation"),
        (
            "query_id passage question answer validated_answers",
            "query_id passage question answers_spans",
        ),
        Hub("ucinlp/drop", None, "validation").patterns(),
    ),
    _of_hub(
        Plan("lambada_openai", "acc", "binary", 5153, _LAMBADA),
        Hub("EleutherAI/lambada_openai", "default", "test"),
        ("text",),
    ),
    Plan("iwslt2017_en_de", "bleu", "bleu", 8079, paper_tasks.iwslt, _IWSLT),
    Plan("scibench", "exact_match", "binary", 580, paper_tasks.scibench, _SCIBENCH),
)

_PLANS = {
    "smoke": (
        Plan("patterns", "acc", "binary", smoke.PATTERNS, smoke.patterns),
        Plan("agreement", "acc", "binary", smoke.AGREEMENT, smoke.agreement),
        Plan("recall", "exact_match", "binary", smoke.RECALL, smoke.recall),
    ),
    "bbh": tuple(_bbh_plan(task, size) for task, size in BBH_SIZES.items()),
    "bbh_harness": tuple(_bbh_harness_plan(task, size) for task, size in BBH_SIZES.items()),
    "commonsense": _COMMONSENSE,
    "textgen": _TEXTGEN,
}

SUITES = {
    name: Suite(
        name,
        plans=_PLANS.get(name, ()),
        others={} if name in _PLANS else _TABLE["sizes"].get(name, {}),
        **words,
    )
    for name, words in _TABLE["suites"].items()
}


def named(name: str) -> Suite | None:
    """The suite of a name; None where it is not one of ours, and so may be a task of lm_eval."""
    return SUITES.get(name)


def unknown(name: str, others: Sequence[str]) -> EvaluationError:
    """The error for a name that is neither a suite nor a task of lm_eval."""
    near = get_close_matches(name, [*SUITES, *others], n=3)
    meant = f"; did you mean {' or '.join(near)}?" if near else "."
    return EvaluationError(
        f"there is no suite {name!r}, and no task of lm_eval of that name{meant} "
        f"The suites are {', '.join(SUITES)}"
    )
