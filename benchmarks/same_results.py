"""Whether two checkouts give the same stores and weights, to the byte.

    python benchmarks/same_results.py OTHER [--quick] [--json]

OTHER is the folder of another checkout, whose dependencies are those of this Python. Both run the
demo's recipe, on a little of Python's own library, from corpus to report, on one thread. Compared
are all shards, the trained weights, and the results; a manifest is not, as it holds times.
`different` counts the files that differ: 0 where a change of the code changed nothing.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from figures import command_line, show

_HERE = Path(__file__).resolve().parents[1]
_RECIPE = _HERE / "recipes" / "demo.yaml"
_COMPARED = ("*.arrow", "*.safetensors", "results.json", "counts.json")
_TEXT = Path(sysconfig.get_paths()["stdlib"]) / "*.py"
_LITTLE = (
    f"corpus.documents=[{{files: '{_TEXT}', domain: python}}]",
    "corpus.held_out_bytes=6000",
    "corpus.validation_bytes=4000",
)
_CHANGES = {
    "draws": ["corpus.shard_blocks=64"],
    "top": ["externalize.scheme=top", "externalize.k=8", "fusion.strategy=mined"],
}


def ran(checkout: Path, run: Path, changes: list[str]) -> dict[str, bytes]:
    """What a checkout makes, by file."""
    options = [word for change in (*_LITTLE, *changes) for word in ("--set", change)]
    environment = os.environ | {
        "PYTHONPATH": str(checkout / "src"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "fusellm", "run", str(_RECIPE), "--out", str(run), *options]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    paths = sorted({path for pattern in _COMPARED for path in run.rglob(pattern)})
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def main() -> None:
    """Run both, and compare."""
    parser = command_line(__doc__)
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    arguments = parser.parse_args()
    if not (arguments.other / "src" / "fusellm").is_dir():
        parser.error(f"{arguments.other} is no checkout of fusellm: it has no src/fusellm")
    compared = different = 0
    for name, changes in _CHANGES.items():
        if arguments.quick and name != "draws":
            continue
        size = "corpus.train_bytes=12000" if arguments.quick else "corpus.train_bytes=200000"
        with tempfile.TemporaryDirectory() as place:
            ours = ran(_HERE, Path(place) / "ours", [size, *changes])
            theirs = ran(arguments.other, Path(place) / "other", [size, *changes])
        compared += len(ours)
        for file in sorted(ours.keys() | theirs.keys()):
            if ours.get(file) != theirs.get(file):
                different += 1
                print(f"{name}: {file} differs", file=sys.stderr)
    show({"compared": compared, "different": different}, arguments.json, form=",.0f")


if __name__ == "__main__":
    main()
