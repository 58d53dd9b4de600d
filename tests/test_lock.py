"""The lock that `make` installs from: whole, hashed, and what pyproject.toml asks for."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OF_A_BUILD = re.compile(r"torch|triton|nvidia-|cuda-")
"""Packages that differ by the build of torch: none of them is in the lock."""


def locked(text: str) -> dict[str, tuple[Requirement, int]]:
    """Each requirement of a lock by its name, with the number of its hashes."""
    found = {}
    for entry in re.sub(r"^#.*\n", "", text, flags=re.M).replace("\\\n", " ").splitlines():
        requirement, *hashes = re.split(r"\s+--hash=sha256:", entry.strip())
        one = Requirement(requirement)
        found[canonicalize_name(one.name)] = one, len(hashes)
    return found


LOCK_TEXT = (ROOT / "requirements.lock").read_text(encoding="utf-8")
LOCK = locked(LOCK_TEXT)
WANTED = [
    Requirement(text)
    for text in (
        *PROJECT["project"]["dependencies"],
        *PROJECT["project"]["optional-dependencies"]["dev"],
        *PROJECT["build-system"]["requires"],
    )
]


def test_every_package_has_one_version_and_hashes() -> None:
    assert len(LOCK) > 100
    for name, (requirement, hashes) in LOCK.items():
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), name
        assert hashes >= 1, name


def test_no_address_and_no_build_of_torch() -> None:
    assert "://" not in LOCK_TEXT
    assert "index-url" not in LOCK_TEXT
    assert "find-links" not in LOCK_TEXT
    left = [name for name in LOCK if OF_A_BUILD.match(name)]
    assert left == [], f"add them to CUDA in the Makefile, then run: make lock; {left}"


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_the_lock_is_of_this_project(wanted: Requirement) -> None:
    name = canonicalize_name(wanted.name)
    if name == "torch":
        one = Requirement((ROOT / "constraints.txt").read_text(encoding="utf-8").split("\n")[-2])
    else:
        assert name in LOCK, f"{wanted} is not in requirements.lock; run: make lock"
        one = LOCK[name][0]
    version = str(one.specifier).removeprefix("==")
    assert wanted.specifier.contains(version), f"{one} is locked; run: make lock"
