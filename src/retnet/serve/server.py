"""Running the application: a socket, uvicorn, and signals that end it in order, or at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI

from retnet.errors import reason_of
from retnet.serve.connections import WatchedConnection, most_connections
from retnet.serve.service import Service
from retnet.settings import UserError

BACKLOG = 2048  # connections that wait, as uvicorn has it
GRACE = 5  # seconds beyond `shutdown_seconds`, for answers to be written
KEEP_ALIVE = (
    75  # seconds; uvicorn's 5 are httpx's too, whose clients then ask as their connection is being closed
)
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_log = logging.getLogger("retnet.serve")


def listen(host: str, port: int) -> socket.socket:
    """A socket that nothing else has; port 0 is any that is free. Clients that come early wait until the server is ready.

    Raises:
        UserError: the address cannot be used.
    """
    if not host:
        raise UserError(
            "--host is empty; 0.0.0.0 is every address of this machine, 127.0.0.1 this machine alone"
        )
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(BACKLOG)  # two sockets may have an address until one of them listens
    except (OSError, UnicodeError) as error:
        why = reason_of(error)
        raise UserError(
            f"cannot listen at {host} port {port}: {why}; choose another --host or --port"
        ) from None
    return found


def url_of(found: socket.socket, host: str) -> str:
    """Where a browser finds it."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{found.getsockname()[1]}"


class OrderlyServer(uvicorn.Server):
    """Uvicorn with our signals.

    The first lets nobody new in, gives what runs `shutdown_seconds`, ends the rest with an error that says so, and writes
    the states of sessions. The second ends everything at once.

    Args:
        config: of uvicorn.
        service: what is served.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Takes the place of uvicorn's, which would raise the signal once more at the end."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._heard)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def _heard(self) -> None:
        gate, seconds = self._service.gate, self._service.settings.shutdown_seconds
        if self.should_exit:
            self.force_exit = True
            gate.end_all()
            return
        _log.info("shutting down: %d texts have %g seconds to end", gate.texts, seconds)
        gate.close()
        self.should_exit = True
        asyncio.get_running_loop().call_later(seconds, gate.end_all)


def config_of(app: FastAPI) -> uvicorn.Config:
    """How uvicorn runs the application."""
    service: Service = app.state.service
    connection: Any = partial(WatchedConnection, most=most_connections())
    return uvicorn.Config(
        app,
        http=connection,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(service.settings.shutdown_seconds) + GRACE,
        timeout_keep_alive=KEEP_ALIVE,
        ws="none",
        lifespan="on",
    )


def serve(app: FastAPI, found: socket.socket) -> bool:
    """Answers requests until a signal; whether that was an end in order."""
    server = OrderlyServer(config_of(app), app.state.service)
    server.run(sockets=[found])
    return server.started and not server.force_exit
