"""`fusellm view`: the numbers are those of the stores, and nothing of a run can act."""

import json
import re
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
import yaml

from conftest import Command, code, prose
from fusellm.errors import StoreError
from fusellm.explain.documents import wins_of_documents
from fusellm.explain.grid import visible
from fusellm.fusion.cross_entropy import NATS_PER_BIT
from fusellm.models.heads import head_of, hidden_states
from fusellm.models.pretrained import load_pretrained
from fusellm.objective.chunked import objective
from fusellm.objective.outcomes import Outcomes
from fusellm.progress import Silent
from fusellm.run import Run
from fusellm.view.export import MARK, export
from fusellm.view.jobs import Job
from fusellm.view.opened import OpenedRun
from fusellm.view.server import Explorer

HOSTILE = "<script>window.acted=1</script>"
NAME = "<img src=x onerror=window.acted=3>"
TEXT = (
    f'{HOSTILE}</script><img src=x onerror="window.acted=2"><!-- \u202e\u2028 "\'& '
    "javascript:alert(1) {{ 7 * 7 }} </textarea> 数 é 👩\u200d👧 \x1b[31m end. "
)


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained run whose text and names of documents are hostile."""
    folder = tmp_path_factory.mktemp("viewed")
    (folder / "text").mkdir()
    for n in range(40):
        text = prose(n) + TEXT + code(n)
        (folder / "text" / f"{NAME}{n:02}.txt").write_text(text, encoding="utf-8")
    raw = yaml.safe_load((world / "recipe.yaml").read_text(encoding="utf-8"))
    raw["target"]["model"] = str(world / raw["target"]["model"])
    for source in raw["sources"]:
        source["model"] = str(world / source["model"])
    raw["corpus"]["documents"] = [
        {"files": str(folder / "text" / "*.txt"), "domain": "prose"},
        {"files": str(world / "code" / "*.py"), "domain": "code"},
    ]
    raw["training"] |= {"max_steps": 4, "learning_rate": 5e-3}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fusellm.training.rehearsal.rehearse", lambda *_: None)
        run = Run(folder / "recipe.yaml", folder / "run")
        run.execute("corpus", "externalize", "fuse", "train")
    return run


@pytest.fixture(scope="module")
def opened(finished: Run) -> OpenedRun:
    return OpenedRun(finished.recipe, finished.folder)


@pytest.fixture(scope="module")
def site(opened: OpenedRun) -> Iterator[str]:
    """The address of a served run."""
    with Explorer(opened) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.address
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def exported(opened: OpenedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "pages"
    export(opened, folder, [0, 2, 5], Silent())
    return folder


def get(address: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    """(status, text, headers) of what is answered."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as answer:
            return answer.status, answer.read().decode(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), dict(error.headers)


def told(address: str) -> dict[str, Any]:
    """JSON, once the job behind it is done."""
    while True:
        answer: dict[str, Any] = json.loads(get(address)[1])
        if answer.get("done", True):
            return answer


def page(address: str) -> str:
    """A page, once what it waits for is ready."""
    while "data-waits" in (text := get(address)[1]):
        pass
    return text


def data_of(text: str, name: str) -> Any:
    """JSON that stands in a page."""
    found_in = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.S)
    assert found_in is not None
    return json.loads(found_in[1])


# The numbers


