"""POST /v1/embeddings: texts as vectors of unit length, the mean of what the head reads at their tokens."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import msgspec
import torch
from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from torch import Tensor

from retnet.engine.engine import PREFILL_TOKENS
from retnet.serve.bodies import EmbeddingBody
from retnet.serve.documents import documented, read
from retnet.serve.errors import ApiError
from retnet.serve.gate import shut_down
from retnet.serve.service import TIMEOUT, Service, service_of
from retnet.serve.streaming import answer

router = APIRouter()


@router.post("/v1/embeddings", **documented(EmbeddingBody, "Texts as vectors"))
async def embeddings(request: HttpRequest) -> Response:
    """A vector of `d_model` numbers for each input: the mean over its tokens of the last norm's output, scaled to length 1.

    The document's beginning (BOS) is put before a text and counts; token ids are read as they are.
    """
    service, body = service_of(request), await read(request, EmbeddingBody)
    inputs = await _inputs(service, body)

    async def work() -> bytes:
        try:
            async with asyncio.timeout(service.settings.timeout):
                vectors = [await embed(service, tokens) for tokens in inputs]
        except TimeoutError:
            raise ApiError(504, TIMEOUT.format(service.settings.timeout), code="timeout") from None
        data = [
            {"object": "embedding", "index": number, "embedding": _written(vector, body.encoding_format)}
            for number, vector in enumerate(vectors)
        ]
        tokens = sum(map(len, inputs))
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return msgspec.json.encode({"object": "list", "data": data, "model": service.name, "usage": usage})

    with service.gate.enter(1, lambda: None):  # who reads looks whether it is to end
        return await answer(request, service.metrics, work())


async def embed(service: Service, tokens: list[int]) -> Tensor:
    """The vector of a text's tokens, fp32 [D]; read in pieces between the engine's steps, so that streams go on."""
    model, total = service.model, torch.zeros(service.model.config.d_model, dtype=torch.float64)
    weight = model.embedding.weight
    state: Any = model.init_state(1, device=weight.device, dtype=weight.dtype)

    @torch.inference_mode()
    def piece(ids: list[int]) -> None:
        nonlocal state, total
        x, state = model.read(torch.tensor([ids], device=weight.device), state)
        total += x[0].double().sum(0).cpu()

    for start in range(0, len(tokens), PREFILL_TOKENS):
        if service.gate.ended:
            raise shut_down("the server is shutting down and had no time left for this; ask again")
        ids = tokens[start : start + PREFILL_TOKENS]
        await service.engine.call(lambda engine, ids=ids: piece(ids))  # type: ignore[misc]  # mypy infers no lambda with a default
    if not bool(torch.isfinite(total).all()):
        raise ApiError(500, "the model's numbers are not finite; its weights may be damaged")
    vector: Tensor = total / total.norm().clamp_min(1e-30)
    return vector.float()


async def _inputs(service: Service, body: EmbeddingBody) -> list[list[int]]:
    """Token ids of each input."""
    given: Any = body.input
    several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    found = []
    for each in several:
        if each == "":
            raise ApiError(400, "input has an empty text, which has no vector; leave it out", param="input")
        ids = each if isinstance(each, list) else [service.tokenizer.bos_id, *await service.encode(each)]
        service.check_tokens(len(ids), 1, param="input")
        if max(ids) >= service.tokenizer.vocab_size:
            last = service.tokenizer.vocab_size - 1
            raise ApiError(
                400, f"input has the token id {max(ids)}, but the vocabulary ends with {last}", param="input"
            )
        found.append(ids)
    return found


def _written(vector: Tensor, form: str) -> list[float] | str:
    """As OpenAI's API has it: numbers, or fp32 in little-endian order as base64."""
    if form == "base64":
        return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode("ascii")
    numbers: list[float] = vector.tolist()
    return numbers
