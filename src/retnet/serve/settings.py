"""Settings of the server: slots, memory and limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from retnet.settings import At, Checked, Count


@dataclass(frozen=True)
class ServerSettings(Checked):
    """What the server gives to whom, and when it says no.

    Attributes:
        slots: texts that are generated at once; more wait in the queue.
        queue: texts that may wait for a slot; beyond that a request is answered with 429 and Retry-After.
        max_state_bytes: bytes the states of running texts may take. None is what all slots come to.
        cache_bytes: bytes of states kept in memory for sessions and for prompts that begin alike.
        exact: the same bits whatever else is served: prompts are read alone, which costs throughput.
        max_tokens: the most tokens that one text may ask for.
        max_prompt_tokens: the most tokens of one prompt or session.
        max_body_bytes: the largest body of a request.
        max_sessions: the most sessions at once.
        timeout: seconds a request may take, waiting included.
        shutdown_seconds: seconds that running texts may still take after SIGTERM; a second signal ends them at once.
    """

    slots: Count = 64
    queue: Annotated[int, At(least=0)] = 256
    max_state_bytes: Count | None = None
    cache_bytes: Count = 1_073_741_824
    exact: bool = False
    max_tokens: Count = 65_536
    max_prompt_tokens: Count = 1_048_576
    max_body_bytes: Count = 16_777_216
    max_sessions: Count = 1_000
    timeout: Annotated[float, At(above=0)] = 600.0
    shutdown_seconds: Annotated[float, At(least=0)] = 30.0
