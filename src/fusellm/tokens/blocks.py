"""Cutting a document into blocks that, joined, are the document."""

from collections.abc import Iterator

_LONGEST_CHARACTER = 4  # bytes
_SPACES = (b" ", b"\t", b"\r", b"\f", b"\v")


def cut(text: str, block_bytes: int) -> Iterator[str]:
    """Cut a text into blocks of at most `block_bytes` bytes of UTF-8.

    A cut is made after the last line end that fits, else after the last white space, else
    between two characters. An empty text gives no block.

    Raises:
        ValueError: `block_bytes` is under 4, the longest character.

    >>> list(cut("one\\ntwo three", 8))
    ['one\\n', 'two ', 'three']
    """
    if block_bytes < 4:
        raise ValueError(
            f"block_bytes must be at least 4, the longest character; got {block_bytes}"
        )
    data = text.encode("utf-8")
    start = 0
    while start < len(data):
        end = min(start + block_bytes, len(data))
        if end < len(data):
            end = start + cut_point(data[start:end], data[end])
        yield data[start:end].decode("utf-8")
        start = end


def cut_point(window: bytes, following: int) -> int:
    """Where text that begins with `window` is cut: how many of the window's bytes come before.

    Args:
        window: at least 4 bytes.
        following: the byte after them.

    >>> cut_point(b"one\\ntwo", ord(" "))
    4
    """
    line_end = window.rfind(b"\n")
    if line_end >= 0:
        return line_end + 1
    space = max(map(window.rfind, _SPACES))
    if space >= 0:
        return space + 1
    at = len(window)
    if following & 0xC0 == 0x80:  # the window ends inside a character: go back to where it begins
        at -= 1
        while window[at] & 0xC0 == 0x80 and at > len(window) - _LONGEST_CHARACTER:
            at -= 1
    return at
