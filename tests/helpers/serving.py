"""What clients do."""

import json
import socket
import time
from contextlib import contextmanager


def stream(http, url, body):
    """The events of a stream, which ends with `[DONE]`."""
    events = []
    with http.stream("POST", url, json={**body, "stream": True}) as response:
        if response.status_code != 200:
            response.read()
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line:
                assert line.startswith("data: ")
                events.append(line.removeprefix("data: "))
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def joined(events, index=0):
    choices = [choice for event in events for choice in event.get("choices", []) if choice["index"] == index]
    return "".join(c["text"] if "text" in c else c["delta"].get("content") or "" for c in choices)


def refused(response, status=400, param=None):
    """The sentence of an error in OpenAI's envelope."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    assert len(error["message"]) > 10
    if param is not None:
        assert error["param"] == param
    return error["message"]


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


def request(body, path="/v1/completions", length=None):
    """A request as bytes."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {length or len(content)}\r\n\r\n".encode() + content


@contextmanager
def not_reading(server, content):
    """A client that sends a request and reads nothing, with the least that the system keeps for it."""
    server.found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # of connections made from now on
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        connection.settimeout(20)
        connection.connect(server.found.getsockname())
        server.found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
        connection.sendall(content)
        yield connection
