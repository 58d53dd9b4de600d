"""Compiled loops where there is no place to keep what was compiled."""

import os
import subprocess
import sys
from pathlib import Path

MODULE = """
from fusellm.compiled import compiled


@compiled()
def add(a, b):
    return a + b
"""


def test_without_a_place_for_its_cache_a_loop_is_compiled_all_the_same(tmp_path: Path) -> None:
    """A read-only installation without a home: no folder can be made beside it, nor elsewhere."""
    (tmp_path / "loops.py").write_text(MODULE)
    (tmp_path / "__pycache__").touch()
    nowhere = dict.fromkeys(("HOME", "XDG_CACHE_HOME"), "/dev/null/none")
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"} | nowhere
    done = subprocess.run(
        [sys.executable, "-B", "-c", "import loops; print(loops.add(2, 3))"],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": paths},
    )
    assert done.stdout == "5\n", done.stderr
