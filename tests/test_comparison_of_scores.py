"""Models compared over suites: what is refused, what is left out, and how it is written."""

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusellm.errors import EvaluationError
from fusellm.evaluation.compare.comparison import Comparison, NotRun, Rules, compare
from fusellm.evaluation.compare.published import MODELS, PUBLISHED
from fusellm.evaluation.compare.records import Answer, Header, Kind, TaskRecord
from fusellm.evaluation.compare.statistics import LEVEL, holm, mcnemar, smallest_shown
from fusellm.evaluation.compare.tables import (
    CSV_COLUMNS,
    as_json,
    csv_text,
    footer,
    markdown,
    number,
    published_table,
    table,
    verdict,
)
from fusellm.stages.report.charts import differences_chart

REASON = "needs the extra: pip install 'fusellm[eval]'"
pytest.importorskip("scipy", reason=REASON)
pytest.importorskip("sacrebleu", reason=REASON)

quick = settings(max_examples=25, deadline=None, derandomize=True)
FEW = Rules(resamplings=300)
SWAPPED = replace(FEW, pairs=[(b, a) for a, b in FEW.pairs])
WORDS = [f"w{i}" for i in range(20)]


def make(
    model: str,
    scores: Sequence[float],
    task: str = "arc",
    suite: str = "commonsense",
    kind: Kind = "binary",
    samples: int = 1,
    **protocol: Any,
) -> TaskRecord:
    """A record with these scores; a truncated prompt where the document's number is 0."""
    header = Header(
        suite,
        task,
        {"shots": 3, "stop": ["Q:"]} | protocol,
        kind,
        {f"{task}.json": "ab" * 32},
        {"name": model},
    )
    answers = [
        Answer(f"{i // samples:04d}", "p", "", float(score), i // samples == 0, i % samples)
        for i, score in enumerate(scores)
    ]
    return TaskRecord(header, tuple(answers))


def translated(model: str, texts: Sequence[str], references: Sequence[str]) -> TaskRecord:
    record = make(model, [0] * len(texts), "iwslt", "textgen", "bleu")
    answers = [
        replace(answer, response=text, reference=reference)
        for answer, text, reference in zip(record.answers, texts, references, strict=True)
    ]
    return replace(record, answers=tuple(answers))


def shuffled(record: TaskRecord, seed: int) -> TaskRecord:
    order = np.random.default_rng(seed).permutation(len(record.answers))
    return replace(record, answers=tuple(record.answers[i] for i in order))


def only(*found: Comparison) -> Comparison:
    (one,) = found
    return one


def draw_record(model: str, kind: Kind, n: int, rng: np.random.Generator) -> TaskRecord:
    if kind == "bleu":
        of_all = np.random.default_rng(7)
        references = [" ".join(of_all.choice(WORDS, 10)) for _ in range(n)]
        texts = [
            " ".join(w if rng.random() > 0.3 else rng.choice(WORDS) for w in text.split())
            for text in references
        ]
        return translated(model, texts, references)
    if kind == "samples":
        return make(model, rng.integers(2, size=4 * n), kind=kind, samples=4)
    return make(model, rng.integers(2, size=n) if kind == "binary" else rng.random(n), kind=kind)


KINDS: tuple[Kind, ...] = ("binary", "value", "samples", "bleu")


# What must hold of any scores


@quick
@given(st.sampled_from(KINDS), st.integers(2, 30), st.integers(0, 1000))
def test_swapped_models_have_the_negative_difference(kind: Kind, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    records = {m: [draw_record(m, kind, n, rng)] for m in ("clm", "fused")}
    there = only(*compare(records, FEW)).tasks[0].differences[0]
    back = only(*compare(records, SWAPPED)).tasks[0].differences[0]
    assert (there.name, back.name) == ("fused-clm", "clm-fused")
    assert there.value == -back.value
    assert (there.p, there.could_show, there.sign) == (back.p, back.could_show, -back.sign)
    if n < 6:
        assert there.interval is back.interval is None
        return
    low, high = there.interval or (np.nan, np.nan)
    assert back.interval == pytest.approx((-high, -low), abs=1e-9)
    assert low - 1e-9 <= there.value <= high + 1e-9
    assert (low <= 0 <= high) == (there.p > LEVEL)


@quick
@given(st.sampled_from(KINDS), st.integers(1, 20), st.integers(0, 1000))
def test_equal_answers_differ_by_nothing(kind: Kind, n: int, seed: int) -> None:
    records = {m: [draw_record(m, kind, n, np.random.default_rng(seed))] for m in ("clm", "fused")}
    one = only(*compare(records, FEW)).tasks[0].differences[0]
    assert (one.value, one.p, one.sign) == (0, 1, 0)
    assert one.interval == ((0, 0) if n > 5 else None)
    assert one.relative in (0, None)


@quick
@given(st.sampled_from(KINDS), st.integers(2, 20), st.integers(0, 1000))
def test_the_order_of_documents_changes_nothing(kind: Kind, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    records = {m: [draw_record(m, kind, n, rng)] for m in ("target", "clm", "fused")}
    mixed = {m: [shuffled(of[0], seed + i)] for i, (m, of) in enumerate(records.items())}
    assert compare(records, FEW) == compare(mixed, FEW)


# Numbers by hand


def test_scores_differences_and_relative_gain() -> None:
    found = only(
        *compare({"clm": [make("clm", [1, 1, 0, 0, 0] * 8)], "fused": [make("fused", [1] * 40)]})
    )
    line = found.tasks[0]
    assert found.mean is None
    assert (line.unit, line.n, dict(line.scores)) == ("%", 40, {"clm": 40, "fused": 100})
    one = line.differences[0]
    assert (one.value, one.relative) == (60, 150)
    assert one.p == one.corrected_p == mcnemar(24, 0)
    assert one.sign == 1
    assert dict(line.truncated) == {"clm": 1, "fused": 1}


def test_no_relative_gain_over_nothing() -> None:
    found = only(*compare({"clm": [make("clm", [0] * 4)], "fused": [make("fused", [1, 0, 0, 0])]}))
    assert found.tasks[0].differences[0].relative is None


def test_the_papers_relative_gains() -> None:
    """+5.16 % on BBH and +6.36 % on MultiPL-E over the target, as its abstract tables say."""
    for suite, gain in (("bbh", "2.05, +5.16 %"), ("multiple", "0.93, +6.36 %")):
        shown = published_table(suite)
        assert shown is not None
        assert dict(zip(shown.columns, shown.rows[0], strict=True))["fused − target"] == gain
    target, fused = (
        np.mean([points[MODELS.index(model)] for points in PUBLISHED["commonsense"].values()])
        for model in ("Llama-2-7B", "FuseLLM-7B")
    )
    assert 100 * (fused / target - 1) == pytest.approx(1.25, abs=0.01)
    assert published_table("elsewhere") is None


def test_the_mean_counts_every_task_the_same() -> None:
    records = {
        model: [
            make(model, [right] * 10, "small"),
            make(model, [1 - right] * 990 + [1] * 10, "big"),
        ]
        for model, right in (("target", 0), ("fused", 1))
    }
    found = only(*compare(records, FEW))
    assert found.mean is not None
    assert found.mean.n == 1010
    assert dict(found.mean.scores) == {"target": 50, "fused": pytest.approx(50.5)}
    assert found.mean.differences[0].value == pytest.approx(0.5)


def test_the_mean_varies_as_its_tasks_do() -> None:
    """Its spread is that of the tasks' standard errors; tasks of one outcome have none."""
    rng = np.random.default_rng(0)
    a = [rng.integers(2, size=n).astype(float) for n in (50, 400)]
    b = [rng.integers(2, size=n).astype(float) for n in (50, 400)]
    records = {
        model: [make(model, of, f"t{i}") for i, of in enumerate(tasks)]
        for model, tasks in (("fused", a), ("clm", b))
    }
    mean = only(*compare(records)).mean
    assert mean is not None
    one = mean.differences[0]
    variances = [(x - y).var() / len(x) for x, y in zip(a, b, strict=True)]
    spread = 100 * sum(variances) ** 0.5 / 2
    low, high = one.interval or (np.nan, np.nan)
    assert (high - low) / (2 * 1.96) == pytest.approx(spread, rel=0.05)
    assert one.could_show == pytest.approx(2.8016 * spread, rel=0.05)


def test_tasks_are_drawn_apart() -> None:
    """The mean of four tasks of equal answers is twice as sure as one of them."""
    scores = {m: list(np.random.default_rng(i).integers(2, size=200)) for i, m in enumerate("ab")}
    records = {m: [make(m, of, f"t{i}") for i in range(4)] for m, of in scores.items()}
    found = only(*compare(records, Rules(pairs=[("a", "b")])))
    ends = [one.interval or (np.nan, np.nan) for ln in found.lines for one in ln.differences]
    widths = [high - low for low, high in ends]
    assert widths[:4] == pytest.approx([widths[0]] * 4, rel=0.05)
    assert widths[4] == pytest.approx(widths[0] / 2, rel=0.05)


def test_samples_of_a_problem_are_one_cluster() -> None:
    """As wide as the problems' own shares, four times wider than as if samples were problems."""
    problems = np.random.default_rng(1).integers(2, size=60)
    records = {
        "clm": [make("clm", [0] * 960, kind="samples", samples=16)],
        "fused": [make("fused", np.repeat(problems, 16), kind="samples", samples=16)],
    }
    line = only(*compare(records)).tasks[0]
    alone = only(
        *compare({"clm": [make("clm", [0] * 60)], "fused": [make("fused", list(problems))]})
    ).tasks[0]
    assert (line.unit, line.n) == ("pass@1", 60)
    assert line.differences == alone.differences


def test_pass_at_k() -> None:
    records = {
        m: [make(m, [1, 0, 0, 0, 0, 0], kind="samples", samples=3)] for m in ("clm", "fused")
    }
    line = only(*compare(records, replace(FEW, pass_at=2))).tasks[0]
    assert line.unit == "pass@2"
    assert line.scores["fused"] == pytest.approx(100 * (2 / 3 + 0) / 2)
    with pytest.raises(EvaluationError, match="commonsense/arc: pass@4 needs at least 4 samples"):
        compare(records, replace(FEW, pass_at=4))


def test_marks_are_corrected_over_the_tasks() -> None:
    """p of 7 against 0 is 1/64: shown alone, not among eight tasks."""
    won = make("fused", [1] * 7 + [0] * 93, "won")
    lost = make("clm", [0] * 100, "won")
    alone = only(*compare({"fused": [won], "clm": [lost]}, FEW))
    assert alone.tasks[0].differences[0].sign == 1
    rest = {m: [make(m, [0, 1] * 20, f"t{i}") for i in range(7)] for m in ("fused", "clm")}
    among = only(*compare({"fused": [won, *rest["fused"]], "clm": [lost, *rest["clm"]]}, FEW))
    one = among.tasks[0].differences[0]
    assert one.p == alone.tasks[0].differences[0].p == 1 / 64
    assert one.corrected_p == holm([1 / 64] + [1] * 7)[0] == 8 / 64
    assert one.sign == 0
    assert "no difference shown after correction (≥ " in table(among).rows[0][-2]


def test_the_difference_that_would_be_shown_is_that_of_the_corrected_test() -> None:
    """8.1 points of 250 documents alone, 11.1 among 27 tasks."""
    a, b = [1] * 150 + [0] * 100, [1] * 125 + [0] * 25 + [1] * 25 + [0] * 75
    for tasks, points in ((1, 8.1), (27, 11.1)):
        records = {
            m: [make(m, of, f"t{i}") for i in range(tasks)] for m, of in (("fused", a), ("clm", b))
        }
        one = only(*compare(records, FEW)).tasks[0].differences[0]
        assert one.could_show == 100 * (smallest_shown(250, 50, LEVEL / tasks) or 0)
        assert one.could_show == pytest.approx(points, abs=0.05)


@pytest.mark.parametrize(
    ("documents", "tasks", "enough"), [(5, 1, False), (6, 1, True), (9, 27, False), (11, 27, True)]
)
def test_too_few_documents_for_so_many_tasks_are_said(
    documents: int, tasks: int, enough: bool
) -> None:
    """2 of 2^n choices of signs are as clear as can be; that is corrected by Holm too."""
    for kind, loser in (("binary", 0.0), ("value", 0.5)):
        records = {
            m: [make(m, [x] * documents, f"t{i:02}", kind=kind) for i in range(tasks)]
            for m, x in (("fused", 1.0), ("clm", loser))
        }
        found = only(*compare(records, FEW))
        one = found.tasks[0].differences[0]
        assert one.p == pytest.approx(2 ** (1 - documents))
        assert one.corrected_p == one.least_p == min(1, tasks * one.p)
        assert one.sign == int(enough)
        words = "better" if enough else "too few documents to show any difference"
        assert table(found).rows[0][-2].endswith(f"\n{words}")


def test_what_has_no_interval_is_written_without_one() -> None:
    records = {m: [make(m, [x] * 3)] for m, x in (("fused", 1), ("clm", 0))}
    found = only(*compare(records, FEW))
    cell = table(found).rows[0][-2]
    assert cell == "100.00\ntoo few documents to show any difference"
    row = list(csv.DictReader(io.StringIO(csv_text([found]))))[-1]
    assert (row["value"], row["low"], row["high"]) == ("100.0", "", "")
    json.dumps(as_json([found]), allow_nan=False)
    assert "arc 100.00, no interval" in differences_chart(found)


def test_documents_asked_twice_are_two() -> None:
    record = make("fused", [1, 0, 1])
    twice = replace(record, answers=(*record.answers, record.answers[0]))
    line = only(*compare({"fused": [twice], "clm": [twice]}, FEW)).tasks[0]
    assert line.n == 4
    assert line.scores["fused"] == 75


def test_models_stand_in_the_order_of_results() -> None:
    records = {m: [make(m, [1, 0])] for m in ("fused", "clm", "z", "target", "a")}
    found = only(*compare(records, FEW))
    assert found.models == ("z", "a", "target", "clm", "fused")
    assert [one.name for one in found.tasks[0].differences] == ["fused-target", "fused-clm"]


# What is refused


def refused(one: TaskRecord, other: TaskRecord) -> str:
    with pytest.raises(EvaluationError) as caught:
        compare({"fused": [one], "clm": [other]}, FEW)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_other_protocols_are_refused() -> None:
    fault = refused(make("fused", [1], shots=3), make("clm", [1], shots=0, chat={"on": True}))
    assert fault.startswith("commonsense/arc: scores of different protocols are not compared: ")
    assert "protocol.shots is 3 for 'fused' and 0 for 'clm'" in fault
    assert "protocol.chat.on is missing for 'fused' and True for 'clm'" in fault


def test_another_kind_is_refused() -> None:
    fault = refused(make("fused", [1]), make("clm", [1], kind="value"))
    assert "kind is 'binary' for 'fused' and 'value' for 'clm'" in fault


def test_a_long_setting_is_told_short() -> None:
    fault = refused(make("fused", [1], text="x" * 500 + "a"), make("clm", [1], text="x" * 501))
    assert "protocol.text is 'xxx" in fault
    assert len(fault) < 500


def test_other_data_are_refused() -> None:
    record = make("clm", [1])
    other = replace(record, header=replace(record.header, data={"arc.json": "cd" * 32}))
    fault = refused(make("fused", [1]), other)
    assert f"data.arc.json is {'ab' * 32!r} for 'fused' and {'cd' * 32!r} for 'clm'" in fault


def test_other_documents_are_refused() -> None:
    fault = refused(make("fused", [1, 0, 1]), make("clm", [1, 0]))
    assert "not given the same documents: 1 answered by 'fused' alone (document 0002" in fault
    renamed = make("clm", [1, 0])
    first, second = renamed.answers
    fault = refused(
        make("fused", [1, 0]), replace(renamed, answers=(first, replace(second, document="f" * 64)))
    )
    assert "1 answered by 'fused' alone (document 0001, sample 0)" in fault
    assert f"1 answered by 'clm' alone (document {'f' * 12}, sample 0)" in fault


def test_other_numbers_of_samples_are_refused() -> None:
    fault = refused(
        make("fused", [1] * 4, kind="samples", samples=2),
        make("clm", [1] * 2, kind="samples", samples=1),
    )
    assert "2 answered by 'fused' alone (document 0000, sample 1)" in fault


def test_other_references_are_refused() -> None:
    fault = refused(translated("fused", ["a"], ["a b"]), translated("clm", ["a"], ["a c"]))
    assert "another reference for document 0000" in fault


def test_other_protocols_of_other_suites_are_two_comparisons() -> None:
    records = {
        m: [make(m, [1, 0], "a", "bbh"), make(m, [0, 0], "a", "bbh_harness", shots=0)]
        for m in ("fused", "clm")
    }
    found = compare(records, FEW)
    assert [(one.suite, one.tasks[0].scores["fused"], one.mean) for one in found] == [
        ("bbh", 50, None),
        ("bbh_harness", 0, None),
    ]
    assert found[0].protocol != found[1].protocol


@pytest.mark.parametrize(
    ("kind", "score", "wanted"),
    [("binary", 0.5, "0 or 1"), ("samples", 2, "0 or 1"), ("value", float("nan"), "a number")],
)
def test_scores_that_are_none_are_refused(kind: Kind, score: float, wanted: str) -> None:
    fault = refused(make("fused", [1, score], kind=kind), make("clm", [1, 1], kind=kind))
    assert f"'fused' has a score of {score}" in fault
    assert "document 0001" in fault
    assert wanted in fault


def test_two_records_of_one_model_are_refused() -> None:
    with pytest.raises(EvaluationError, match="commonsense/arc: 'clm' has two records"):
        compare({"clm": [make("clm", [1]), make("clm", [1])]})


# What is left out


def test_a_task_that_one_model_lacks_is_not_run_and_never_zero() -> None:
    records = {
        m: [make(m, [1, 0] * 5, t) for t in ("a", "b", "c") if (m, t) != ("clm", "c")]
        for m in ("target", "clm", "fused")
    }
    found = only(*compare(records, FEW))
    assert found.not_run == (NotRun("commonsense", "c", "no record", "clm"),)
    assert set(found.tasks[2].scores) == {"target", "fused"}
    assert [one.name for one in found.tasks[2].differences] == ["fused-target"]
    assert found.mean is not None
    assert found.mean.n == 20
    assert dict(found.mean.scores) == {"target": 50, "clm": 50, "fused": 50}
    assert found.notes == ("the mean is over 2 of 3 tasks: c was not run for clm",)
    shown = table(found)
    assert shown.rows[2][shown.columns.index("CLM baseline")] == "–"
    assert shown.rows[2][shown.columns.index("fused − CLM")] == "–"
    assert "Not run: c (clm: no record)." in footer(found)


def test_what_is_known_not_to_run_is_told_with_its_reason() -> None:
    known = [
        NotRun("multiple", "go", "its self-test fails"),
        NotRun("multiple", "r", "out of memory", "clm"),
        NotRun("elsewhere", "x", "no data"),
    ]
    records = {
        "fused": [make("fused", [1], "r", "multiple"), make("fused", [], "py", "multiple")],
        "clm": [],
    }
    first, second = compare(records, FEW, known)
    assert first.not_run == (
        *known[:2],
        NotRun("multiple", "py", "no answers", "fused"),
        NotRun("multiple", "py", "no record", "clm"),
    )
    assert first.models == ("fused",)
    assert (second.suite, second.models, second.tasks, second.mean) == ("elsewhere", (), (), None)
    assert "Not run: x (no data)." in footer(second)
    assert verdict(second) == "Nothing of elsewhere was run."


def test_scores_of_their_own_scale_are_in_no_mean() -> None:
    records = {
        m: [
            make(m, [0.5, 0.25], "f1", kind="value"),
            make(m, [-3.5, 1], "nats", kind="value"),
            make(m, [1, 0], "acc"),
        ]
        for m in ("clm", "fused")
    }
    found = only(*compare(records, FEW))
    assert [(line.unit, line.scores["fused"]) for line in found.tasks] == [
        ("%", 37.5),
        ("score", -1.25),
        ("%", 50),
    ]
    assert found.mean is not None
    assert found.mean.scores["fused"] == 43.75
    assert found.notes == ("the mean is over 2 of 3 tasks: nats is not on a scale of 0 to 100",)
    assert found.tasks[1].scores["fused"] == -1.25
    assert "nats" not in differences_chart(found)


def test_prompts_that_differ_are_counted() -> None:
    record = make("clm", [1, 0])
    first, second = record.answers
    other = replace(record, answers=(first, replace(second, prompt="another")))
    found = only(*compare({"fused": [make("fused", [1, 0])], "clm": [other]}, FEW))
    assert found.notes == ("arc: 1 prompts were not the same for all models",)


@pytest.mark.parametrize("records", [{}, {"fused": []}, {"fused": [], "clm": []}])
def test_nothing_gives_nothing(records: dict[str, list[TaskRecord]]) -> None:
    found = compare(records)
    assert found == []
    assert markdown(found) == ""
    assert csv_text(found) == ",".join(CSV_COLUMNS) + "\n"
    assert as_json(found) == {"suites": []}


def test_one_model_alone_has_a_table_and_no_differences() -> None:
    found = only(*compare({"fused": [make("fused", [1, 0]), make("fused", [1, 1], "b")]}, FEW))
    assert table(found).columns == ["commonsense, %", "fused", "documents"]
    assert [row[1] for row in table(found).rows] == ["50.00", "100.00", "75.00"]
    assert verdict(found) == "On the mean over commonsense, there are no two models to compare."
    assert differences_chart(found) == ""


# How it is written


def example(names: tuple[str, str] = ("clm", "fused"), suite: str = "commonsense") -> Comparison:
    better, worse = [1] * 30 + [0] * 10, [1] * 12 + [0] * 28
    records = {
        name: [make(name, of, "arc", suite), make(name, [1, 0] * 20, "boolq", suite)]
        for name, of in zip(names, (worse, better), strict=True)
    }
    return only(*compare(records, replace(FEW, pairs=[names[::-1]])))


def test_the_table() -> None:
    found = example()
    shown = table(found)
    assert shown.columns == ["commonsense, %", "CLM baseline", "fused", "fused − CLM", "documents"]
    assert [row[0] for row in shown.rows] == ["arc", "boolq", "mean"]
    assert shown.rows[0][1:3] == ["30.00", "75.00 *"]
    assert shown.rows[1][1:3] == ["50.00", "50.00"]
    first, second = shown.rows[0][3].split("\n")
    assert first.startswith("45.00 (")
    assert first.endswith("), +150.00 %")
    assert second == "better"
    one = found.tasks[1].differences[0]
    assert one.could_show is not None
    expected = f"no difference shown (≥ {number(one.could_show, 1)} would be)"
    assert shown.rows[1][3] == f"0.00 (0.00 to 0.00), +0.00 %\n{expected}"
    assert verdict(found).startswith("On the mean over commonsense, fused − CLM is 22.50 (")
    assert verdict(found).endswith("%: better.")


def test_the_footer() -> None:
    found = example()
    lines = footer(found)
    assert lines[0] == f"Protocol {found.protocol[:12]}: shots 3."
    assert lines[1] == "80 documents in 2 tasks."
    assert lines[2] == "Documents whose prompt was cut to fit the context: clm 2, fused 2."


def cells(line: str) -> list[str]:
    """Of a row of a Markdown table, by GitHub's rule: a pipe that no backslash precedes."""
    found, cell, escaped = [], "", False
    for character in line.strip()[1:]:
        if character == "|" and not escaped:
            found.append(cell.strip())
            cell = ""
        else:
            cell += character
        escaped = character == "\\" and not escaped
    return found


@pytest.mark.parametrize(
    "name", ["a|b", "a\\|b", "<b>x</b>", "`code`", "[x](y)", "_a_", "two\nlines", "*bold*", "&lt;"]
)
def test_markdown_shows_names_as_they_are(name: str) -> None:
    text = markdown([example((name, "fused"), suite=name)])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 5
    assert {len(cells(row)) for row in rows} == {5}
    head = cells(rows[0])[1]
    assert re.sub(r"\\(.)", r"\1", head) == name.replace("\n", " ")
    for bare in ("<", "`", "*", "["):
        assert bare not in head.replace(f"\\{bare}", "")


def test_markdown_breaks_lines_inside_a_cell() -> None:
    row = next(line for line in markdown([example()]).splitlines() if line.startswith("| arc"))
    assert "+150.00 %<br>better" in cells(row)[3]


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@sum", "\tx", "a,b", 'a"b', "a\nb", "plain"])
def test_csv_is_text_to_a_spreadsheet(name: str) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text([example((name, "fused"))]))))
    assert tuple(rows[0]) == CSV_COLUMNS
    assert len(rows) == 9
    begins_a_formula = name[0] in "=+-@\t"
    assert rows[0]["model"] == ("'" + name if begins_a_formula else name)
    assert all(row[key][:1] not in tuple("=+-@\t") for row in rows for key in ("model", "task"))


