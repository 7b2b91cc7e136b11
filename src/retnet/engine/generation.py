"""Text generation: `generate`, a loop over the engine that continues prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from retnet.engine.engine import SLOTS, Engine
from retnet.engine.requests import Completion, Event, Request, require_whole
from retnet.engine.sampling import Sampling
from retnet.settings import UserError

if TYPE_CHECKING:
    from retnet.data import Tokenizer
    from retnet.engine.decoder import Decoder
    from retnet.model import LanguageModel


def generate(
    model: LanguageModel | Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    stop: Sequence[str] = (),
    seed: int = 0,
    samples: int = 1,
    on_text: Callable[[Event], None] | None = None,
) -> list[list[Completion]]:
    """Continues prompts and returns, for each, its completions.

    Args:
        model: in evaluation mode, or a decoder of one.
        tokenizer: of the same vocabulary.
        prompts: texts, each read as a document from its beginning.
        max_tokens: the most tokens to generate for each completion.
        sampling: how tokens are chosen.
        stop: strings that end a text, and are not part of it.
        seed: where all chance comes from.
        samples: completions of each prompt.
        on_text: sees every event as it happens; `Event.request` is the number of the prompt.

    Raises:
        UserError: a value outside its range, or a model whose logits are not finite numbers.
        ValueError: a model in training mode.
    """
    if isinstance(prompts, str):
        raise UserError("prompts must be a list of strings, got one string")
    requests = [
        Request(prompt, max_tokens=max_tokens, sampling=sampling, stop=stop, seed=seed, samples=samples)
        for prompt in prompts
    ]
    require_whole("samples", samples, 1)
    engine = Engine(model, tokenizer, slots=max(1, min(SLOTS, len(requests) * samples)))
    for request in requests:
        engine.submit(request)
    done: dict[tuple[int, int], Completion] = {}
    for event in engine.events():
        if on_text is not None:
            on_text(event)
        if event.completion is not None:
            done[event.request, event.sample] = event.completion
    return [[done[p, s] for s in range(samples)] for p in range(len(requests))]
