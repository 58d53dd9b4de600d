"""The report: what it says, that it says it safely, and the same way twice."""

import csv
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from conftest import Command
from fusellm.errors import StoreError
from fusellm.evaluation.text.intervals import Record
from fusellm.evaluation.text.results import results_table
from fusellm.evaluation.text.results import verdict as verdict_on
from fusellm.stages.report.beside import write_beside
from fusellm.stages.report.charts import Trace, line_chart
from fusellm.stages.report.write import write_report
from fusellm.store.identity import Identity
from fusellm.store.manifest import Manifest

HOSTILE = "<script>alert(1)</script>"
EXAMPLE = f"{HOSTILE}\n\tﬁne print" + ", and more" * 40
NAMES = ("prose", "python", "cpp", "law", "chat", "maths")
SHARES = {"same": 0.74, "several": 0.03, "beyond": 0.08, "crossed": 0.05, "unaligned": 0.10}
VOID = {"meta", "link", "br"}


def make_records(
    sources: int = 2, domains: int = 3, difference: float = -0.02, clm: bool = True
) -> list[dict[str, Any]]:
    tasks = [*NAMES[:domains], "mean"]
    values = {f"source-{i}": 1.8 - 0.03 * i for i in range(sources)}
    values |= {"target": 1.75, "fused": 1.55}
    if clm:
        values |= {"clm": 1.55 - difference, "fused-clm": difference}
    records = []
    for model, base in values.items():
        for t, task in enumerate(tasks):
            value = base if model == "fused-clm" else base + 0.1 * (t - domains)
            records.append(
                {
                    "model": model,
                    "task": task,
                    "metric": "bits_per_byte",
                    "value": value,
                    "low": value - 0.01,
                    "high": value + 0.01,
                    "n": 40,
                }
            )
    return records


def make_counts(sources: int, domains: int) -> dict[str, Any]:
    def source(i: int, d: int) -> dict[str, Any]:
        return {
            "situations": {name: int(share * (900 + 50 * i)) for name, share in SHARES.items()},
            "mass_kept": 0.98 - 0.01 * d,
            "mass_carried": 0.91 - 0.02 * i,
            "bits_per_byte": 1.8 - 0.03 * i,
            "blocks_left_out": 1 if i == d == 0 else 0,
            "example_left_out": f"{HOSTILE}\n\tﬁne print" + ", and more" * 40
            if i == d == 0
            else None,
        }

    return {
        "domains": {
            name: {
                "blocks": 120 + d,
                "positions": 51_234 * (d + 1),
                "without_source": 2_000 * (d + 1),
                "wins": {f"source-{i}": (i + d) % sources * 9_000 + 5_000 for i in range(sources)},
                "sources": {f"source-{i}": source(i, d) for i in range(sources)},
            }
            for d, name in enumerate(NAMES[:domains])
        }
    }