def test_csv_has_all_digits_and_negative_numbers() -> None:
    found = only(*compare({"clm": [make("clm", [1, 1, 1])], "fused": [make("fused", [1, 0, 0])]}))
    rows = list(csv.DictReader(io.StringIO(csv_text([found]))))
    assert [row["model"] for row in rows] == ["clm", "fused", "fused-clm"]
    one = found.tasks[0].differences[0]
    assert float(rows[2]["value"]) == one.value == pytest.approx(-200 / 3)
    assert float(rows[2]["p"]) == one.p
    assert (rows[2]["sign"], rows[2]["n"], rows[2]["could_show"]) == ("0", "3", "")
    assert (rows[0]["p"], rows[0]["truncated"]) == ("", "1")


def test_json_holds_everything() -> None:
    found = example()
    back = json.loads(json.dumps(as_json([found], published=True), allow_nan=False))
    suite = back["suites"][0]
    assert suite["tasks"][0]["differences"][0]["sign"] == 1
    assert suite["tasks"][0]["differences"][0]["p"] == found.tasks[0].differences[0].p
    assert suite["mean"]["scores"] == {"clm": 40, "fused": 62.5}
    published = back["published"]["suites"]["commonsense"]["BoolQ"]
    assert published["FuseLLM-7B"] == 78.13
    assert "published" not in as_json([found])


