"""The load generator of `retnet bench serve`: streams of OpenAI's API, each event timed as it arrives; run as a file.

It imports nothing of this package, so that it is a client like any other, in a process of its own. Every line of stdin is
a job as JSON, answered by a line on stdout: streams that begin together, each one request after the other, or the turns of
one conversation. It ends when stdin does.

A client on the machine that it measures takes from the servers what it needs itself. So it does nothing with what arrives
but note the time; HTTP (by httptools, uvicorn's own parser) and JSON are read when a stream has ended.
"""

import asyncio
import gc
import json
import sys
import time
from typing import Any
from urllib.parse import urlsplit

import httptools

Told = dict[str, Any]


class Receiver(asyncio.Protocol):
    """What one connection brings, with the times; `ended` is done when the server has closed it."""

    def __init__(self) -> None:
        self.pieces: list[tuple[float, bytes]] = []
        self.ended = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio."""
        if not self.ended.done():
            self.ended.set_result(error)


class Answer:
    """An HTTP answer, parsed from what has arrived; `lines` are those of its body, each with the time it was whole.

    Args:
        pieces: bytes as they came, each with its time.
    """

    def __init__(self, pieces: list[tuple[float, bytes]]) -> None:
        self.lines: list[tuple[float, bytes]] = []
        self._rest, self._now, self.whole = b"", 0.0, False
        parser = httptools.HttpResponseParser(self)
        for self._now, data in pieces:
            parser.feed_data(data)
        self.status = parser.get_status_code() if pieces else 0

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        *whole, self._rest = (self._rest + body).split(b"\n")
        self.lines += [(self._now, line) for line in whole]

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self.lines.append((self._now, self._rest))
        self.whole = True


async def ask(url: str, content: bytes, seconds: float, zero: float) -> Told:
    """Sends one request and reads its stream to the end: when what of it arrived, in seconds since `zero`."""
    place = urlsplit(url)
    head = f"POST {place.path} HTTP/1.1\r\nHost: {place.netloc}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    begin = time.perf_counter()
    try:
        async with asyncio.timeout(seconds):
            loop = asyncio.get_running_loop()
            transport, receiver = await loop.create_connection(
                Receiver, place.hostname or "", place.port or 80
            )
            try:
                transport.write(head.encode() + content)
                await receiver.ended
            finally:
                transport.close()
        answer = Answer(receiver.pieces)
    except (OSError, TimeoutError, httptools.HttpParserError) as error:
        return {"error": f"{type(error).__name__} {error}"}
    lines = [(at - zero, line) for at, line in answer.lines]
    if answer.status != 200 or not answer.whole:
        said = b" ".join(line for _, line in lines).decode(errors="replace")
        return {"error": f"status {answer.status}{'' if answer.whole else ', cut short'}: {said[:300]}"}
    return {"begin": begin - zero, **told(lines)}


def told(lines: list[tuple[float, bytes]]) -> Told:
    """What the events of a stream said, when those with text arrived, and how many characters each of them had."""
    arrivals: list[float] = []
    parts: list[str] = []
    usage: Told = {}
    for at, line in lines:
        content = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or content == b"[DONE]":
            continue
        event = json.loads(content)
        if "error" in event:
            return {"error": str(event["error"])[:300]}
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            text = choice["text"] if "text" in choice else choice.get("delta", {}).get("content")
            if text:
                arrivals.append(at)
                parts.append(text)
    return {
        "arrivals": arrivals,
        "sizes": [len(part) for part in parts],
        "text": "".join(parts),
        "read": usage.get("prompt_tokens"),
        "written": usage.get("completion_tokens", len(arrivals)),
    }


async def work(job: Told) -> list[Told]:
    """The answers of a job, one stream's after the other's: to the bodies of each of its `streams`, or to its `turns`."""
    if "turns" in job:
        return await converse(job)
    streams = [[json.dumps(body).encode() for body in bodies] for bodies in job["streams"]]
    zero = time.perf_counter()

    async def answers(bodies: list[bytes]) -> list[Told]:
        return [await ask(job["url"], body, job["seconds"], zero) for body in bodies]

    return [answer for each in await asyncio.gather(*map(answers, streams)) for answer in each]


async def converse(job: Told) -> list[Told]:
    """One conversation, its answers part of what is asked next."""
    messages: list[Told] = []
    answers: list[Told] = []
    for text in job["turns"]:
        messages.append({"role": "user", "content": text})
        body = json.dumps({**job["body"], "messages": messages}).encode()
        answer = await ask(job["url"], body, job["seconds"], time.perf_counter())
        answers.append(answer)
        if "error" in answer:
            break
        messages.append({"role": "assistant", "content": answer["text"]})
    return answers


def main() -> None:
    """Works off jobs until stdin ends."""
    for line in sys.stdin:
        gc.disable()  # a pause of ours would be taken for one of the server's
        answers = asyncio.run(work(json.loads(line)))
        gc.enable()
        print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
