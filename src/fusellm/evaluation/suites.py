"""The suites, by name: what is in each, where its data comes from and what its number means."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from fusellm.errors import EvaluationError
from fusellm.evaluation import layouts, own_tasks, smoke
from fusellm.evaluation.data import Hub, Origin, Row, of_task
from fusellm.evaluation.plans import Definition, Inputs, Plan

BBH_SIZES = {
    "boolean_expressions": 250,
    "causal_judgement": 187,
    "date_understanding": 250,
    "disambiguation_qa": 250,
    "dyck_languages": 250,
    "formal_fallacies": 250,
    "geometric_shapes": 250,
    "hyperbaton": 250,
    "logical_deduction_five_objects": 250,
    "logical_deduction_seven_objects": 250,
    "logical_deduction_three_objects": 250,
    "movie_recommendation": 250,
    "multistep_arithmetic_two": 250,
    "navigate": 250,
    "object_counting": 250,
    "penguins_in_a_table": 146,
    "reasoning_about_colored_objects": 250,
    "ruin_names": 250,
    "salient_translation_error_detection": 250,
    "snarks": 178,
    "sports_understanding": 250,
    "temporal_sequences": 250,
    "tracking_shuffled_objects_five_objects": 250,
    "tracking_shuffled_objects_seven_objects": 250,
    "tracking_shuffled_objects_three_objects": 250,
    "web_of_lies": 250,
    "word_sorting": 250,
}
MULTIPL_E_SIZES = {
    "cpp": 161,
    "go": 154,
    "java": 158,
    "js": 161,
    "php": 161,
    "python": 164,
    "r": 161,
    "rb": 161,
    "rs": 156,
    "ts": 159,
}
_INSTRUCTIONS = ("instruction", "answer")


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
    rows = layouts.boolq_rows(inputs.rows["rows"])
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
    return Definition(layouts.drop_rows(rows), config, "validation", "drop/default.yaml", notes)


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
    return Plan(
        task,
        "exact_match",
        "binary",
        documents,
        own_tasks.bbh,
        {"questions": _bbh_questions(task)},
        {"prompt": _bbh_prompt(task)},
    )


def _bbh_harness_plan(task: str, documents: int) -> Plan:
    return Plan(
        task,
        "exact_match",
        "binary",
        documents,
        _stock(f"bbh/cot_fewshot/{task}.yaml", "test", shots=None),
        {"rows": _bbh_questions(task)},
        filter="get-answer",
    )


def _arc(name: str, config: str, documents: int) -> Plan:
    origin = of_task(
        name,
        Hub("allenai/ai2_arc", config, "test"),
        (("question", "choices", "answerKey"), _INSTRUCTIONS),
        (f"commonsense/{config}.test.json",),
    )
    define = _stock(f"arc/{name}.yaml", "test", layouts.arc_rows)
    return Plan(name, "acc_norm", "binary", documents, define, {"rows": origin})


_COMMONSENSE = (
    _arc("arc_easy", "ARC-Easy", 2376),
    _arc("arc_challenge", "ARC-Challenge", 1172),
    Plan(
        "boolq",
        "acc",
        "binary",
        3270,
        _boolq,
        {
            "rows": of_task(
                "boolq",
                Hub("google/boolq", None, "validation"),
                (
                    ("question", "passage", "answer"),
                    ("question", "passage", "label"),
                    _INSTRUCTIONS,
                ),
                ("commonsense/boolq.test.json", "super_glue/boolq/validation-*.parquet"),
            )
        },
    ),
    Plan(
        "hellaswag",
        "acc_norm",
        "binary",
        10042,
        _stock("hellaswag/hellaswag.yaml", "validation", layouts.hellaswag_rows),
        {
            "rows": of_task(
                "hellaswag",
                Hub("Rowan/hellaswag", None, "validation"),
                (("activity_label", "ctx_a", "ctx_b", "endings", "label"),),
                ("hellaswag_val.jsonl",),
            )
        },
    ),
    Plan(
        "openbookqa",
        "acc_norm",
        "binary",
        500,
        _stock("openbookqa/openbookqa.yaml", "test", layouts.openbookqa_rows),
        {
            "rows": of_task(
                "openbookqa",
                Hub("allenai/openbookqa", "main", "test"),
                (("question_stem", "choices", "answerKey"), _INSTRUCTIONS),
                ("commonsense/openbookqa.test.json",),
            )
        },
    ),
)


def _iwslt_origin(split: str) -> Origin:
    hub = Hub("IWSLT/iwslt2017", "iwslt2017-en-de", split, "refs/convert/parquet")
    return of_task(f"iwslt2017-en-de.{split}", hub, (("translation",),))


_TEXTGEN = (
    Plan(
        "triviaqa",
        "exact_match",
        "binary",
        17944,
        _stock("triviaqa/default.yaml", "validation", layouts.triviaqa_rows),
        {
            "rows": of_task(
                "triviaqa",
                Hub("mandarjoshi/trivia_qa", "rc.nocontext", "validation"),
                (("question", "answer"),),
            )
        },
        filter="remove_whitespace",
    ),
    Plan(
        "drop",
        "f1",
        "value",
        9536,
        _drop,
        {
            "rows": of_task(
                "drop",
                Hub("EleutherAI/drop", None, "validation"),
                (
                    ("query_id", "passage", "question", "answer", "validated_answers"),
                    ("query_id", "passage", "question", "answers_spans"),
                ),
                Hub("ucinlp/drop", None, "validation").patterns(),
            )
        },
    ),
    Plan(
        "lambada_openai",
        "acc",
        "binary",
        5153,
        _stock("lambada/lambada_openai.yaml", "test"),
        {
            "rows": of_task(
                "lambada_openai", Hub("EleutherAI/lambada_openai", "default", "test"), (("text",),)
            )
        },
    ),
    Plan(
        "iwslt2017_en_de",
        "bleu",
        "bleu",
        8079,
        own_tasks.iwslt,
        {split: _iwslt_origin(split) for split in ("validation", "test")},
    ),
    Plan(
        "scibench",
        "exact_match",
        "binary",
        580,
        own_tasks.scibench,
        {
            book: Origin(
                tuple(
                    f"{folder}/{book}.json"
                    for folder in ("scibench/dataset/original", "dataset/original", "scibench")
                ),
                f"github.com/mandyyyyii/scibench (dataset/original/{book}.json)",
                keys=(("problem_text", "answer_number", "unit"),),
            )
            for book in own_tasks.SCIBENCH_BOOKS
        },
    ),
)

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            "smoke",
            "whether an evaluation runs: a minute, no data",
            "repeating patterns, agreement of verbs, recall of a number; made in code",
            "none",
            (
                Plan("patterns", "acc", "binary", smoke.PATTERNS, smoke.patterns),
                Plan("agreement", "acc", "binary", smoke.AGREEMENT, smoke.agreement),
                Plan("recall", "exact_match", "binary", smoke.RECALL, smoke.recall),
            ),
        ),
        Suite(
            "lm",
            "bits per byte of held-out text, comparable between tokenizers",
            "the run's held-out blocks",
            "the run's corpus",
        ),
        Suite(
            "bbh",
            "BIG-Bench Hard as the paper ran it, by open-instruct",
            "27 tasks, chain of thought with 3 examples; exact match, plain mean over tasks",
            "suzgunmirac/BIG-Bench-Hard: bbh/*.json, cot-prompts/*.txt",
            tuple(_bbh_plan(task, size) for task, size in BBH_SIZES.items()),
        ),
        Suite(
            "bbh_harness",
            "BIG-Bench Hard as lm_eval's bbh_cot_fewshot runs it; not to be mixed with bbh",
            "27 tasks; exact match with case and punctuation",
            "suzgunmirac/BIG-Bench-Hard: bbh/*.json",
            tuple(_bbh_harness_plan(task, size) for task, size in BBH_SIZES.items()),
        ),
        Suite(
            "commonsense",
            "five multiple-choice tasks, zero-shot, as lm_eval runs them",
            "ARC easy and challenge, HellaSwag, OpenBookQA (acc_norm), BoolQ (acc)",
            "hub datasets ai2_arc, boolq, hellaswag, openbookqa, or LLM-Adapters' records",
            _COMMONSENSE,
        ),
        Suite(
            "textgen",
            "reading, recall, translation and science, as lm_eval runs them where it does",
            "TriviaQA (exact match), DROP (F1), LAMBADA (acc), IWSLT2017 en-de (BLEU), "
            "SciBench (number within 5 %)",
            "hub datasets trivia_qa, drop, lambada_openai, iwslt2017; mandyyyyii/scibench",
            _TEXTGEN,
        ),
        Suite(
            "multiple",
            "programs that pass their tests, in ten languages (MultiPL-E), run in a sandbox",
            "HumanEval's problems in C++, Go, Java, JavaScript, PHP, Python, R, Ruby, Rust, "
            "TypeScript; pass@k",
            "nuprl/MultiPL-E: humaneval-<language>.jsonl; openai/human-eval for Python",
            others=MULTIPL_E_SIZES,
        ),
        Suite(
            "humaneval",
            "Python programs that pass their tests (HumanEval as published), run in a sandbox",
            "164 functions to be written; pass@k",
            "openai/human-eval: HumanEval.jsonl.gz",
            others={"humaneval": MULTIPL_E_SIZES["python"]},
        ),
    )
}


def named(name: str) -> Suite | None:
    """The suite of a name; None where it is not one of ours, and so may be a task of lm_eval."""
    return SUITES.get(name)


def unknown(name: str, others: Sequence[str]) -> EvaluationError:
    """The error for a name that is neither a suite nor a task of lm_eval."""
    near = get_close_matches(name, [*SUITES, *others], n=3)
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    return EvaluationError(
        f"there is no suite {name!r}, and no task of lm_eval of that name{meant} "
        f"The suites are {', '.join(SUITES)}"
    )
