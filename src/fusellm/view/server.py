"""A small server on this machine's own address, which nobody else can ask.

It listens on 127.0.0.1. Each page's address has a token in it, which is new each time; a request
without it, or for another host's name (DNS rebinding), is refused. Only GET is answered, nothing is
written, and no page may be framed, cached or asked for by another site.
"""

import hmac
import json
import secrets
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from re import fullmatch
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fusellm.errors import FusellmError, StoreError
from fusellm.explain.documents import search_blocks
from fusellm.view.jobs import Job
from fusellm.view.opened import OpenedRun
from fusellm.view.pages import (
    PASSAGES,
    SERVED_POLICY,
    Pages,
    asset,
    page_of_block,
    page_of_tokenizer,
)

HOST = "127.0.0.1"
_PATIENCE = 0.4
"""Seconds that a page waits for a job before it says that it waits."""
_HEADERS = {
    "Content-Security-Policy": f"{SERVED_POLICY}; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_KINDS = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "json": "application/json",
}


class _RefusedError(Exception):
    """What is answered instead of a page."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Answer:
    """What a request is answered with."""

    def __init__(self, text: str, kind: str = "html", status: HTTPStatus = HTTPStatus.OK) -> None:
        self.body, self.kind, self.status = text.encode(), kind, status
        self.location: str | None = None

    @classmethod
    def data(cls, value: Any, status: HTTPStatus = HTTPStatus.OK) -> "_Answer":
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return cls(text, "json", status)

    @classmethod
    def elsewhere(cls, page: str) -> "_Answer":
        answer = cls("", "html", HTTPStatus.SEE_OTHER)
        answer.location = page
        return answer


class Explorer(ThreadingHTTPServer):
    """Serves the pages of one run.

    Attributes:
        address: to be opened in a browser; whoever has it can read the run.
    """

    daemon_threads = True

    def __init__(self, opened: OpenedRun, port: int = 0) -> None:
        """Listen on a port of this machine; 0 takes a free one.

        Raises:
            OSError: the port is taken.
        """
        super().__init__((HOST, port), _Handler)
        self.token = secrets.token_urlsafe(24)
        self.site = _Site(opened)
        self.address = f"http://{HOST}:{self.server_port}/{self.token}/"

    def is_own(self, host: str | None) -> bool:
        """Whether a request is for this server by its own name."""
        return host in {f"{name}:{self.server_port}" for name in (HOST, "localhost")}


class _Handler(BaseHTTPRequestHandler):
    server: Explorer
    server_version, sys_version = "fusellm", ""

    def do_GET(self) -> None:
        """Answer with a page, or say why not."""
        try:
            answer = self._answer()
        except _RefusedError as refused:
            answer = _Answer(str(refused), "text", refused.status)
        try:
            self._send(answer)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the browser went to another page

    def _answer(self) -> _Answer:
        url = urlsplit(self.path)
        _, token, *rest = (url.path + "/").split("/")
        if not self.server.is_own(self.headers.get("Host")):
            raise _RefusedError(HTTPStatus.MISDIRECTED_REQUEST, "this server has another name")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise _RefusedError(HTTPStatus.FORBIDDEN, "the address lacks its token")
        if not url.path.endswith("/") and rest == [""]:
            return _Answer.elsewhere(f"/{token}/")  # else links would lead beside it
        name = "/".join(rest).strip("/")
        return self.server.site.answer(name, parse_qs(url.query, keep_blank_values=True))

    def _send(self, answer: _Answer) -> None:
        self.send_response(answer.status)
        kind = _KINDS.get(answer.kind, "text/plain")
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(answer.body)))
        if answer.location is not None:
            self.send_header("Location", answer.location)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, *_: Any) -> None:
        """Say nothing: the address has a token in it."""


class _Site:
    """What is answered to a name and a query."""

    def __init__(self, opened: OpenedRun) -> None:
        self._opened, self._pages = opened, Pages(opened)
        self._comparisons = {
            page_of_tokenizer(place): (place, source.name)
            for place, source in enumerate(opened.recipe.sources)
        }
        self._named: dict[str, Callable[[dict[str, list[str]]], _Answer]] = {
            "": self._index,
            "index.html": self._index,
            "go.html": lambda query: _Answer.elsewhere(page_of_block(_number(query, "block"))),
            "inspector.json": lambda _: _Answer.data(opened.inspector.start().told),
            "documents.json": lambda _: _Answer.data(opened.documents.start().told),
            "comparison.json": self._comparison_told,
            "position.json": self._position,
            "predictions.json": self._predictions,
            "view.css": lambda _: _Answer(asset("view.css"), "css"),
            "view.js": lambda _: _Answer(asset("view.js"), "js"),
        }

    def answer(self, name: str, query: dict[str, list[str]]) -> _Answer:
        """Answer a request; faults are pages, or JSON where JSON was asked for."""
        try:
            return self._known(name, query)
        except FusellmError as error:
            if name.endswith(".json"):
                return _Answer.data({"error": str(error)}, HTTPStatus.NOT_FOUND)
            shown = self._pages.fault("This cannot be shown", str(error))
            return _Answer(shown, status=HTTPStatus.NOT_FOUND)
        except Exception as error:  # a fault of one page does not end the others
            said, status = f"{type(error).__name__}: {error}", HTTPStatus.INTERNAL_SERVER_ERROR
            if name.endswith(".json"):
                return _Answer.data({"error": said}, status)
            return _Answer(self._pages.fault("This went wrong", said), status=status)

    def _known(self, name: str, query: dict[str, list[str]]) -> _Answer:
        if name in self._named:
            return self._named[name](query)
        if name in self._comparisons:
            place, source = self._comparisons[name]
            job = self._opened.comparison(source)
            waits = f"comparison.json?page={name}"
            return self._when_done(
                job, name, waits, lambda compared: self._pages.tokenizer(place, compared)
            )
        asked = fullmatch(r"block-(\d{1,18})(?:-answer-(\d{1,9}))?\.html", name)
        if asked:
            number, answer = int(asked[1]), None if asked[2] is None else int(asked[2])
            return self._when_done(
                self._opened.inspector,
                name,
                "inspector.json",
                lambda _: self._pages.block(self._opened.block(number, answer)),
            )
        raise StoreError(f"there is no page {name!r}")

    def _when_done(
        self, job: Job[Any], here: str, waits: str, page: Callable[[Any], str]
    ) -> _Answer:
        made = job.wait(_PATIENCE)
        if made is None:
            return _Answer(self._pages.waiting(here, job.told["what"], waits))
        return _Answer(page(made))

    def _index(self, query: dict[str, list[str]]) -> _Answer:
        documents, fault = None, ""
        try:
            documents = self._opened.documents.wait(_PATIENCE)
        except FusellmError as error:  # blocks of other shards can be looked at
            fault = str(error)
        self._opened.inspector.start()  # a block is what people look at next
        wanted = query.get("find", [""])[0]
        passages = None
        if wanted:
            passages = list(search_blocks(self._opened.run, wanted, PASSAGES))
        return _Answer(self._pages.index(documents, passages, wanted, fault))

    def _comparison_told(self, query: dict[str, list[str]]) -> _Answer:
        page = query.get("page", [""])[0]
        if page not in self._comparisons:
            raise StoreError(f"there is no page {page!r}")
        return _Answer.data(self._opened.comparison(self._comparisons[page][1]).told)

    def _position(self, query: dict[str, list[str]]) -> _Answer:
        number, position = _number(query, "block"), _number(query, "position")
        return _Answer.data(self._opened.position(number, position, _answer_of(query)))

    def _predictions(self, query: dict[str, list[str]]) -> _Answer:
        if not self._opened.asks_models:
            raise StoreError("no model is asked: the explorer was started with --no-predictions")
        job = self._opened.predictions(_number(query, "block"), _answer_of(query))
        told = job.told
        if told["done"] and told["error"] is None:
            return _Answer.data(told | {"models": job.wait()})
        return _Answer.data(told)


def _number(query: dict[str, list[str]], name: str) -> int:
    given = query.get(name, [""])[0]
    if not fullmatch(r"\d{1,18}", given):
        raise StoreError(f"{name}={given!r} is no number from 0 on")
    return int(given)


def _answer_of(query: dict[str, list[str]]) -> int | None:
    return _number(query, "answer") if "answer" in query else None
