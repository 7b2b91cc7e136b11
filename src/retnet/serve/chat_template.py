"""Chat templates: conversation → tokens; that of the tokenizer's folder in a sandbox, else a plain one."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from retnet.data import Tokenizer
from retnet.serve.errors import ApiError
from retnet.settings import UserError

SECONDS = 2.0  # for a rendering
STARTUP_SECONDS = 20.0
LIMIT = 64 << 20  # bytes of an answer's line
PIECES = 1024  # of texts, whose ids are remembered: a conversation's next turn has all that were said
SHORT = 8192  # characters that they have at most
GUARD = "\ufdd0"  # a noncharacter of Unicode, for internal use by its definition
PLAIN = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}


class ChatTurn(NamedTuple):
    """A message: who says what."""

    role: str
    text: str


class Rendered(NamedTuple):
    """A conversation as a prompt.

    Attributes:
        tokens: ids, BOS first.
        marks: positions where messages end, as far as they are known.
        stop: strings that end the answer.
        stop_tokens: ids that do.
    """

    tokens: list[int]
    marks: list[int]
    stop: tuple[str, ...]
    stop_tokens: tuple[int, ...]


class ChatTemplate:
    """Makes prompts of conversations.

    Special tokens are what the template writes; in what people say, their characters are characters.
    Without a template a message is the line "User: …", "Assistant: …" or "System: …", messages are parted by an empty
    line, and an answer ends where the next line of the user's would follow.

    Args:
        tokenizer: its ids.
        folder: with the tokenizer; ``chat_template.jinja`` or ``tokenizer_config.json`` may be there.

    Attributes:
        source: of the template; None for the plain one.

    Raises:
        UserError: these files cannot be read.
    """

    def __init__(self, tokenizer: Tokenizer, folder: Path) -> None:
        self._tokenizer, self._remembered = tokenizer, lru_cache(PIECES)(tokenizer.encode)
        added = json.loads(tokenizer.content)["added_tokens"]
        self._special = {each["content"]: each["id"] for each in added if each["special"]}
        config = _read_config(folder / "tokenizer_config.json")
        self.source = _find_source(folder, config)
        named = {
            name: _content(config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        self._named = {name: token for name, token in named.items() if token}
        self._stop_tokens = tuple(
            self._special[token] for token in (self._named.get("eos_token"),) if token in self._special
        )
        self._worker: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def render(self, turns: Sequence[ChatTurn]) -> Rendered:
        """The prompt that an answer to this conversation follows.

        Raises:
            ApiError: the template refuses it, fails, or takes too long.
        """
        if self.source is None:
            if sum(len(turn.text) for turn in turns) <= SHORT:
                return self._plain(turns)
            return await asyncio.to_thread(self._plain, turns)
        messages = [{"role": turn.role, "content": self._guarded(turn.text)} for turn in turns]
        text = await self._ask({"messages": messages, "add_generation_prompt": True, **self._named})
        tokens = await asyncio.to_thread(self._encode, text)
        if tokens[:1] != [self._tokenizer.bos_id]:
            tokens.insert(0, self._tokenizer.bos_id)
        return Rendered(tokens, [], (), self._stop_tokens)

    async def close(self) -> None:
        """Ends the process that renders."""
        worker, self._worker = self._worker, None
        if worker is not None and worker.returncode is None:
            worker.kill()
            await worker.wait()

    def _plain(self, turns: Sequence[ChatTurn]) -> Rendered:
        tokens, marks = [self._tokenizer.bos_id], []
        for turn in turns:
            # an answer begins with its own space: given back with it, it is the text that was generated
            space = "" if turn.text[:1].isspace() else " "
            tokens += self._ids(f"{PLAIN[turn.role]}:{space}{turn.text}\n\n")
            marks.append(len(tokens))
        tokens += self._ids("Assistant:")
        return Rendered(tokens, marks, ("\n\nUser:",), ())

    def _guarded(self, text: str) -> str:
        """A text in which no special token's characters stand together."""
        if GUARD in text:
            raise ApiError(400, "messages has U+FDD0, which is no character of a text", param="messages")
        for token in self._special:
            text = text.replace(token, token[:1] + GUARD + token[1:])
        return text

    def _encode(self, text: str) -> list[int]:
        """The ids of a rendered text: special tokens as what they are, the rest as the text that it is."""
        pieces: list[str | int] = [text]
        for token, number in sorted(self._special.items(), key=lambda item: -len(item[0])):
            pieces = [part for piece in pieces for part in _split(piece, token, number)]
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
            elif piece:
                ids += self._ids(piece.replace(GUARD, ""))
        return ids

    def _ids(self, text: str) -> list[int]:
        """The ids of a text, which nobody changes."""
        return self._remembered(text) if len(text) <= SHORT else self._tokenizer.encode(text)

    async def _ask(self, variables: dict[str, Any]) -> str:
        """The text that the worker makes; a worker that is late, or gone, is replaced at the next call."""
        async with self._turn:
            try:
                if self._worker is None or self._worker.returncode is not None:
                    self._worker = await _start()
                    try:
                        await _exchange(self._worker, self.source, STARTUP_SECONDS)
                    except ApiError:  # it cannot be read, now or ever
                        await self.close()
                        raise
                return await _exchange(self._worker, variables, SECONDS)
            except TimeoutError:
                await self.close()
                raise ApiError(
                    400, f"the chat template takes more than {SECONDS:g} seconds for these messages"
                ) from None
            except (ConnectionError, ValueError, asyncio.IncompleteReadError):
                await self.close()
                raise ApiError(400, "the chat template takes too much memory for these messages") from None
            except asyncio.CancelledError:
                await self.close()  # its answer would be taken for the next one's
                raise


async def _start() -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    worker = str(Path(__file__).with_name("template_worker.py"))
    return await asyncio.create_subprocess_exec(
        sys.executable, "-I", worker, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL, limit=LIMIT
    )


async def _exchange(worker: asyncio.subprocess.Process, value: Any, seconds: float) -> str:  # noqa: ANN401
    assert worker.stdin is not None
    assert worker.stdout is not None
    async with asyncio.timeout(seconds):
        worker.stdin.write(json.dumps(value).encode() + b"\n")
        await worker.stdin.drain()
        answer = json.loads(await worker.stdout.readuntil(b"\n"))
    if "error" in answer:
        raise ApiError(400, answer["error"], param="messages")
    return str(answer["text"])


def _split(piece: str | int, token: str, number: int) -> list[str | int]:
    if isinstance(piece, int) or token not in piece:
        return [piece]
    parts: list[str | int] = []
    for part in piece.split(token):
        parts += [part, number]
    return parts[:-1]


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} holds no JSON object")
    return config


def _find_source(folder: Path, config: dict[str, Any]) -> str | None:
    """The template beside a tokenizer: a file of its own, or in its configuration, alone or under the name "default"."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {file}: {error}") from None
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _content(token: Any) -> str:  # noqa: ANN401
    """The text of a token, as configurations write it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""
