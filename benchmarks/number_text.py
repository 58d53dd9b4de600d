"""Text with many numbers, made by rules: sums, tables, logs, dates and code with constants.

The same seed gives the same documents, on every machine.
"""

import random
from collections.abc import Callable

_NAMES = ("width", "height", "limit", "offset", "count", "price", "total", "mass", "year", "port")
_LEVELS = ("INFO", "WARN", "ERROR", "DEBUG")


def number_documents(seed: int, count: int) -> list[str]:
    """So many documents of some 500 to 1,500 bytes, each of one kind.

    >>> number_documents(0, 3) == number_documents(0, 3)
    True
    """
    chance = random.Random(seed)
    kinds: tuple[Callable[[random.Random], str], ...] = (_sums, _table, _log, _dates, _code)
    return [kinds[n % len(kinds)](chance) for n in range(count)]


def _sums(chance: random.Random) -> str:
    lines = []
    for _ in range(chance.randint(20, 40)):
        a, b = (chance.randrange(10 ** chance.randint(1, 4)) for _ in range(2))
        sign, result = chance.choice((("+", a + b), ("-", a - b), ("*", a * b)))
        lines.append(f"{a} {sign} {b} = {result}")
    return "\n".join(lines) + "\n"


def _table(chance: random.Random) -> str:
    names = chance.sample(_NAMES, 4)
    lines = [",".join(["id", *names])]
    first = chance.randrange(1000)
    for n in range(chance.randint(20, 40)):
        row = [str(first + n), *(str(chance.randrange(10**4)) for _ in range(2))]
        row += [f"{chance.uniform(0, 1000):.2f}" for _ in range(2)]
        lines.append(",".join(row))
    return "\n".join(lines) + "\n"


def _log(chance: random.Random) -> str:
    lines = []
    second = chance.randrange(86_400)
    for _ in range(chance.randint(12, 20)):
        second = (second + chance.randrange(90)) % 86_400
        clock = f"{second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}"
        where = ".".join(str(chance.randrange(256)) for _ in range(4))
        size = chance.randrange(100_000)
        lines.append(
            f"{clock} {chance.choice(_LEVELS)} {where} sent {size} bytes in {size // 90} ms"
        )
    return "\n".join(lines) + "\n"


def _dates(chance: random.Random) -> str:
    lines = []
    for _ in range(chance.randint(15, 30)):
        year, month, day = chance.randint(1900, 2030), chance.randint(1, 12), chance.randint(1, 28)
        name = chance.choice(_NAMES)
        lines.append(f"On {year}-{month:02d}-{day:02d} the {name} was {chance.randrange(5000)}.")
    return "\n".join(lines) + "\n"


def _code(chance: random.Random) -> str:
    lines = []
    for name in chance.sample(_NAMES, 6):
        values = ", ".join(str(chance.randrange(4096)) for _ in range(chance.randint(3, 12)))
        lines.append(f"{name.upper()}_{chance.randrange(100)} = [{values}]")
        lines.append(f"MAX_{name.upper()} = 0x{chance.randrange(65536):04x}")
        lines.append(f"if {name} > {chance.randrange(1024)}:\n    {name} -= {chance.randrange(64)}")
    return "\n".join(lines) + "\n"