def test_a_position_has_the_numbers_of_the_stores(finished: Run, site: str) -> None:
    block = finished.block(3)
    shown = data_of(page(f"{site}block-3.html"), "block-data")
    names = [source.name for source in block.sources]
    assert [None if w is None else names[w] for w in shown["winners"]] == [*block.winners]
    assert shown["spelled"] == [visible(token) for token in block.target.spelled]
    for position in range(0, block.positions, 7):
        at = finished.block(3, position).at
        assert at is not None
        said = told(f"{site}position.json?block=3&position={position}")
        assert said["next"] == visible(block.target.spelled[position + 1])
        for before, own in zip(at.before, said["before"], strict=True):
            if before is None:
                assert own == {"silence": own["silence"]}
                continue
            kept = [(visible(one.spelled), round(one.probability, 6)) for one in before.kept[:16]]
            assert [(one["token"], one["probability"]) for one in own["kept"]] == kept
            became = [
                (round(one.probability, 6), one.true)
                for n, one in enumerate(before.becomes)
                if n < 12 or one.true
            ]
            assert [(one["probability"], one["true"]) for one in own["outcomes"]] == became
        for share, own in zip(at.fused, said["fused"], strict=True):
            masses = [
                round(one.probability, 6)
                for n, one in enumerate(share.outcomes)
                if n < 12 or one.true
            ]
            assert [one["probability"] for one in own["outcomes"]] == masses
            whole = sum(masses) + own["mass_of_more"] + own["rest"]
            assert whole == pytest.approx(own["weight"], abs=2e-5)


@pytest.mark.parametrize("number", [0, 4])
def test_models_say_what_their_softmax_says(finished: Run, opened: OpenedRun, number: int) -> None:
    """Against transformers' own logits, and the divergence against the objective's own sum."""
    said = {one["name"]: one for one in opened.predictions(number).wait() or []}
    assert [*said] == ["target", "clm", "fused"]
    inspector = opened.inspector.wait()
    assert inspector is not None
    ids, first = inspector.read_by_target(number)
    fused, sets = inspector.fused(number)
    assert first == 0
    for name, own in said.items():
        if name == "target":
            model, _ = load_pretrained(finished.recipe.target.model)
        else:
            model, _ = finished.model(name)
        inputs = torch.from_numpy(ids.astype(np.int64))[None]
        with torch.no_grad():
            probabilities = model(input_ids=inputs).logits[0, :-1].softmax(-1)
        true = probabilities.gather(1, inputs[0, 1:, None])[:, 0]
        assert own["true"] == pytest.approx(true.tolist(), abs=2e-6)
        assert [*own["rank"]] == (1 + (probabilities > true[:, None]).sum(1)).tolist()
        best = [tokens[0][1] for tokens in own["best"]]
        assert best == pytest.approx(probabilities.max(1).values.tolist(), abs=2e-6)
        with torch.no_grad():
            hidden = hidden_states(model, input_ids=inputs)[0, :-1]
            sums = objective(hidden, head_of(model), inputs[0, 1:], outcomes_of(fused, sets), 0.0)
        bits = sum(one for one in own["divergence"] if one is not None)
        entropy = entropy_of(fused)
        assert bits == pytest.approx((float(sums.fusion) - entropy) / NATS_PER_BIT, rel=1e-3)
        assert [one is None for one in own["divergence"]] == (fused.parts == 0).tolist()


def outcomes_of(fused: Any, sets: Any) -> Outcomes:
    """Fused distributions as the objective takes them."""
    source = fused.source[fused.part_of_outcome]
    members = [sets[s][int(o)] for s, o in zip(source, fused.outcomes, strict=True)]
    owner = np.repeat(np.arange(len(members)), [len(ids) for ids in members])
    as_tensor = torch.from_numpy
    return Outcomes(
        as_tensor(fused.parts > 0),
        as_tensor(fused.position_of_part),
        as_tensor(fused.rest),
        as_tensor(fused.part_of_outcome),
        as_tensor(fused.masses),
        as_tensor(owner),
        as_tensor(np.concatenate(members).astype(np.int64)),
    )


def entropy_of(fused: Any) -> float:
    """Nats, summed over positions; parts are weighted, and apart."""
    part = fused.part_of_outcome
    weight = np.bincount(part, fused.masses, len(fused.lengths)) + fused.rest
    terms = [(fused.masses, weight[part]), (fused.rest, weight)]
    return -sum(float(np.sum(m * np.log(np.where(m > 0, m / w, 1)))) for m, w in terms)


