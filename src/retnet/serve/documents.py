"""OpenAPI: bodies are read by us, so that limits and errors are ours, and described to the framework here."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.requests import Request as HttpRequest

from retnet.serve.access import read_body
from retnet.serve.bodies import StrictBody, parse
from retnet.serve.service import service_of

Body = TypeVar("Body", bound=StrictBody)
JSON, BYTES, EVENTS = "application/json", "application/octet-stream", "text/event-stream"
_documented: set[type[StrictBody]] = set()  # by the routes, as they are defined
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_EVENT = {  # server-sent, each of them
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
}


async def read(request: HttpRequest, kind: type[Body]) -> Body:
    """The body of a request.

    Raises:
        ApiError: it is too large, no JSON, a field of it is wrong, or it names another model.
    """
    service = service_of(request)
    body = parse(kind, await read_body(request, service.settings.max_body_bytes, JSON))
    service.check_model(getattr(body, "model", None))
    return body


def documented(kind: type[StrictBody] | None, summary: str, *, status: int = 200) -> dict[str, Any]:
    """Arguments of a route that say in OpenAPI what it takes, bytes where `kind` is None, and that it may stream."""
    responses: dict[int, Any] = {}
    if kind is None:
        content = {BYTES: {"schema": {"type": "string", "format": "binary"}}}
    else:
        _documented.add(kind)
        content = {JSON: {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
        if "stream" in kind.model_fields:
            responses[status] = {"content": {EVENTS: {"schema": _EVENT}}}
    return {
        "summary": summary,
        "response_model": None,
        "status_code": status,
        "responses": responses,
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
    }


def install_openapi(app: FastAPI) -> None:
    """Lets /openapi.json have the schemas of our bodies and errors."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            template = "#/components/schemas/{model}"
            kinds = sorted(_documented, key=lambda kind: kind.__name__)
            _, found = models_json_schema([(kind, "validation") for kind in kinds], ref_template=template)
            components = schema.setdefault("components", {})
            components["schemas"] = found["$defs"] | {"Error": _ERROR}
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"key": []}, {}]
            wrong = {
                "description": "what is wrong",
                "content": {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}},
            }
            for path in schema["paths"].values():
                for verb in path.values():
                    verb["responses"].pop("422", None)
                    verb["responses"] |= {"4XX": wrong, "5XX": wrong}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation has it
