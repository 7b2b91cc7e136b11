"""Access: API keys from a file, pages of other origins refused, bodies of limited size."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from retnet.io import read_text
from retnet.serve.errors import ApiError
from retnet.settings import UserError

OPEN = frozenset({"/", "/health", "/ready", "/metrics", "/openapi.json"})  # and the playground's files
SHORTEST_KEY = 8  # characters
BODY_SECONDS = 60  # in which a body has to arrive
NOBODY = ""  # whose everything is where there are no keys


class ApiKeys:
    """The keys that may use the server; none means that everybody may.

    Keys are known by their SHA-256, and compared in constant time: all of them, to the end, whatever is sent.

    Args:
        keys: texts of at least `SHORTEST_KEY` characters.
    """

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def read(cls, path: str | Path) -> ApiKeys:
        """One key a line; empty lines and those that begin with # do not count.

        Raises:
            UserError: the file cannot be read, has no key, or a short one.
        """
        lines = [line.strip() for line in read_text(path, f"--api-key-file {path}").splitlines()]
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise UserError(f"--api-key-file {path} has no keys; write one a line, or leave the option out")
        if short := [key for key in keys if len(key) < SHORTEST_KEY]:
            raise UserError(
                f"--api-key-file {path} has a key of {len(short[0])} characters; keys have at least {SHORTEST_KEY}"
            )
        if any(not key.isprintable() for key in keys):
            raise UserError(
                f"--api-key-file {path} has a key with a control character, which no request can carry"
            )
        return cls(keys)

    def owner(self, sent: bytes | None) -> str | None:
        """Who sent this: a name of the key that says nothing about it; None where the key is not one of these."""
        if not self._digests:
            return NOBODY
        digest = hashlib.sha256(sent or b"").digest()
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        return hashlib.sha256(b"owner " + digest).hexdigest()[:32] if any(found) else None


class AccessMiddleware:
    """Lets in who has a key, and no page of another origin; ``scope["state"]["owner"]`` is whose request it is.

    Args:
        app: what is protected, but for the paths in `OPEN`, and `files`.
        keys: that are known.
        files: paths that are open too.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, files: Iterable[str] = ()) -> None:
        self._app, self._keys, self._open = app, keys, OPEN | {*files}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http" and (refusal := self._refusal(scope)) is not None:
            await refusal.response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        origin = headers.get(b"origin")
        if origin is not None and not _same_origin(origin, headers.get(b"host", b"")):
            return ApiError(
                403, "pages of other origins may not use this server; send the request from a program"
            )
        if scope["path"] in self._open:
            return None
        word, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        sent = bearer.strip() if word.lower() == b"bearer" else headers.get(b"x-api-key")
        owner = self._keys.owner(sent)
        if owner is None:
            what = "no API key was sent" if sent is None else "this API key is not known"
            return ApiError(
                401, f"{what}; send a known one as 'Authorization: Bearer KEY'", code="invalid_api_key"
            )
        scope.setdefault("state", {})["owner"] = owner
        return None


def _same_origin(origin: bytes, host: bytes) -> bool:
    try:
        return urlsplit(origin.decode("ascii")).netloc.lower() == host.decode("ascii").lower()
    except ValueError:
        return False


async def read_body(request: Request, most: int, kind: str) -> bytes:
    """The body of a request.

    Args:
        request: whose body has not been read.
        most: bytes.
        kind: the content type it has to have.

    Raises:
        ApiError: it is larger, takes longer than `BODY_SECONDS`, or has another type.
    """
    sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if sent != kind:
        raise ApiError(415, f"the body is {sent[:80] or 'of no type'}; send it with 'Content-Type: {kind}'")
    too_large = ApiError(413, f"the body has more than the {most:,} bytes that this server takes")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > most:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS} seconds") from None
    return b"".join(parts)