def make_log(path: Path, domains: int, fused: bool, steps: int = 200) -> None:
    lines = []
    for step in range(0, steps + 1, 5):
        clm_loss = 2.4 - 0.5 * step / (step + 60) + 0.04 * ((step * 7) % 5 - 2) / 2
        if step:
            lines.append(
                {
                    "step": step,
                    "steps": steps,
                    "tokens": step * 5_120,
                    "loss": clm_loss,
                    "clm_loss": clm_loss - (0.02 if fused else 0),
                    "fusion_loss": clm_loss * 0.8 if fused else None,
                    "lambda": 0.5,
                    "fused_share": 0.8,
                    "learning_rate": 0.001,
                    "tokens_per_second": 8_000,
                }
            )
        if step % 20 == 0:
            value = 1.9 - 0.35 * step / (step + 50) - (0.0002 * step if fused else 0)
            scores = {name: value + 0.1 * d for d, name in enumerate(NAMES[:domains])}
            scores["mean"] = sum(scores.values()) / domains
            lines.append({"step": step, "tokens": step * 5_120, "validation": scores})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_manifest(folder: Path, seconds: float = 0.0, **software: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(Identity(folder.name, {}, {}), software, seconds=seconds)
    (folder / "manifest.json").write_bytes(manifest.to_bytes())


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def make_run(
    run: Path, sources: int = 2, domains: int = 3, difference: float = -0.02, clm: bool = True
) -> Path:
    """A run's folder as the stages would leave it."""
    records = make_records(sources, domains, difference, clm)
    notes = {"blocks_left_out": 0, "bytes": dict.fromkeys(NAMES[:domains], 123456)}
    write_json(run / "evaluate/results.json", {"records": records, "notes": notes})
    write_json(run / "fuse/counts.json", make_counts(sources, domains))
    for kind in ("fused", "clm") if clm else ("fused",):
        make_log(run / f"train/{kind}/log.jsonl", domains, kind == "fused")
        write_manifest(run / "train" / kind, 912.4)
    write_manifest(run / "corpus", 3.2, tokenizers="0.22.1")
    for i in range(sources):
        folder = run / f"externalize/source-{i}"
        write_manifest(folder, 61.5 + i, torch="2.13.0", transformers="5.17.0")
    write_manifest(run / "fuse", 20.1, numpy="2.3.1")
    write_manifest(run / "evaluate", torch="2.13.1")
    (run / "recipe.yaml").write_text(
        f"name: first-look\nseed: 0\nnote: {HOSTILE}\nfusion:\n  lambda: 0.5\n", encoding="utf-8"
    )
    return run


def verdict(records: list[dict[str, Any]]) -> str:
    return verdict_on(Record(**record) for record in records)


class Page(HTMLParser):
    """What a browser would see: elements, ids, text, and whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def headings(self) -> list[str]:
        return [values["id"] or "" for tag, values in self.elements if tag == "h2"]


def read_page(run: Path) -> tuple[str, Page]:
    html = (run / "report/index.html").read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs") / "first")
    write_report(run)
    return run


def test_results_are_the_records(run: Path) -> None:
    records = json.loads((run / "report/results.json").read_text(encoding="utf-8"))
    assert records == make_records()
    with (run / "report/results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["model", "task", "metric", "value", "low", "high", "n"]
    for row, record in zip(rows, records, strict=True):
        assert {key: str(value) for key, value in record.items()} == row
    assert sorted(path.name for path in (run / "report").iterdir()) == [
        "index.html",
        "results.csv",
        "results.json",
    ]


def test_table() -> None:
    table = results_table(Record(**record) for record in make_records())
    assert table.columns == ["bits per byte", "mean", "prose", "python", "cpp"]
    assert [row[0] for row in table.rows] == [
        "source-0",
        "source-1",
        "target before training",
        "CLM baseline",
        "fused",
        "fused − CLM",
    ]
    assert table.rows[4][1] == "1.550 (1.540–1.560) *"
    assert table.rows[5][1] == "−0.0200 (−0.0300 to −0.0100) better"
    assert sum(cell.endswith("*") for row in table.rows for cell in row) == 4


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        (-0.02, ", and is better than the CLM baseline (fused − CLM: −0.0200,"),
        (0.005, ", but no difference from the CLM baseline is shown (fused − CLM: 0.0050,"),
        (0.02, ", but is worse than the CLM baseline (fused − CLM: 0.0200,"),
    ],
)
def test_verdict_against_clm(difference: float, expected: str) -> None:
    sentence = verdict(make_records(difference=difference))
    assert sentence.startswith("On the mean over the domains, the fused model is better than every")
    assert expected in sentence
    assert sentence.endswith(").")


def test_verdict_against_sources() -> None:
    records = make_records(difference=-0.02)
    assert "(1.550 bits per byte; source-1, the best of them, has 1.770)" in verdict(records)
    for record in records:
        if record["model"] == "source-0":
            record["value"] = 1.55  # as good is not better
    sentence = verdict(records)
    assert "is not better than every source (1.550 bits per byte; source-0" in sentence
    assert ", but is better than the CLM baseline" in sentence
    for record in records:
        if record["model"] == "target":
            record["value"] = 1.4
    assert ", nor better than the target before training (1.400)" in verdict(records)


def test_verdict_says_what_is_missing() -> None:
    assert verdict(make_records(clm=False)).endswith("has not been compared with a CLM baseline.")
    assert "no result of a fused model" in verdict(
        [record for record in make_records() if record["model"] != "fused"]
    )
    alone = [record for record in make_records(domains=1) if record["task"] != "mean"]
    assert verdict(alone).startswith("On prose, the fused model is better")
    several = [record for record in make_records() if record["task"] != "mean"]
    assert "no mean" in verdict(several)


def test_page_is_whole_and_escaped(run: Path) -> None:
    html, page = read_page(run)
    assert page.open == []
    assert "<script" not in html
    assert page.words.count(HOSTILE) == 2  # the example (cut short) and the recipe
    assert verdict(make_records()) in page.words.replace("\u00a0", " ")
    assert "2.13.0, 2.13.1" in page.words
    assert "bytes, prose" in page.words
    assert "15 min 12 s" in page.words
    assert page.headings() == [
        "results",
        "training",
        "wins",
        "alignment",
        "mass",
        "time",
        "recipe",
        "software",
    ]


def test_page_stands_alone(run: Path) -> None:
    html, page = read_page(run)
    for _, values in page.elements:
        for name, value in values.items():
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                assert (value or "").startswith(("#", "data:,"))
    for url in re.findall(r"url\(([^)]*)\)", html):
        assert url.startswith("#")
    assert "@import" not in html
    namespaces = r"http://www\.w3\.org/(?:2000/svg|1999/xlink)"
    assert "://" not in re.sub(rf'xmlns(?::xlink)?="{namespaces}"', "", html)


def test_charts_share_a_page(run: Path) -> None:
    html, page = read_page(run)
    ids = [values["id"] for _, values in page.elements if "id" in values]
    assert len(ids) == len(set(ids))
    used = re.findall(r"(?:href=\"#|url\(#|labelledby=\")([^)\"]+)", html)
    assert set(used) <= set(ids)
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawings) == 1 + 2 + 3 + 1 + 2
    for drawing in drawings:
        assert not re.findall(r"(?:fill|stroke): #", drawing)
        assert "aria-label=" in drawing
    defined = set(re.findall(r"(--[\w-]+):", html))
    assert set(re.findall(r"var\((--[\w-]+)\)", html)) <= defined


def test_tables_have_scopes(run: Path) -> None:
    _, page = read_page(run)
    headers = [values for tag, values in page.elements if tag == "th"]
    assert headers
    assert all("scope" in values for values in headers)


@pytest.mark.parametrize(("sources", "domains"), [(1, 1), (5, 6)])
def test_any_number_of_sources_and_domains(tmp_path: Path, sources: int, domains: int) -> None:
    run = make_run(tmp_path / "run", sources, domains)
    write_report(run)
    html, page = read_page(run)
    assert page.open == []
    assert html.count("<svg") == 3 + (domains if domains > 1 else 0) + 1 + sources


def _several(folder: Path, count: int) -> list[Path]:
    runs = [make_run(folder / f"run-{n}", difference=-0.02 * n) for n in range(count)]
    recipe = (runs[0] / "recipe.yaml").read_text()
    (runs[1] / "recipe.yaml").write_text(recipe.replace("lambda: 0.5", f"lambda: '{HOSTILE}'"))
    return runs


@pytest.mark.parametrize("count", [2, 7])
def test_several_runs_stand_side_by_side(tmp_path: Path, count: int) -> None:
    runs = _several(tmp_path, count)
    out = tmp_path / "beside"
    write_beside(runs, out)
    html = (out / "index.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    assert "<script" not in html
    assert "://" not in re.sub(r'xmlns="http://www\.w3\.org/2000/svg"', "", html)
    assert page.headings() == ["fused", "clm", "fused-clm", "training", "differences", "time"]
    assert page.words.count(HOSTILE) == 1  # the one setting in which they differ
    assert "fusion.lambda" in page.words
    assert "fusion.seed" not in page.words
    body = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert list(body) == [run.name for run in runs]
    for number, run in enumerate(runs):
        assert body[run.name] == make_records(difference=-0.02 * number)
        for record in body[run.name]:
            if record["model"] == "fused":
                assert f"{record['value']:.3f}" in page.words
    equal = " and ".join(run.name for run in runs)
    assert f"The fused models of {equal} cost least" in page.words
    before = html
    write_beside(runs, out)
    assert (out / "index.html").read_text(encoding="utf-8") == before


def test_runs_of_other_text_are_told_apart(tmp_path: Path) -> None:
    runs = _several(tmp_path, 2)
    results = json.loads((runs[1] / "evaluate/results.json").read_text())
    results["notes"]["bytes"]["prose"] -= 100  # which another source cannot read
    write_json(runs[1] / "evaluate/results.json", results)
    write_beside(runs, tmp_path / "beside")
    page = Page((tmp_path / "beside" / "index.html").read_text(encoding="utf-8"))
    assert "Not all of them were measured on the same bytes" in page.words
    assert page.words.count("text 2") == 3


def test_what_differs_is_seen_though_it_begins_or_ends_alike(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / side / "run") for side in ("a", "b")]
    recipe = (runs[0] / "recipe.yaml").read_text()
    for side, run in zip("ab", runs, strict=True):
        text = f"target:\n  model: /models/{side}/fused\n  system: {'x' * 80}{side}\n"
        (run / "recipe.yaml").write_text(recipe + text)
    write_beside(runs, tmp_path / "beside")
    page = Page((tmp_path / "beside" / "index.html").read_text(encoding="utf-8"))
    assert "target.model" in page.words
    assert "/models/a/fused" in page.words
    assert "target.system" in page.words
    assert "a/run" in page.words  # the runs have one name
    assert str(tmp_path) not in page.words


@pytest.mark.parametrize("recipe", [b"a: &a [1, *a]\n", b"\xff\xfe", b"a: " + b"[" * 5000, b""])
def test_a_recipe_that_cannot_be_read_is_left_out(tmp_path: Path, recipe: bytes) -> None:
    runs = _several(tmp_path, 2)
    (runs[1] / "recipe.yaml").write_bytes(recipe)
    write_beside(runs, tmp_path / "beside")
    page = Page((tmp_path / "beside" / "index.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert "fusion.lambda" in page.words


def test_several_runs_need_a_folder_of_their_own(tmp_path: Path, command: Command) -> None:
    runs = _several(tmp_path, 2)
    code, _, error = command("report", *runs)
    assert code != 0
    assert "--out" in error
    code, out, _ = command("report", *runs, "--out", tmp_path / "beside")
    assert code == 0
    assert "index.html" in out
    code, out, _ = command("report", *runs, "--out", tmp_path / "beside", "--json")
    assert list(json.loads(out)) == ["run-0", "run-1"]
    before = (runs[0] / "evaluate/results.json").read_bytes()
    for inside in (runs[0], runs[0] / "evaluate", runs[0] / "report"):
        code, _, error = command("report", *runs, "--out", inside)
        assert code != 0
        assert "is a run" in error
    assert (runs[0] / "evaluate/results.json").read_bytes() == before
    code, _, error = command("report", runs[0], runs[0], "--out", tmp_path / "beside")
    assert "given twice" in error
    code, _, error = command("report", runs[0], tmp_path / "nowhere", "--out", tmp_path / "beside")
    assert code != 0
    assert "nowhere" in error


def test_same_bytes_twice(run: Path) -> None:
    before = {path.name: path.read_bytes() for path in (run / "report").iterdir()}
    write_report(run)
    assert before == {path.name: path.read_bytes() for path in (run / "report").iterdir()}


def test_optional_parts_may_be_absent(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", clm=False)
    (run / "train/fused/log.jsonl").write_text("", encoding="utf-8")
    (run / "recipe.yaml").unlink()
    for manifest in run.rglob("manifest.json"):
        manifest.unlink()
    write_report(run)
    _, page = read_page(run)
    assert page.headings() == ["results", "wins", "alignment", "mass"]
    assert "fused − CLM:" not in page.words
    assert "CLM baseline" in page.words  # the verdict says that there is none


def test_nothing_measured_yet(tmp_path: Path) -> None:
    write_json(tmp_path / "evaluate/results.json", {"records": [], "notes": {}})
    write_json(tmp_path / "fuse/counts.json", {"domains": {}})
    write_report(tmp_path)
    _, page = read_page(tmp_path)
    assert page.headings() == []
    assert tmp_path.name in page.words


@pytest.mark.parametrize(
    ("file", "stage"), [("evaluate/results.json", "evaluate"), ("fuse/counts.json", "fuse")]
)
def test_required_files(tmp_path: Path, file: str, stage: str) -> None:
    run = make_run(tmp_path / "run", 1, 1)
    (run / file).write_text('{"records": 3, "domains": {"prose": {}}}', encoding="utf-8")
    with pytest.raises(StoreError, match=rf"{file} is not what `fusellm {stage}` writes"):
        write_report(run)
    (run / file).unlink()
    with pytest.raises(StoreError, match=rf"{file}, .*`fusellm {stage} {run}` writes it"):
        write_report(run)
    assert not (run / "report").exists()


def test_log_of_a_resumed_training(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1, 1, clm=False)
    log = run / "train/fused/log.jsonl"
    lines = [
        {"step": 2, "tokens": 200, "validation": {"mean": 1.9}},
        {"step": 4, "tokens": 400, "validation": {"mean": 1.8}},
        {"step": 4, "tokens": 400, "validation": {"mean": 1.7}},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    log.write_text(text + '{"step": 5, "tok', encoding="utf-8")
    write_report(run)
    assert "fused from 1.900 to 1.700 bits per byte" in read_page(run)[0]
    log.write_text('{"step": 5, "tok\n' + text, encoding="utf-8")
    with pytest.raises(StoreError, match="line 1, is no log line"):
        write_report(run)


def test_names_are_no_mathematics_and_no_markup() -> None:
    svg = line_chart(f'$x^2$ & "{HOSTILE}', "nats", [Trace("$y$ <b>", "fused", [1], [2.0])])
    assert "$y$ &lt;b&gt; 2.000" in svg
    assert "<script" not in svg


def test_long_curves_are_thinned() -> None:
    tokens = [float(index) for index in range(20_000)]
    assert len(line_chart("loss", "nats", [Trace("fused", "fused", tokens, tokens)])) < 20_000


@pytest.mark.parametrize("width", [390, 1280, 1920])
def test_a_browser_shows_it_and_nothing_in_it_acts(
    run: Path, open_page: Callable[..., Any], width: int
) -> None:
    page = open_page((run / "report" / "index.html").as_uri(), width)
    assert page.locator("h1").text_content() == "first-look"
    assert HOSTILE in page.locator("main").text_content()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("sources", [2, 6])
def test_axe_has_nothing_serious_to_say(
    tmp_path: Path, serious_faults: Callable[..., list[Any]], scheme: str, sources: int
) -> None:
    run = make_run(tmp_path / "run", sources)
    write_report(run)
    for width in (390, 1280):
        address = (run / "report" / "index.html").as_uri()
        assert serious_faults(address, width, scheme) == []