def test_wins_by_document_are_those_that_fusion_counted(finished: Run) -> None:
    documents = wins_of_documents(finished.recipe, finished.folder, Silent())
    counts = json.loads((finished.folder / "fuse" / "counts.json").read_text(encoding="utf-8"))
    blocks = 0
    for domain, own in counts["domains"].items():
        of_domain = [one for one in documents if one.domain == domain]
        assert sum(one.positions for one in of_domain) == own["positions"]
        for s, name in enumerate(own["wins"]):
            won = sum(one.wins[s] for one in of_domain)
            assert won == pytest.approx(own["wins"][name], rel=1e-6)
    for one in documents:
        assert one.first == blocks
        blocks += one.blocks
    assert blocks == OpenedRun(finished.recipe, finished.folder).blocks


def test_search_finds_text_and_names_and_leads_to_blocks(site: str, finished: Run) -> None:
    text = finished.block(3).text
    wanted = text[20:40].upper()
    answered = page(f"{site}index.html?find={quote(wanted)}")
    assert 'href="block-3.html"' in answered
    assert "nothing was found" in page(f"{site}index.html?find=never-said-anywhere")
    assert "the first 50 blocks" in page(f"{site}index.html?find=window.acted")
    status, _, _ = get(f"{site}go.html?block=3")
    assert status == 200  # and the browser is at block 3
    assert get(f"{site}go.html?block=x")[0] == 404
    assert "there is no block 99999" in get(f"{site}block-99999.html")[1]


def test_two_tokenizers_are_compared_on_the_text_of_the_run(site: str) -> None:
    same = page(f"{site}tokenizer-1.html")
    assert "cut every text alike" in same
    assert "has read the same text" in page(f"{site}tokenizer-2.html")


# Who may ask


def test_only_who_has_the_address_is_answered(site: str) -> None:
    token = site.rstrip("/").rsplit("/", 1)[1]
    assert len(token) >= 32
    for other in (site.replace(token, ""), site.replace(token, token[:-1] + "?"), site[:-5]):
        assert get(other)[0] == 403
    assert get(site, Host="evil.example")[0] == 421
    port = site.split(":")[2].split("/")[0]
    assert get(site, Host=f"localhost:{port}")[0] == 200
    assert get(f"{site}../../../etc/passwd")[0] in (403, 404)
    assert get(f"{site}view.py")[0] == 404
    assert get(site.rstrip("/"))[0] == 200  # and the browser is where links lead on from
    assert get(f"{site}no-page.html")[0] == 404


def test_pages_may_run_nothing_and_ask_nobody(site: str) -> None:
    for name in ("index.html", "block-0.html", "tokenizer-1.html"):
        text, headers = page(site + name), get(site + name)[2]
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store"
        assert HOSTILE not in text
        assert "<img" not in text
        scripts = re.findall(r"<script[^>]*>", text)
        assert scripts[-1] == '<script src="view.js">'
        assert all('type="application/json"' in one for one in scripts[:-1])
        assert not re.search(r'(?:src|href|action)="(?!view\.|data:,|#|[\w-]+\.html)', text)


