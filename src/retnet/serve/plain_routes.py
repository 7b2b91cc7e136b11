"""Models, tokens, health, metrics and the playground's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from retnet.serve.bodies import DetokenizeBody, TokenizeBody
from retnet.serve.documents import documented, read
from retnet.serve.errors import ApiError
from retnet.serve.metrics import CONTENT_TYPE
from retnet.serve.service import Service, service_of
from retnet.settings import UserError

router = APIRouter()
PAGE = Path(__file__).with_name("playground")
SCRIPTS = ("playground.js", "conversation.js", "requests.js", "views.js")
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/playground.css": ("playground.css", "text/css; charset=utf-8"),
    **{f"/{name}": (name, "text/javascript; charset=utf-8") for name in SCRIPTS},
}
# What the page may do: nothing but talk to this server.
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:"


@router.get("/v1/models", summary="List models", response_model=None)
async def models(request: HttpRequest) -> Response:
    """The one model there is."""
    return _json({"object": "list", "data": [_model(service_of(request))]})


@router.get("/v1/models/{model:path}", summary="Show a model", response_model=None)
async def model(request: HttpRequest, model: str) -> Response:
    """The one model there is, by its name."""
    service = service_of(request)
    service.check_model(model)
    return _json(_model(service))


@router.post("/tokenize", **documented(TokenizeBody, "Text to token ids"))
async def tokenize(request: HttpRequest) -> Response:
    """The ids of a text."""
    service, body = service_of(request), await read(request, TokenizeBody)
    ids = await service.encode(body.prompt)
    if body.add_special_tokens:
        ids = [service.tokenizer.bos_id, *ids]
    return _json({"tokens": ids, "count": len(ids), "max_model_len": service.settings.max_prompt_tokens})


@router.post("/detokenize", **documented(DetokenizeBody, "Token ids to text"))
async def detokenize(request: HttpRequest) -> Response:
    """The text of ids; special ones have none."""
    service, body = service_of(request), await read(request, DetokenizeBody)
    size = service.tokenizer.vocab_size
    if body.tokens and max(body.tokens) >= size:
        raise UserError(
            f"tokens has the token id {max(body.tokens)}, but the vocabulary ends with {size - 1}"
        )
    return _json({"prompt": await service.decode(body.tokens)})


@router.get("/health", summary="Whether the process lives", response_model=None)
async def health(request: HttpRequest) -> Response:
    """Always 200."""
    return _json({"status": "alive"})


@router.get("/ready", summary="Whether it can serve", response_model=None)
async def ready(request: HttpRequest) -> Response:
    """200 when it can serve; 503 before the model has said its first token, after a failure, and during shutdown."""
    why = service_of(request).why_not_ready()
    if why:
        raise ApiError(503, why, retry_after=1)
    return _json({"status": "ready"})


@router.get(
    "/metrics", summary="Metrics for Prometheus", response_model=None, response_class=PlainTextResponse
)
async def metrics(request: HttpRequest) -> Response:
    """Counters, gauges and histograms as text."""
    service = service_of(request)
    service.metrics.sessions.set(len(service.sessions))
    return Response(service.metrics.text(), media_type=CONTENT_TYPE)


async def page(request: HttpRequest) -> Response:
    """The playground."""
    name, kind = FILES[request.url.path]
    headers = {
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response((PAGE / name).read_bytes(), media_type=kind, headers=headers)


for _path in FILES:
    router.add_api_route(_path, page, methods=["GET"], include_in_schema=False, response_model=None)


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "retnet",
        "vocab_size": service.tokenizer.vocab_size,
        "state_bytes": service.state_bytes,
        "state_grows": service.state_grows,
        "max_tokens": service.settings.max_tokens,
        "max_prompt_tokens": service.settings.max_prompt_tokens,
        "chat_template": "plain" if service.template.source is None else "of the model",
    }


def _json(value: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
