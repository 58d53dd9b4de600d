"""A small problem in each language, for trying whether its toolchain works."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A problem as MultiPL-E spells it, with a completion that is right and one that is wrong."""

    prompt: str
    right: str
    wrong: str
    tests: str


EXAMPLES = {
    "cpp": Example(
        "#include<assert.h>\n#include<bits/stdc++.h>\nlong twice(long n) {",
        "\n    return 2 * n;",
        "\n    return n;",
        "}\nint main() {\n    auto candidate = twice;\n    assert(candidate((3)) == (6));\n}\n",
    ),
    "go": Example(
        'package twice_test\n\nimport (\n    "testing"\n    "fmt"\n)\n\nfunc twice(n int) int {',
        "\n    return 2 * n\n}",
        "\n    return n\n}",
        "func TestTwice(t *testing.T) {\n"
        '    if fmt.Sprintf("%v", twice(3)) != "6" {\n        t.Errorf("wrong")\n    }\n}\n',
    ),
    "java": Example(
        "import java.util.*;\nimport org.javatuples.*;\nclass Problem {\n"
        "    public static Pair<Long, Long> twice(long n) {",
        "\n        return Pair.with(n, 2 * n);",
        "\n        return Pair.with(n, n);",
        "    }\n    public static void main(String[] args) {\n"
        "    assert(twice((3l)).equals((Pair.with(3l, 6l))));\n    }\n\n}\n",
    ),
    "js": Example(
        "function twice(n){",
        "\n  return 2 * n;\n}",
        "\n  return n;\n}",
        "const assert = require('node:assert');\nfunction test() {\n"
        "  assert.deepEqual(twice(3),6);\n}\n\ntest();",
    ),
    "php": Example(
        "<?php\nfunction twice($n) {",
        "\n    return 2 * $n;\n}",
        "\n    return $n;\n}",
        "function test(): void {\n"
        '    if (twice(3) !== 6) { throw new Exception("Test failed!"); }\n}\n\ntest();',
    ),
    "python": Example(
        "def twice(n: int) -> int:",
        "\n    return 2 * n",
        "\n    return n",
        "def check(candidate):\n    assert candidate(3) == 6\n\ncheck(twice)\n",
    ),
    "r": Example(
        "twice <- function(n) {",
        "\n    2 * n\n}",
        "\n    n\n}",
        "test_humaneval <- function() {\n    stopifnot(isTRUE(all.equal(twice(3), 6)))\n}\n"
        "test_humaneval()",
    ),
    "rb": Example(
        "def twice(n)",
        "\n  2 * n\nend",
        "\n  n\nend",
        "require 'test/unit'\nclass TestHumanEval < Test::Unit::TestCase\n  def test_twice\n"
        "    candidate = method(:twice)\n    assert_equal(6, candidate.call(3))\n  end\nend\n",
    ),
    "rs": Example(
        "fn twice(n: isize) -> isize {",
        "\n    2 * n",
        "\n    n",
        "}\n\nfn main() {\n    let candidate = twice;\n    assert_eq!(candidate(3), 6);\n}\n",
    ),
    "ts": Example(
        "function twice(n: number): number {",
        "\n  return 2 * n;\n}",
        "\n  return n;\n}",
        "declare var require: any;\nconst assert = require('node:assert');\nfunction test() {\n"
        "  assert.deepEqual(twice(3),6);\n}\n\ntest();",
    ),
}
"""By the keys of `languages.LANGUAGES`."""
