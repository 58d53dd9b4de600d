"""The sandbox and its toolchains as fixtures: tests are skipped where this machine has none."""

import shutil
import subprocess
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from fusellm.errors import EvaluationError
from fusellm.evaluation.code.sandbox import (
    LANGUAGES,
    Sandbox,
    Toolchain,
    find_sandbox,
    find_toolchain,
)

Toolchains = Callable[[str], Toolchain]
SLOW = ("go", "java", "ts")
"""Languages whose programs take seconds."""


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    if shutil.which("bwrap") is None:
        pytest.skip("bwrap is not installed")
    try:
        return find_sandbox()
    except EvaluationError as error:
        pytest.skip(str(error))


PAIR = """package org.javatuples;
public record Pair<A, B>(A first, B second) {
    public static <A, B> Pair<A, B> with(A first, B second) { return new Pair<>(first, second); }
}
"""


@pytest.fixture(scope="session")
def support(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As much of javatuples as the example in Java needs, where there is a compiler for it."""
    folder = tmp_path_factory.mktemp("support")
    if shutil.which("javac"):
        (folder / "Pair.java").write_text(PAIR)
        subprocess.run(["javac", "-d", folder, folder / "Pair.java"], check=True)
        with zipfile.ZipFile(folder / "javatuples-1.2.jar", "w") as jar:
            jar.write(folder / "org/javatuples/Pair.class", "org/javatuples/Pair.class")
    return folder


@pytest.fixture(scope="session")
def toolchains(sandbox: Sandbox, request: pytest.FixtureRequest) -> Toolchains:
    """Toolchains by key, each tried once; a test is skipped where this machine has none."""

    @cache
    def find(key: str) -> Toolchain | str:
        try:
            folder = request.getfixturevalue("support") if key == "java" else None
            return find_toolchain(LANGUAGES[key], sandbox, folder)
        except EvaluationError as error:
            if "is not installed" in str(error) or "which the sandbox does not" in str(error):
                return str(error)
            raise

    def toolchain(key: str) -> Toolchain:
        found = find(key)
        if isinstance(found, str):
            pytest.skip(found)
        return found

    return toolchain
