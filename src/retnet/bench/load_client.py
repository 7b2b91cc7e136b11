"""The load generator of `retnet bench serve`: streams of OpenAI's API, each event timed as it arrives; run as a file.

It imports nothing of this package, so that it is a client like any other, in a process of its own. Every line of stdin is
a job as JSON, answered by a line on stdout: requests that begin together, or the turns of one conversation, one after the
other. Events are parsed when all have arrived, so that a fast server is not held up. It ends when stdin does.
"""

import asyncio
import gc
import json
import sys
import time
from typing import Any

import aiohttp

HEADERS = {"Content-Type": "application/json"}
Told = dict[str, Any]


async def ask(session: aiohttp.ClientSession, url: str, body: bytes, zero: float) -> Told:
    """Sends one request and reads its stream to the end: when what of it arrived, in seconds since `zero`."""
    begin, times, lines = time.perf_counter(), [], []
    try:
        async with session.post(url, data=body, headers=HEADERS) as answer:
            if answer.status != 200:
                return {"error": f"status {answer.status}: {(await answer.text())[:300]}"}
            async for line in answer.content:
                if line.startswith(b"data:"):
                    times.append(time.perf_counter() - zero)
                    lines.append(line)
    except (aiohttp.ClientError, TimeoutError) as error:
        return {"error": f"{type(error).__name__} {error}"}
    return {"begin": begin - zero, **told(times, lines)}


def told(times: list[float], lines: list[bytes]) -> Told:
    """What the events of a stream said, and when those with text arrived."""
    arrivals: list[float] = []
    parts: list[str] = []
    usage: Told = {}
    for at, line in zip(times, lines, strict=True):
        content = line[5:].strip()
        if content == b"[DONE]":
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
        "text": "".join(parts),
        "read": usage.get("prompt_tokens"),
        "written": usage.get("completion_tokens", len(arrivals)),
    }


async def work(job: Told) -> list[Told]:
    """The answers of a job: of its `bodies`, sent together, or of its `turns`, each with all that was said before."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=job["seconds"])
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        if "turns" in job:
            return await converse(session, job)
        bodies, zero = [json.dumps(body).encode() for body in job["bodies"]], time.perf_counter()
        return await asyncio.gather(*(ask(session, job["url"], body, zero) for body in bodies))


async def converse(session: aiohttp.ClientSession, job: Told) -> list[Told]:
    """One conversation, its answers part of what is asked next."""
    messages: list[Told] = []
    answers: list[Told] = []
    for text in job["turns"]:
        messages.append({"role": "user", "content": text})
        body = json.dumps({**job["body"], "messages": messages}).encode()
        answer = await ask(session, job["url"], body, time.perf_counter())
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
