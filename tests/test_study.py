"""A study: arms, seeds and rates, what they share, what interrupts them, and the page."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import fusellm
from fusellm import Ensemble, load_pretrained
from fusellm.cli.study import study
from fusellm.errors import FusellmError, RecipeError
from fusellm.progress import Silent
from fusellm.store.blocks import Block, open_corpus, read_part
from fusellm.store.run_folder import trained_folder
from fusellm.study import trainings
from fusellm.study.compute import Compute, compute_of
from fusellm.study.execute import Execution
from fusellm.study.measured import digest_of_held_out
from fusellm.study.page import study_page
from fusellm.study.plan import Unit, load_study
from fusellm.study.results import StudyResults, results_of

pytestmark = pytest.mark.usefixtures("unrehearsed")

ARMS: dict[str, Any] = {
    "clm": {"train": "clm"},
    "fused": {},
    "before": {"set": {"fusion.hindsight": False}},
}
SMALL = {
    "training.max_steps": 4,
    "training.logging_steps": 2,
    "training.save_steps": 2,
    "corpus.shard_blocks": 64,
}


def write(folder: Path, world: Path, **changes: Any) -> Path:
    raw = {
        "name": "tried",
        "recipe": str(world / "recipe.yaml"),
        "set": SMALL,
        "seeds": [0, 1],
        "rates": [1e-3, 1e-2],
        "arms": ARMS,
    }
    file = folder / "study.yaml"
    kept = {key: value for key, value in (raw | changes).items() if value is not None}
    file.write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")
    return file


def done(file: Path, out: Path, **how: Any) -> tuple[str, StudyResults]:
    study = load_study(file)
    results = results_of(Execution(study, out, Silent(), **how).run())
    return study_page(study, results), results


@pytest.fixture(scope="module")
def finished(
    world: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, str, StudyResults]:
    """(file, folder, page, results) of a study."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fusellm.training.rehearsal.rehearse", lambda *_: None)
        file = write(folder, world)
        return file, folder / "out", *done(file, folder / "out")


def test_a_study_measures_every_arm_and_compares_it(
    finished: tuple[Path, Path, str, StudyResults],
) -> None:
    _, out, page, results = finished
    assert list(results.arms) == list(ARMS)
    assert list(results.untrained) == ["target", "first", "second"]
    assert [(one.arm, one.other) for one in results.differences] == [
        ("fused", "clm"),
        ("before", "clm"),
    ]
    for name, arm in results.arms.items():
        assert arm.rate in (1e-3, 1e-2)
        assert len(arm.by_seed) == 2
        assert arm.by_task["mean"].value == pytest.approx(np.mean(arm.by_seed))
        assert arm.deviation == pytest.approx(np.std(arm.by_seed, ddof=1))
        assert f"`{name}`" in page
        tried = results.tried[name]
        assert min(tried, key=tried.__getitem__) == f"{arm.rate:g}"
    for one in results.differences:
        both = [results.arms[name].by_task["mean"].value for name in (one.arm, one.other)]
        assert one.by_task["mean"].value == pytest.approx(both[0] - both[1])
        assert one.by_task["mean"].value == pytest.approx(np.mean(one.by_seed))
        assert one.p is not None
        assert one.corrected is not None
        assert one.p <= one.corrected <= 2 * one.p
    assert results.arms["clm"].compute.reading == 0 < results.arms["fused"].compute.reading
    json.dumps(results.as_json())
    assert len(list((out / "made").glob("externalize-*"))) == 3  # the target's tokens, two sources
    assert len(list((out / "made").glob("fuse-*"))) == 2


def test_the_weights_of_rates_that_were_not_taken_are_gone(
    finished: tuple[Path, Path, str, StudyResults],
) -> None:
    _, out, _, results = finished
    for name, arm in results.arms.items():
        kept = {path.parents[2].name for path in out.glob(f"arms/{name}/*/train/*/config.json")}
        assert kept == {f"seed-{seed}-rate-{arm.rate:g}" for seed in (0, 1)}
        assert len(list(out.glob(f"arms/{name}/*/outcome.json"))) == 3


