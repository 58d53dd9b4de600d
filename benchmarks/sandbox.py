"""What the sandbox costs, and whether anything gets out of it.

    python benchmarks/sandbox.py --repeats 100

    overhead_seconds   of a program in Python that does nothing: in the sandbox minus without it,
                       medians of runs by turns
    probe_seconds      `find_sandbox`, once
    attacks, escapes   programs of tests/attacks.py, and those of them that got away with something
    solved, unsolved   HumanEval's own solutions that pass, of the file in ../shared if it is there,
    solved_seconds     and the time that all took, as many at once as there are cores

`--quick` repeats less and judges every fourth solution; `--json` prints one flat object of figures.
"""

import gzip
import importlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from figures import command_line, show
from fusellm.evaluation.code.problems import judge, read_problems
from fusellm.evaluation.code.sandbox import LANGUAGES, Limits, Sandbox, find_sandbox, find_toolchain

_ROOT = Path(__file__).resolve().parents[1]
_HUMAN_EVAL = _ROOT.parent / "shared" / "eval" / "HumanEval.jsonl.gz"
_COMMAND = ("python3", "-I", "-c", "pass")


def overhead(sandbox: Sandbox, repeats: int) -> dict[str, float]:
    """Seconds of a program that does nothing, with and without a sandbox, by turns."""
    inside, bare = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        outcome = sandbox.run(_COMMAND, Limits())
        inside.append(time.perf_counter() - began)
        assert outcome.exit_code == 0
        began = time.perf_counter()
        subprocess.run(_COMMAND, check=True, env={"PATH": sandbox.path})
        bare.append(time.perf_counter() - began)
    medians = {"inside_seconds": statistics.median(inside), "bare_seconds": statistics.median(bare)}
    return {"overhead_seconds": medians["inside_seconds"] - medians["bare_seconds"], **medians}


def attacks(sandbox: Sandbox, quiet: bool) -> dict[str, float]:
    """Every attack once, in the world that tells whether it got out."""
    sys.path.insert(0, str(_ROOT / "tests"))
    module = importlib.import_module("attacks")
    escaped = 0
    with module.world() as world:
        for attack in module.ATTACKS:
            outcome, escapes = module.run_attack(attack, sandbox, world)
            escaped += bool(escapes)
            if not quiet:
                told = "; ".join(escapes) or outcome.stopped or f"exit code {outcome.exit_code}"
                print(f"{attack.name:<40} {outcome.seconds:5.2f} s  {told}", flush=True)
    return {"attacks": len(module.ATTACKS), "escapes": escaped}


def solutions(sandbox: Sandbox, step: int) -> dict[str, float]:
    """HumanEval's own solutions, every `step`-th."""
    if not _HUMAN_EVAL.exists():
        return {}
    rows = gzip.decompress(_HUMAN_EVAL.read_bytes()).splitlines()
    completions = [["\n" + json.loads(row)["canonical_solution"]] for row in rows]
    problems = read_problems(_HUMAN_EVAL, "python")
    toolchain = find_toolchain(LANGUAGES["python"], sandbox)
    began = time.perf_counter()
    answers = judge(problems[::step], completions[::step], toolchain)
    seconds = time.perf_counter() - began
    solved = int(sum(answer.score for answer in answers))
    return {"solved": solved, "unsolved": len(answers) - solved, "solved_seconds": seconds}


def main() -> None:
    """Measure and print."""
    parser = command_line(__doc__)
    parser.add_argument("--repeats", type=int, default=100)
    arguments = parser.parse_args()
    began = time.perf_counter()
    sandbox = find_sandbox()
    figures: dict[str, float] = {"probe_seconds": time.perf_counter() - began}
    figures |= overhead(sandbox, 20 if arguments.quick else arguments.repeats)
    figures |= attacks(sandbox, quiet=arguments.json)
    figures |= solutions(sandbox, 4 if arguments.quick else 1)
    show(figures, arguments.json, ".4g")


if __name__ == "__main__":
    main()
