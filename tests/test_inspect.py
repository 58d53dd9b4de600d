"""`fusellm inspect`: the grid of boundaries, the answer against the stores, and its faults."""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pyarrow.ipc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from fusellm.cli.inspect import outcome_label
from fusellm.cli.main import main
from fusellm.explain.grid import SEPARATOR, Strip, grid, visible
from fusellm.pipeline import Pipeline
from fusellm.progress import Silent
from fusellm.recipe_file import load_recipe, resolve_paths
from fusellm.run import Run

ODD = [*"ab .│", " ", "\n", "\t", "\r", "\x1b", "é", "e\u0301", "数", "字", "한", "\u1112\u1161"]
ODD += ["👩", "👩\u200d👧", "🏻", "🇩🇪", "❤\ufe0f", "\u0915\u093f", "ב", "\x00", "\ufffd", "\u2028"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of a command, in this process."""
    monkeypatch.setattr(sys, "argv", ["fusellm", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def fused_run(world: Path, run_: Path, *changes: str) -> Path:
    """A run whose fuse stage is finished, with some settings changed."""
    recipe = resolve_paths(load_recipe(world / "recipe.yaml", changes), world)
    Pipeline(recipe, run_, Silent()).execute(["corpus", "externalize", "fuse"])
    return run_


@pytest.fixture(scope="module")
def fused(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fused_run(world, tmp_path_factory.mktemp("inspected") / "tiny")


def table(folder: Path) -> Iterator[dict[str, Any]]:
    """A stage's blocks of the part train, as plain Python values, tokens with their ends."""
    for path in sorted(folder.glob("train-*.arrow")):
        for row in pyarrow.ipc.open_file(str(path)).read_all().to_pylist():
            yield row | {"ends": list(accumulate(row.get("bytes", [])))}


# The grid


@st.composite
def readings(draw: st.DrawFn) -> tuple[str, list[Strip]]:
    text = "".join(draw(st.lists(st.sampled_from(ODD), min_size=1, max_size=30)))
    total = len(text.encode())
    strips = []
    for _ in range(draw(st.integers(1, 4))):
        ends = [*sorted(draw(st.lists(st.integers(0, total), max_size=12))), total]
        ends += [total] * draw(st.integers(0, 2))
        names = st.sampled_from(["", "<s>", "▁", "<数>"])
        strips.append(Strip(ends, {n: draw(names) for n in range(len(ends))}))
    return text, strips


@given(readings())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_every_shared_boundary_is_one_column_in_all_rows(made: tuple[str, list[Strip]]) -> None:
    text, strips = made
    data = text.encode()
    drawn = grid(text, strips)
    for strip, row in zip(strips, drawn.rows, strict=True):
        assert len(row.cells) == drawn.width
        assert cell_len("".join(row.cells)) == drawn.width
        for place, start, end in strip.tokens():
            first, last = row.first[place], row.last[place]
            assert row.cells[first - 1] == row.cells[last] == SEPARATOR
            inside = "".join(row.cells[first:last]).replace(" ", "")
            if start == end:
                assert inside == visible(strip.empty[place])
            else:
                assert inside == _spelled(data, start, end)
    for boundary, column in drawn.boundaries.items():
        for strip, row in zip(strips, drawn.rows, strict=True):
            # Of several tokens with one boundary the last is aligned, but for EOS.
            at = [n for n, end in enumerate(strip.ends) if end == boundary]
            text_ends = [n for n in at if n == 0 or strip.ends[n - 1] < boundary]
            if at:
                closing = text_ends[0] if boundary == len(data) else at[-1]
                assert row.last[closing] == column
                assert row.cells[column] == SEPARATOR


def _spelled(data: bytes, start: int, end: int) -> str:
    """What a token shows: its whole characters, and of others its bytes."""
    shown, offset = "", start
    while offset < end:
        for size in range(1, 5):
            try:
                character = data[offset : min(offset + size, end)].decode()
            except UnicodeDecodeError:
                continue
            shown, offset = shown + visible(character), offset + size
            break
        else:
            shown, offset = shown + f"\\x{data[offset]:02x}", offset + 1
    return shown


@given(readings(), st.integers(20, 60))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_lines_fit_and_leave_nothing_out(made: tuple[str, list[Strip]], width: int) -> None:
    drawn = grid(*made)
    lines = drawn.lines(width)
    assert lines[0][0] == 0
    assert lines[-1][1] == drawn.width
    for first, after in lines:
        assert 0 < after - first <= width
        for row in drawn.rows:
            assert cell_len("".join(row.cells[first:after])) == after - first
    boundaries = set(drawn.boundaries.values())
    for (_, after), (first, _) in pairwise(lines):
        assert first == after or (first == after - 1 and first in boundaries)


def test_a_grid_by_hand() -> None:
    drawn = grid("é数 b", [Strip([0, 2, 5, 7], {0: "<s>"}), Strip([1, 6, 7, 7], {3: "</s>"})])
    assert ["".join(row.cells) for row in drawn.rows] == [
        "│<s>│é        │数│· b│     ",
        "    │\\xc3│\\xa9 数 ·│b│</s>│",
    ]


def test_a_class_is_named_by_its_beginning_and_the_true_token() -> None:
    tokens = [" re", " rep", " repl", " reply", " replying"]
    assert outcome_label(tokens, 100) == "{·re ·rep ·repl ·reply ·replying}"
    assert outcome_label(tokens, 18, " reply") == "{·re ·reply … +3}"
    for room in range(1, 40):
        assert cell_len(outcome_label(["数字", "数字字", "数a"], room, "数a")) <= room


# The command


def test_json_is_what_the_stores_say(
    fused: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    number = 40  # of the second shard
    assert run(monkeypatch, "inspect", str(fused), "--block", str(number), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    corpus = list(table(fused / "corpus"))
    block = corpus[number]
    assert found["blocks"] == len(corpus)
    assert (found["document"], found["text"]) == (block["document"], block["text"])
    target = list(table(fused / "externalize" / "target"))[number]
    stored = list(table(fused / "fuse"))[number]
    assert found["target"]["ids"] == target["ids"] == stored["ids"]
    assert found["target"]["ends"] == target["ends"]
    positions = len(target["ids"]) - 1
    assert found["positions"] == positions == len(found["winners"])
    names = ["first", "second"]
    rows = {name: list(table(fused / "externalize" / name))[number] for name in names}
    for source in found["sources"]:
        ends = rows[source["name"]]["ends"]
        assert source["tokens"]["ends"] == ends
        if source["name"] == "first":
            assert source["situations"] == ["same"] * positions
            continue
        for n in range(positions):
            expected = _situation(target["ends"][n : n + 2], ends[:-1], ends)
            assert source["situations"][n] == (expected if target["ends"][n] else "unaligned")
    place = part = 0
    winners = []
    for n in range(positions):
        mine = {}
        for _ in range(stored["parts"][n]):
            length = stored["lengths"][part]
            mass = sum(stored["masses"][place : place + length]) + stored["rest"][part]
            mine[names[stored["source"][part]]] = mass
            if n == found["at"]["position"]:
                _same_share(found["at"]["fused"][len(mine) - 1], stored, place, length, fused)
            place, part = place + length, part + 1
        winners.append(max(mine, key=lambda name: mine[name]) if mine else None)
        for source in found["sources"]:
            assert source["weights"][n] == pytest.approx(mine.get(source["name"], 0.0))
    assert found["winners"] == winners
    assert place == len(stored["outcomes"])
    _same_before(found["at"], rows, target)
    view = json.loads(json.dumps(asdict(Run(fused).block(number))))
    assert {"run": str(fused), **view} == found


def _situation(mine: list[int], predicting: list[int], ends: list[int]) -> str:
    """By the words of docs/method.md."""
    if mine[0] not in predicting:
        return "unaligned"
    if mine[0] == mine[1]:
        return "same" if predicting.count(mine[0]) < ends.count(mine[0]) else "beyond"
    following = min((end for end in ends if end > mine[0]), default=mine[0])
    if following == mine[1]:
        return "same"
    if following > mine[1]:
        return "beyond"
    return "several" if mine[1] in ends else "crossed"


def _same_share(
    share: dict[str, Any], stored: dict[str, Any], place: int, length: int, run_: Path
) -> None:
    path = run_ / "fuse" / f"outcomes-{share['source']}.arrow"
    sets = pyarrow.ipc.open_file(str(path)).read_all().to_pylist()[0]
    rows = slice(place, place + length)
    expected = dict(zip(stored["outcomes"][rows], stored["masses"][rows], strict=True))
    assert {o["number"]: o["probability"] for o in share["outcomes"]} == expected
    for outcome in share["outcomes"]:
        first, after = (sets[end][outcome["number"]] for end in ("starts", "stops"))
        assert len(outcome["spelled"]) == after - first


def _same_before(at: dict[str, Any], rows: dict[str, Any], target: dict[str, Any]) -> None:
    assert at["read_bytes"] == target["ends"][at["position"]]
    seen = 0
    for before in at["before"]:
        if before is None:
            continue
        seen += 1
        row = rows[before["source"]]
        assert row["ends"][before["place"]] == at["read_bytes"]
        first = sum(row["kept"][: before["place"]])
        kept = slice(first, first + row["kept"][before["place"]])
        draws = dict(zip(row["kept_ids"][kept], row["counts"][kept], strict=True))
        shares = {entry["id"]: entry["probability"] for entry in before["kept"]}
        assert shares == pytest.approx({id_: n / sum(draws.values()) for id_, n in draws.items()})
        by_outcome: dict[int, float] = {}
        for entry in before["kept"]:
            if entry["outcome"] is not None:
                by_outcome[entry["outcome"]] = (
                    by_outcome.get(entry["outcome"], 0) + shares[entry["id"]]
                )
        becomes = {outcome["number"]: outcome["probability"] for outcome in before["becomes"]}
        split = {n for n in by_outcome if n not in becomes} | {before["true_outcome"]}
        for outcome in by_outcome.keys() - split:  # the class of the text is split
            assert becomes[outcome] >= by_outcome[outcome] - 1e-9
        assert sum(becomes.values()) + before["nowhere"] + before["tail"] == pytest.approx(1)
        for outcome in before["becomes"]:
            if not outcome["leftover"]:
                assert outcome["true"] == (at["next_spelled"] in outcome["spelled"])
    assert seen


def shown(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    width: int,
    *arguments: str,
) -> str:
    """The screen, every line of which fits."""
    monkeypatch.setenv("COLUMNS", str(width))
    assert run(monkeypatch, "inspect", *arguments) == 0
    out = capsys.readouterr().out
    assert max(cell_len(line) for line in out.splitlines()) <= width
    assert "\x1b" not in out
    return out


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_the_screen_fits_and_shows_the_whole_text(
    fused: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    for number in (0, 40):
        text = list(table(fused / "corpus"))[number]["text"]
        out = shown(monkeypatch, capsys, width, str(fused), "--block", str(number))
        lines = [line.split(maxsplit=1)[1] for line in out.splitlines() if line[:7] == "target "]
        lines = [line for line in lines if line[0] in "│┊"]
        drawn = "".join(lines).replace("│", "").replace(" ", "").replace("┊", "")
        assert drawn.removeprefix("<s>").removesuffix("</s>") == visible(text)
        for word in ("position", "wins", "a first", "b second", "becomes", "fused", "▼"):
            assert word in out


def test_every_position_of_a_block_can_be_looked_at(
    fused: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "inspect", str(fused), "--block", "1", "--json") == 0
    positions = json.loads(capsys.readouterr().out)["positions"]
    split = 0
    for position in {0, *range(1, positions, 3), positions - 1}:
        where = [str(fused), "--block", "1", "--position", str(position)]
        out = shown(monkeypatch, capsys, 100, *where)
        assert f"▼{position}" in out or f"{position}▼" in out
        assert f"Position {position} of {positions}" in out
        assert run(monkeypatch, "inspect", *where, "--json") == 0
        for before in json.loads(capsys.readouterr().out)["at"]["before"]:
            whole = {outcome["number"] for outcome in (before or {}).get("becomes", [])}
            kept = (before or {}).get("kept", [])
            if any(entry["outcome"] not in {None, *whole} for entry in kept):
                assert "÷ split along the text" in out  # its tokens go to several outcomes
                split += 1
    assert split > 0


@pytest.mark.parametrize(
    "changes",
    [
        ("externalize.scheme=top", "externalize.k=5", "fusion.function=avgce"),
        ("fusion.strategy=em", "fusion.compatibility=paper"),
        (
            "fusion.strategy=mined",
            "fusion.granularity=block",
            "fusion.cross_entropy=nats_per_token",
        ),
    ],
)
def test_other_settings_are_shown(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: tuple[str, ...],
) -> None:
    run_ = fused_run(world, tmp_path / "run", *changes)
    for number in ("0", "41"):
        out = shown(monkeypatch, capsys, 80, str(run_), "--block", number)
        assert ("share a" in out) == ("avgce" in "".join(changes))
        assert ("not kept" in out) == ("top" in "".join(changes))


def test_a_block_that_a_model_could_not_read_says_so(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "lower"
    shutil.copytree(world / "neox", folder)
    path = folder / "tokenizer.json"
    layout = json.loads(path.read_text())
    layout["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(layout))
    lines = [{"text": f"Upper {n} case 数字\n" if n % 2 else f"lower {n}\n"} for n in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    documents = f'corpus.documents=[{{"files": "{tmp_path}/texts.jsonl"}}]'
    source = fused_run(world, tmp_path / "source", documents, f"sources.1.model={folder}")
    number = str(next(n for n, b in enumerate(table(source / "corpus")) if "Upper" in b["text"]))
    out = shown(monkeypatch, capsys, 80, str(source), "--block", number)
    assert "b second could not read this" in out
    assert "left out" in out
    target = fused_run(world, tmp_path / "target", documents, f"target.model={folder}")
    number = str(next(n for n, b in enumerate(table(target / "corpus")) if "Upper" in b["text"]))
    out = shown(monkeypatch, capsys, 80, str(target), "--block", number)
    assert "the target could not read this" in out
    assert "No position" in out
    assert run(monkeypatch, "inspect", str(target), "--block", number, "--position", "0") == 1
    assert f"block {number} has 0" in capsys.readouterr().err
    assert run(monkeypatch, "inspect", str(target), "--block", number, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["target"]["read"], found["positions"], found["at"]) == (False, 0, None)


def test_faults_are_one_line(
    world: Path,
    fused: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    early = tmp_path / "early"
    shutil.copytree(fused, early)
    shutil.rmtree(early / "fuse")
    other = tmp_path / "other"
    shutil.copytree(fused, other)
    recipe = other / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(world / "neox"), str(world / "mpt")))
    blocks = len(list(table(fused / "corpus")))
    block = ("--block", "0")
    cases = {
        (str(tmp_path / "none"), *block): "is not a run: it is no folder",
        (str(tmp_path), *block): "is not a run: it has no recipe.yaml",
        (str(early), *block): f"first: fusellm fuse {early}",
        (str(other), *block): "the tokenizer of 'second' is not the one",
        (str(fused), "--block", str(blocks)): f"has {blocks}, from 0 to {blocks - 1}",
        (str(fused), "--block", "-1"): "there is no block -1",
        (str(fused), *block, "--position", "9999"): "there is no position 9999: block 0 has",
    }
    for arguments, message in cases.items():
        assert run(monkeypatch, "inspect", *arguments) == 1, arguments
        errors = capsys.readouterr().err
        assert message in errors
        assert errors.count("\n") == 1, errors


def test_help_teaches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "inspect", "--help") == 0
    assert "fusellm inspect runs/demo --block 40" in " ".join(capsys.readouterr().out.split())