def test_another_arm_redoes_nothing_else(
    finished: tuple[Path, Path, str, StudyResults],
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, out, page, results = finished
    shutil.copytree(out, tmp_path / "out")
    trained = _recorded(monkeypatch)
    same, _ = done(write(tmp_path, world), tmp_path / "out")
    assert same == page
    assert trained == []
    file = write(tmp_path, world, arms={**ARMS, "alone": {"sources": ["second"]}})
    _, more = done(file, tmp_path / "out")
    assert {name.split("/")[1] for name in trained} == {"alone"}
    assert len(trained) == 3
    for name, arm in results.arms.items():
        assert more.arms[name] == arm
    fused, alone = (more.arms[name].compute for name in ("fused", "alone"))
    assert 0 < alone.reading < fused.reading
    assert alone.training == fused.training


def _recorded(monkeypatch: pytest.MonkeyPatch, fails_at: int | None = None) -> list[str]:
    """The folders that are trained from now on; the n-th training is interrupted."""
    folders: list[str] = []
    real = trainings.Trainings.train

    def train(self: Any, pipeline: Any, which: str, redo: bool = False) -> Any:
        folders.append(str(pipeline.run.relative_to(self.out)))
        if len(folders) == fails_at:
            raise KeyboardInterrupt
        return real(self, pipeline, which, redo)

    monkeypatch.setattr(trainings.Trainings, "train", train)
    return folders


@pytest.mark.parametrize("fails_at", [1, 4, 8])
def test_an_interrupted_study_goes_on_to_the_same_page(
    finished: tuple[Path, Path, str, StudyResults],
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails_at: int,
) -> None:
    file = write(tmp_path, world)
    with monkeypatch.context() as patch:
        first = _recorded(patch, fails_at)
        with pytest.raises(KeyboardInterrupt):
            done(file, tmp_path / "out")
    with monkeypatch.context() as patch:
        rest = _recorded(patch)
        page, _ = done(file, tmp_path / "out")
    assert page == finished[2]
    assert not set(first[:-1]) & set(rest)
    assert len(first) - 1 + len(rest) == 9


@pytest.mark.slow
def test_trainings_at_a_time_give_the_same(
    finished: tuple[Path, Path, str, StudyResults], world: Path, tmp_path: Path
) -> None:
    page, _ = done(write(tmp_path, world), tmp_path / "out", jobs=2)
    assert page == finished[2]


def test_plain_training_may_spend_what_fusion_does(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = {**ARMS, "as-much": {"train": "clm", "compute_of": "fused"}}
    del arms["before"]
    whole = SMALL | {"training.max_steps": -1, "training.num_train_epochs": 1}
    file = write(tmp_path, world, arms=arms, seeds=[0], rates=None, set=whole)
    _, results = done(file, tmp_path / "out")
    fused, as_much = results.arms["fused"].compute, results.arms["as-much"].compute
    assert as_much.reading == 0
    assert as_much.training == pytest.approx(fused.total, rel=0.05)
    assert as_much.training > 1.5 * fused.training
    assert results.arms["as-much"].rate is None
    assert results.arms["fused"].deviation is None
    assert results.tried == {}
    trained = _recorded(monkeypatch)
    done(file, tmp_path / "out")
    assert trained == []
    steps = load_study(write(tmp_path, world, arms=arms, seeds=[0], rates=None))
    work = Execution(steps, tmp_path / "steps", Silent())
    assert work.run().trained["as-much"][0].outcome.steps > 2 * 4


PAIRWISE: dict[str, Any] = {
    "clm": {"train": "clm"},
    "one": {"sources": ["first"]},
    "two": {"sources": ["second"]},
    "mean": {"merge": {"of": ["one", "two"], "method": "linear", "weights": [3, 1]}},
    "with-clm": {"merge": {"of": ["clm", "one"], "method": "ties", "lambda": 0.5}},
}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_arms_can_be_merged(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, world, arms=PAIRWISE, rates=None, compare=[["mean", "one"]])
    out = tmp_path / "out"
    page, results = done(file, out)
    for seed in (0, 1):
        of = {name: out / f"arms/{name}/seed-{seed}" for name in PAIRWISE}
        one, two = (weights_of(of[name] / "train/fused") for name in ("one", "two"))
        for name, merged in weights_of(of["mean"] / "merged").items():
            torch.testing.assert_close(merged, 0.75 * one[name] + 0.25 * two[name])
        assert "arms/clm/seed" not in (of["with-clm"] / "merged/README.md").read_text()
    costs = {name: results.arms[name].compute for name in PAIRWISE}
    for merge, a, b in (("mean", "one", "two"), ("with-clm", "clm", "one")):
        assert costs[merge] == Compute(
            costs[a].reading + costs[b].reading, costs[a].training + costs[b].training
        )
        arm = results.arms[merge]
        assert (arm.rate, list(arm.curve), arm.tokens_to_reference) == (None, [], None)
        assert arm.deviation > 0
    assert results.differences[-1].arm == "mean"
    assert "never" not in next(line for line in page.splitlines() if "| `mean` |" in line)

    trained, merged_anew = _recorded(monkeypatch), []
    monkeypatch.setattr(trainings, "merge_models", lambda *_, **how: merged_anew.append(how))
    assert done(file, out) == (page, results)
    assert trained == merged_anew == []
    assert load_study(file, ["with-clm"]).chosen == ("clm", "one", "with-clm")


def test_rates_are_searched_by_trainings_alone_and_a_name_is_no_difference(
    world: Path, tmp_path: Path
) -> None:
    """An arm called as the difference of two others keeps its own value."""
    arms = {
        "clm": {"train": "clm"},
        "one": {"sources": ["first"]},
        "one-clm": {"merge": {"of": ["one", "clm"], "method": "linear"}},
        "all": {"ensemble": {"model": "one-clm"}},
    }
    file = write(tmp_path, world, arms=arms, seeds=[0])
    page, results = done(file, tmp_path / "out")
    assert set(results.tried) == {"clm", "one"}
    value = results.arms["one-clm"].by_task["mean"].value
    assert 0.5 < value < 20
    row = next(line for line in page.splitlines() if line.startswith("| `one-clm` |"))
    assert f"{value:.4f}" in row
    assert load_study(file, ["all"]).chosen == ("clm", "one", "one-clm", "all")


def test_a_model_whose_weights_were_discarded_is_trained_again_and_may_be_interrupted(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, small = tmp_path / "out", {"arms": {"clm": {"train": "clm"}}, "seeds": [0]}
    _, results = done(write(tmp_path, world, **small), out)
    (other,) = {1e-3, 1e-2} - {results.arms["clm"].rate}
    file = write(tmp_path, world, **small | {"rates": [other]})
    with monkeypatch.context() as patch:
        patch.setattr("fusellm.training.run_trainer.ObjectiveTrainer.train", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            done(file, out)
    begun = out / f"arms/clm/seed-0-rate-{other:g}/train/clm"
    assert (begun / "manifest.json").exists()
    page, results = done(file, out)
    assert results.arms["clm"].rate == other
    assert (begun / "model.safetensors").exists()
    assert done(file, out)[0] == page


def _interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_half_a_model_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the power is cut while a model is deleted, its manifest is gone first."""
    folder = trained_folder(tmp_path, "clm")
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    monkeypatch.setattr(shutil, "rmtree", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainings.discard(tmp_path, "clm")
    assert not (folder / "manifest.json").exists()


def test_what_cannot_be_merged_is_told_before_any_training(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = _recorded(monkeypatch)
    monkeypatch.setattr("fusellm.merging.opened.stored_quantization", lambda _: {"bits": 4})
    monkeypatch.setattr("fusellm.merging.opened.method_of", lambda _: "gptq")
    arms = {name: PAIRWISE[name] for name in ("clm", "one", "with-clm")}
    file = write(tmp_path, world, arms=arms, rates=None, seeds=[0])
    with pytest.raises(FusellmError, match=r"is stored quantized \(gptq\), and a merge is"):
        done(file, tmp_path / "out")
    assert trained == []


def test_held_out_text_with_other_context_is_another_one() -> None:
    block = Block(0, "d", "prose", True, "a question, an answer")
    assert digest_of_held_out([block]) == digest_of_held_out([replace(block, number=3)])
    asked = replace(block, context=((0, 11),))
    assert digest_of_held_out([block]) != digest_of_held_out([asked])
    assert digest_of_held_out([asked]) != digest_of_held_out([replace(asked, context=((0, 12),))])


def test_what_an_older_rule_has_measured_of_an_ensemble_is_measured_anew(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = {"clm": {"train": "clm"}, "all": {"ensemble": {}}}
    file = write(tmp_path, world, arms=arms, rates=None, seeds=[0])
    done(file, tmp_path / "out")
    real, measured = Ensemble.nats, []

    def nats(self: Ensemble, *given: Any) -> Any:
        measured.append(1)
        return real(self, *given)

    monkeypatch.setattr(Ensemble, "nats", nats)
    done(file, tmp_path / "out")
    assert measured == []
    monkeypatch.setattr("fusellm.study.execute.RULE", 1_000)
    done(file, tmp_path / "out")
    assert measured == [1]


def test_arms_can_be_ensembles(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = PAIRWISE | {
        "all": {"ensemble": {}},
        "two-of-them": {"sources": ["second"], "ensemble": {"weights": "bayes"}},
        "trained": {"sources": ["second"], "ensemble": {"model": "clm"}},
        "merged": {"sources": ["second"], "ensemble": {"model": "mean"}},
    }
    file, out = write(tmp_path, world, arms=arms, rates=None), tmp_path / "out"
    page, results = done(file, out)
    models = {name: load_pretrained(str(world / name), device="cpu") for name in ("llama", "neox")}
    blocks = read_part(open_corpus(out / "base"), "held_out")
    texts, last = [b.text for b in blocks], [b.last for b in blocks]
    expected = Ensemble(models["llama"], {"second": models["neox"]}, "bayes").nats(texts, last)
    measured = Execution(load_study(file), out, Silent()).run().trained["two-of-them"]
    for row, nats in zip(measured[1].nats, expected, strict=True):
        np.testing.assert_allclose(row, nats, rtol=1e-5)
    by_arm = {name: arm.by_task["mean"].value for name, arm in results.arms.items()}
    assert results.arms["all"].deviation == 0
    assert results.arms["all"].compute.total == 0
    assert results.arms["trained"].compute == results.arms["clm"].compute
    assert results.arms["trained"].deviation > 0
    assert (
        len({round(by_arm[name], 6) for name in ("all", "two-of-them", "trained", "merged")}) == 4
    )

    trained, measured_anew = _recorded(monkeypatch), []
    monkeypatch.setattr(Ensemble, "nats", lambda *_: measured_anew.append(1))
    assert done(file, out) == (page, results)
    assert trained == measured_anew == []
    assert load_study(file, ["merged"]).chosen == ("clm", "one", "two", "mean", "merged")


def test_a_merge_of_other_numbers_is_made_anew_and_the_former_one_kept(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"rates": None, "seeds": [0]}
    out = tmp_path / "out"
    done(write(tmp_path, world, arms=PAIRWISE, **small), out)
    before = weights_of(out / "arms/mean/seed-0/merged")
    trained = _recorded(monkeypatch)
    even = {"merge": PAIRWISE["mean"]["merge"] | {"weights": [1, 1]}}
    file = write(tmp_path, world, arms=PAIRWISE | {"mean": even}, **small)
    for name in ("write_text", "merge_models"):  # the power is cut
        with monkeypatch.context() as patch:
            patch.setattr(trainings, name, _interrupted)
            with pytest.raises(KeyboardInterrupt):
                done(file, out)
    done(file, out)
    assert trained == []
    after = weights_of(out / "arms/mean/seed-0/merged")
    name = "model.embed_tokens.weight"
    one = weights_of(out / "arms/one/seed-0/train/fused")[name]
    two = weights_of(out / "arms/two/seed-0/train/fused")[name]
    torch.testing.assert_close(after[name], (one + two) / 2)
    kept = [weights_of(path)[name] for path in out.glob("aside/*/arms/mean/seed-0/merged")]
    assert any(torch.equal(one_kept, before[name]) for one_kept in kept)


def test_other_settings_are_an_error_or_redone(
    finished: tuple[Path, Path, str, StudyResults], world: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished[1], tmp_path / "out")
    arms = {**ARMS, "fused": {"set": {"objective.lambda": 0.9}}}
    file = write(tmp_path, world, arms=arms)
    with pytest.raises(FusellmError, match=r"train/fused was made from something else.*lambda"):
        done(file, tmp_path / "out")
    _, results = done(file, tmp_path / "out", redo=True)
    assert results.arms["before"] == finished[3].arms["before"]
    assert results.arms["fused"].by_seed != finished[3].arms["fused"].by_seed


def test_held_out_text_is_one_for_all_and_known_before_any_training(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = {**ARMS, "other": {"set": {"corpus.held_out_share": 0.3}}}
    file = write(tmp_path, world, arms=arms, seeds=[0], rates=None)
    trained = _recorded(monkeypatch)
    with pytest.raises(RecipeError, match=r"arm other changes corpus: so that its held-out text"):
        done(file, tmp_path / "out")
    assert trained == []


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"arms": {}}, "arms: "),
        ({"arms": {"fused": {}}}, "reference: there is no arm 'clm'; there are fused"),
        ({"reference": "plain"}, "reference: there is no arm 'plain'; there are clm, fused"),
        ({"compare": [["fused", "best"]]}, "compare: there is no arm 'best'"),
        ({"seeds": [1, 1]}, "seeds: one is named twice"),
        ({"seeds": []}, "seeds: "),
        ({"rates": [-1]}, "rates.0: "),
        ({"arms": ARMS | {"x": {"train": "clm", "sources": ["first"]}}}, "reads none; leave out"),
        ({"arms": ARMS | {"x": {"compute_of": "fused"}}}, "belongs to an arm with train: clm"),
        (
            {"arms": ARMS | {"x": {"train": "clm", "compute_of": "y"}}},
            "arms.x.compute_of: there is no arm 'y'",
        ),
        ({"arms": ARMS | {"x": {"train": "clm", "compute_of": "x"}}}, "that is the arm itself"),
        (
            {"arms": ARMS | {"x": {"merge": {"of": ["clm", "y"], "method": "sce"}}}},
            "arms.x.merge.of: there is no arm 'y'; there are clm, fused, before, x",
        ),
        (
            {"arms": PAIRWISE | {"x": {"merge": {"of": ["clm", "mean"], "method": "sce"}}}},
            "arms.x.merge.of: mean is no training; name an arm that is trained",
        ),
        (
            {"arms": PAIRWISE | {"x": {"train": "clm", "compute_of": "mean"}}},
            "arms.x.compute_of: mean is no training; name an arm that is trained",
        ),
        (
            {"arms": PAIRWISE | {"x": {"merge": {"of": ["clm", "clm"], "method": "linear"}}}},
            "arms.x.merge: of: clm, clm names one twice; name each once",
        ),
        (
            {"arms": PAIRWISE, "set": SMALL | {"training.lora": {"merge": False}}},
            "arms.mean.merge: one saves adapters alone (training.lora.merge: false), and a merge",
        ),
        (
            {"arms": PAIRWISE, "reference": "mean"},
            "reference: mean is not trained, and has no curve",
        ),
        (
            {"arms": ARMS | {"x": {"rates": [1], "merge": PAIRWISE["mean"]["merge"]}}},
            "rates has no meaning with merge, which trains nothing",
        ),
        (
            {"arms": ARMS | {"x": {"merge": {"of": ["clm"], "method": "sce"}}}},
            "arms.x.merge.of: ",
        ),
        (
            {"arms": ARMS | {"x": {"merge": {"of": ["clm", "fused"], "method": "median"}}}},
            "arms.x.merge.method: ",
        ),
        (
            {"arms": ARMS | {"x": {"merge": {"of": ["clm", "fused"], "method": "sce", "t": 1}}}},
            "arms.x.merge: t has no meaning with sce; it belongs to slerp",
        ),
        (
            {
                "arms": ARMS
                | {"other": {"set": {"target.dtype": "bfloat16"}}}
                | {"x": {"merge": {"of": ["clm", "other"], "method": "sce"}}}
            },
            "arms.x.merge: clm and other are of two targets, whose weights do not belong together",
        ),
        (
            {"arms": ARMS | {"x": {"ensemble": {}}, "y": {"ensemble": {"model": "x"}}}},
            "arms.y.ensemble.model: x is no training; name an arm that is trained",
        ),
        (
            {"arms": ARMS | {"x": {"ensemble": {}, "set": {"seed": 1}}}},
            "set has no meaning with ensemble, which trains nothing",
        ),
        (
            {"arms": ARMS | {"x": {"ensemble": {}, "sources": ["third"]}}},
            "arm x: the base recipe has no source 'third'; it has first, second",
        ),
        ({"arms": ARMS | {"x": {"sources": ["third"]}}}, "no source 'third'; it has first, second"),
        ({"arms": ARMS | {"first": {}}}, "arms.first: a source has that name"),
        ({"arms": ARMS | {"x": {"set": {"fusion.functon": "bayes"}}}}, "did you mean"),
        ({"arms": ARMS | {"x": {"set": {"fusion.function": "bays"}}}}, "arm x: "),
        ({"set": {"training.validations": 0}}, "validations: 0 leaves nothing to compare"),
        ({"recipe": "none.yaml"}, "there is no recipe"),
        ({"seed": 1}, "unknown key seed; did you mean seeds?"),
        ({"arms": ARMS | {"x": {"sett": {}}}}, "unknown key arms.x.sett; did you mean set?"),
    ],
)
def test_what_is_no_study_is_refused(
    world: Path, tmp_path: Path, changes: dict[str, Any], part: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_study(write(tmp_path, world, **changes))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["study-zoo", "study-small"])
def test_the_studies_that_come_with_fusellm_are_studies(name: str) -> None:
    study = load_study(Path(fusellm.__file__).parent / "recipes" / f"{name}.yaml")
    wanted = {"clm", "clm-as-much", "fused", "before", "bayes", "route"}
    assert wanted <= set(study.of_kind("training"))
    assert "pairwise" in study.of_kind("merge")
    assert len(study.of_kind("ensemble")) >= 2
    assert len(study.settings.seeds) >= 2


def test_only_some_arms(world: Path, tmp_path: Path) -> None:
    file = write(tmp_path, world)
    assert load_study(file, ["before"]).chosen == ("clm", "before")
    with pytest.raises(RecipeError, match="there is no arm 'none'; there are clm, fused, before"):
        load_study(file, ["none"])
    with pytest.raises(RecipeError, match="there is no study"):
        load_study(tmp_path / "other.yaml")


def test_the_command_says_its_plan_and_shows_what_it_found(
    finished: tuple[Path, Path, str, StudyResults],
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(finished[1], tmp_path / "out")
    file = write(tmp_path, world)
    study(file, plan=True)
    assert "9 trainings" in capsys.readouterr().out
    study(file, plan=True, as_json=True)
    plan = json.loads(capsys.readouterr().out)
    assert [one["trainings_to_find_the_rate"] for one in plan] == [2, 2, 2]
    assert not (tmp_path / "out" / "study.md").exists()
    study(file, out=tmp_path / "out")
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*ARMS, "first", "second", "target"))
    assert (tmp_path / "out" / "study.md").read_text(encoding="utf-8") == finished[2]
    study(file, out=tmp_path / "out", as_json=True)
    figures = json.loads(capsys.readouterr().out)
    assert figures == json.loads((tmp_path / "out" / "study.json").read_text(encoding="utf-8"))
    assert figures["arms"]["fused"]["by_task"]["mean"]["value"] == pytest.approx(
        finished[3].arms["fused"].by_task["mean"].value
    )


def test_a_damaged_outcome_is_told(
    finished: tuple[Path, Path, str, StudyResults], world: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished[1], tmp_path / "out")
    outcome = next(tmp_path.glob("out/arms/fused/*/outcome.json"))
    outcome.write_text('{"identity": 3}')
    with pytest.raises(FusellmError, match=r"outcome\.json is damaged"):
        done(write(tmp_path, world), tmp_path / "out")


def test_computing_is_counted(world: Path, tmp_path: Path) -> None:
    file = write(tmp_path, world, seeds=[0], rates=None)
    work = Execution(load_study(file), tmp_path / "out", Silent())
    answers = work.run()
    one = answers.trained["fused"][0]
    run = tmp_path / "out" / one.unit.folder
    counts = {
        name: json.loads((run / "externalize" / name / "manifest.json").read_text())["counts"]
        for name in ("first", "second")
    }
    sizes = {"target": 7, "first": 3, "second": 5}
    pipeline = trainings.Trainings(tmp_path / "out", Silent()).pipeline(
        load_study(file).recipe(Unit("fused", 0)), one.unit.folder
    )
    found = compute_of(pipeline, "fused", 100, sizes)
    assert found.training == 6 * 7 * 100
    assert found.reading == 2 * (3 * counts["first"]["tokens"] + 5 * counts["second"]["tokens"])
    assert compute_of(pipeline, "clm", 100, sizes).reading == 0