def test_the_script_never_takes_text_for_html() -> None:
    import fusellm.view

    script = (Path(fusellm.view.__file__).parent / "pages" / "view.js").read_text(encoding="utf-8")
    for way in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function("):
        assert way not in script


# Files


def test_an_export_has_all_in_it_and_links_to_nothing_else(
    exported: Path, opened: OpenedRun
) -> None:
    names = {path.name for path in exported.iterdir()}
    assert {"index.html", "block-0.html", "block-5.html", "tokenizer-2.html", "view.js"} <= names
    for path in exported.glob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert HOSTILE not in text
        assert "<img" not in text
        for link in re.findall(r'(?:src|href)="([^"#]+)"', text):
            assert link in names | {"data:,"}
    text = (exported / "block-2.html").read_text(encoding="utf-8")
    positions = data_of(text, "positions-data")
    assert positions == [opened.position(2, n) for n in range(len(positions))]
    assert len(positions) == data_of(text, "block-data")["positions"]
    assert [one["name"] for one in data_of(text, "predictions-data")] == ["target", "clm", "fused"]


def test_an_export_replaces_only_an_export(opened: OpenedRun, tmp_path: Path) -> None:
    precious = tmp_path / "mine"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years", encoding="utf-8")
    with pytest.raises(StoreError, match="no earlier export"):
        export(opened, precious, [0], Silent())
    assert (precious / "thesis.tex").read_text(encoding="utf-8") == "years"
    pages = tmp_path / "pages"
    export(opened, pages, [0, 1], Silent())
    with pytest.raises(StoreError, match="no block 99999"):
        export(opened, pages, [99999], Silent())
    assert (pages / "block-1.html").exists()
    export(opened, pages, [0], Silent())
    assert (pages / MARK).exists()
    assert not (pages / "block-1.html").exists()
    (tmp_path / "link").symlink_to(pages)
    with pytest.raises(StoreError, match="is a link"):
        export(opened, tmp_path / "link", [0], Silent())
    assert (pages / "block-0.html").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# The command


def test_the_command_says_what_it_cannot_do(
    command: Command, finished: Run, world: Path, tmp_path: Path
) -> None:
    def fault(*arguments: object) -> str:
        status, _, said = command("view", *arguments)
        assert status != 0
        return said

    assert "it is no folder" in fault(tmp_path / "nothing")
    assert "--export FOLDER" in fault(finished.folder, "--blocks", "0-3")
    assert "no block and no range" in fault(
        finished.folder, "--export", tmp_path / "e", "--blocks", "3-1"
    )
    assert "there is no block 4000" in fault(finished.folder, "--block", 4000)
    large = "--export", tmp_path / "e", "--blocks", "0-999999999999"
    assert "there is no block 999999999999" in fault(finished.folder, *large)
    assert "of the server" in fault(finished.folder, "--export", tmp_path / "e", "--block", 1)
    unfused = tmp_path / "unfused"
    shutil.copytree(finished.folder, unfused)
    shutil.rmtree(unfused / "fuse")
    assert "fusellm fuse" in fault(unfused)


def test_the_command_exports(command: Command, finished: Run, tmp_path: Path) -> None:
    where = tmp_path / "pages"
    options = "--export", where, "--blocks", "0,2-3", "--no-predictions"
    status, said, _ = command("view", finished.folder, *options)
    assert status == 0
    assert str(where / "index.html") in said.replace("\n", "")
    assert {path.name for path in where.glob("block-*.html")} == {
        f"block-{n}.html" for n in (0, 2, 3)
    }
    assert "--no-predictions" in (where / "block-0.html").read_text(encoding="utf-8")


def test_a_job_says_how_far_it_is_and_what_went_wrong() -> None:
    go_on, attempts = threading.Event(), list[int]()

    def work(progress: Silent) -> int:
        attempts.append(1)
        with progress.start("digging", 4, "holes") as bar:
            bar.advance(1)
            go_on.wait(10)
        raise StoreError("a stone")

    job = Job("beginning", work)
    assert job.wait(0.2) is None
    assert job.told == {"done": False, "what": "digging", "share": 0.25, "error": None}
    go_on.set()
    with pytest.raises(StoreError, match="a stone"):
        job.wait()
    assert job.told["error"] == "a stone"
    with pytest.raises(StoreError, match="a stone"):  # tried again
        job.wait()
    assert attempts == [1, 1]


# In a browser

Open = Callable[..., Any]


def is_at(page: Any, position: int) -> None:
    """Wait until a page shows a position; without evaluating text, which its rules forbid."""
    page.wait_for_url(re.compile(rf"#position-{position}$"))


@pytest.mark.parametrize("kind", ["served", "exported"])
def test_a_click_shows_the_numbers_of_the_stores(
    open_page: Open, site: str, exported: Path, finished: Run, kind: str
) -> None:
    root = site if kind == "served" else f"{exported.as_uri()}/"
    one = open_page(f"{root}block-2.html")
    block = finished.block(2)
    aligned = block.sources[1].positions
    position = next(n for n, place in enumerate(aligned) if n > 3 and place >= 0)
    one.locator(f"#strips button[data-position='{position}']").click()
    is_at(one, position)
    one.wait_for_function(
        f"document.querySelector('#position').textContent.startsWith('Position {position}:')"
    )
    at = finished.block(2, position).at
    assert at is not None
    assert at.before[1] is not None
    kept = at.before[1].kept[0]
    card = one.locator(".card").nth(1)
    cells = card.locator("table").first.locator("tbody tr").first.locator("td")
    assert cells.nth(0).text_content() == visible(kept.spelled)
    assert cells.nth(1).text_content().strip() == f"{kept.probability:.3f}".removeprefix("0")
    shares = one.locator(".card").nth(2).locator("tbody tr")
    outcome = at.fused[0].outcomes[0]
    assert f"{outcome.probability:.3f}".removeprefix("0") in shares.first.text_content()
    rows = one.locator("#models tbody tr")
    rows.first.wait_for()
    assert [rows.nth(n).locator("td").first.text_content() for n in range(3)] == [
        "target before",
        "CLM",
        "fused",
    ]


def test_positions_are_marked_and_gone_through_by_keys(
    open_page: Open, site: str, finished: Run
) -> None:
    one = open_page(f"{site}block-2.html")
    one.locator("#models tbody tr").first.wait_for()
    winners = finished.block(2).winners
    won = [n for n, winner in enumerate(winners) if winner == "first"]
    one.select_option("#by-winner", label="first")
    assert one.locator("#matches").text_content() == f"{len(won)} of {len(winners)} positions"
    one.goto(f"{site}block-2.html#position-{won[0]}")
    one.locator("h1").click()
    one.select_option("#by-winner", label="first")
    one.locator("h1").click()
    one.keyboard.press("n")
    is_at(one, won[1])
    one.keyboard.press("p")
    is_at(one, won[0])
    one.locator("#strips button[tabindex='0']").focus()
    one.keyboard.press("ArrowRight")
    is_at(one, won[0] + 1)
    assert one.evaluate("document.activeElement.dataset.position") == str(won[0] + 1)
    one.keyboard.press("End")
    is_at(one, len(winners) - 1)
    assert one.locator("#strips button[tabindex='0']").count() == 1
    one.select_option("#by-winner", "")
    one.fill("#by-divergence", "1000")
    assert one.locator("#matches").text_content() == f"0 of {len(winners)} positions"
    one.locator("#all summary").click()
    assert one.locator("#positions-table tbody tr").count() in (0, len(winners))


@pytest.mark.parametrize("width", [390, 1280, 1920])
def test_every_token_is_drawn_whatever_the_width(
    open_page: Open, site: str, finished: Run, width: int
) -> None:
    number = next(n for n in range(40) if "window.acted=2" in finished.block(n).text)
    one, block = open_page(f"{site}block-{number}.html", width), finished.block(number)
    drawn = one.locator("#strips button.token").evaluate_all(
        "all => all.map((one) => Number(one.dataset.position))"
    )
    assert drawn == [*range(block.positions)]
    assert one.evaluate("document.documentElement.scrollWidth") <= width
    text = one.locator("#strips .row.target").evaluate_all(
        "rows => rows.map((row) => row.textContent).join('')"
    )
    assert '<script>window.acted=1</script></script><img·src=x·onerror="' in text.replace(" ", "")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["index.html", "block-0.html", "tokenizer-2.html"])
def test_axe_has_nothing_serious_to_say(
    serious_faults: Callable[..., list[Any]], site: str, name: str, scheme: str
) -> None:
    awaited = "#models tbody tr" if name.startswith("block") else None
    for width in (390, 1280):
        assert serious_faults(site + name, width, scheme, awaited) == []
