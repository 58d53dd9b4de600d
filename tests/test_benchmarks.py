"""The benchmarks run: `--quick --json` prints one flat object of numbers. How fast is not asked."""

import doctest
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
NO_SCRIPTS = {
    "figures",
    "number_text",
    "script_text",
    "kinds_of_text",
    "arms",
    "carried_bits",
    "sampled_truth",
}
ELSEWHERE = {
    "real": "trains real language models: tests/test_real.py",
    "boundaries": "needs a run of real models",
    "recent_text": "fetches packages",
    "fusion_gain": "trains for many minutes",
    "sandbox": "needs toolchains: tests/test_sandbox.py",
}
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in NO_SCRIPTS)
STUDIES = {
    "same_results": [str(FOLDER.parent)],
    "store": ["sizes", "epochs"],
    "translation": ["measure", "digits", "truth"],
}
RUNS = [
    (name, study) for name in SCRIPTS if name not in ELSEWHERE for study in STUDIES.get(name, [""])
]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "study"), RUNS)
def test_a_benchmark_runs(name: str, study: str, tmp_path: Path) -> None:
    """In a process of its own, without the hub."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    more = [study] if study else []
    done = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py", "--quick", "--json", *more],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures
    assert all(isinstance(value, int | float) for value in figures.values()), figures
    assert not any(math.isnan(value) for value in figures.values()), figures


def test_what_is_run_elsewhere_is_there() -> None:
    assert set(ELSEWHERE) <= set(SCRIPTS)


@pytest.mark.parametrize("name", ["kinds_of_text", "number_text", "script_text"])
def test_examples_of_a_helper_hold(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0