def test_the_papers_figures_are_set_beside() -> None:
    text = markdown([example()], published=True)
    assert (
        "| BoolQ | 72.29 | 74.74 | 77.71 | 76.88 | 78.13 | 0.42, +0.54 % | 1.25, +1.63 % |" in text
    )
    assert "published" not in markdown([example()])
    rows = list(csv.DictReader(io.StringIO(csv_text([example()], published=True))))
    assert sum(row["metric"] == "published" for row in rows) == 25
    assert "published" not in markdown([example(suite="elsewhere")], published=True)


def test_bleu_says_whose_it_is() -> None:
    references = ["the cat sat on a mat today", "one dog ran by its own house"]
    records = {m: [translated(m, references, references)] for m in ("clm", "fused")}
    found = only(*compare(records, FEW))
    assert found.tasks[0].scores["fused"] == pytest.approx(100)
    assert found.notes[0].startswith("BLEU is that of sacrebleu ")


# The chart


def test_the_chart_says_and_draws_every_difference() -> None:
    found = example(suite="a <b> & c")
    svg = differences_chart(found)
    root = ElementTree.fromstring(svg)
    label = root.get("aria-label") or ""
    assert label.startswith("fused − CLM in points on a <b> & c: arc 45.00, 95 % interval ")
    assert "boolq 0.00, 95 % interval 0.00 to 0.00" in label
    texts = [node.text for node in root.iter() if node.tag.endswith("text")]
    for name in ("arc", "boolq", "mean", "points"):
        assert name in texts
    assert "var(--fused)" in svg
    assert "var(--muted)" in svg
    assert "#0" not in svg.replace("url(#", "").replace('href="#', "")
    assert svg == differences_chart(found)


def test_the_chart_of_another_pair() -> None:
    records = {m: [make(m, [1, 0] * 10)] for m in ("target", "clm", "fused")}
    found = only(*compare(records, FEW))
    assert "fused − CLM in points" in differences_chart(found)
    assert "fused − target in points" in differences_chart(found, ("fused", "target"))
    assert differences_chart(found, ("clm", "target")) == ""
