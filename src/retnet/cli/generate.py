"""`retnet generate`: continue prompts with a trained run."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import click

from retnet.cli.options import HomeText, opening, options
from retnet.errors import UserError, told
from retnet.io import read_stream, read_text

if TYPE_CHECKING:
    from retnet.engine import Completion, Event, Stats

INTERRUPTED = 130  # what shells report for a process ended by Ctrl-C


@click.command()
@click.argument("run", type=HomeText())
@click.option("--prompt", "prompts", multiple=True, help="Text to continue; may be given several times.")
@click.option(
    "--prompt-file",
    type=HomeText(),
    help="File with the text to continue; - is standard input, also without any prompt.",
)
@click.option("--prompt-lines", is_flag=True, help="Each line of the file or of standard input is a prompt.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Most tokens to add."
)
@options(
    "retnet.engine.sampling:Sampling",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
@click.option("--stop", multiple=True, help="End a text before this string; may be given several times.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same seed, the same text."
)
@click.option(
    "--samples", type=click.IntRange(1, 1 << 16), default=1, show_default=True, help="Texts for each prompt."
)
@opening
@click.option("--weights", help="int8: round them, for faster decoding on a CPU. [default: as --dtype says]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line, a line for each text.")
@click.option("--stats", is_flag=True, help="Print tokens, seconds and speed to standard error.")
def command(
    run: str,
    prompts: tuple[str, ...],
    prompt_file: str | None,
    prompt_lines: bool,
    max_tokens: int,
    stop: tuple[str, ...],
    seed: int,
    samples: int,
    checkpoint: str | None,
    device: str,
    dtype: str | None,
    weights: str | None,
    as_json: bool,
    stats: bool,
    **chances: float,
) -> None:
    """Continue prompts with RUN, a run directory or one of its checkpoints.

    A single text appears as it is made; several are printed one after another, each under a heading. Only
    what the model adds is printed. With no prompt at all it writes from the beginning of a text. One
    newline at the end of a prompt file or of standard input is not part of the prompt.
    """
    texts = _prompts(prompts, prompt_file, prompt_lines)

    from retnet.engine import SLOTS, Engine, Request, Sampling, open_run

    sampling = Sampling(**chances)  # type: ignore[arg-type]  # click has their types
    opened = open_run(run, checkpoint=checkpoint, device=device, dtype=dtype, weights=weights)
    if checkpoint is None and opened.chosen == "last":
        click.echo(f"no best checkpoint yet: using last ({opened.checkpoint.name})", err=True)
    engine = Engine(opened.model, opened.tokenizer, slots=min(SLOTS, len(texts) * samples))
    for text in texts:
        engine.submit(
            Request(text, max_tokens=max_tokens, sampling=sampling, stop=stop, seed=seed, samples=samples)
        )
    show: AsMade | InOrder
    if as_json:
        show = InOrder(len(texts), samples, lambda p, s, done: _json_line(texts[p], s, done))
    elif len(texts) * samples == 1:
        show = AsMade()
    else:
        show = InOrder(len(texts), samples, partial(_headed, prompts=len(texts), samples=samples))
    interrupted = False
    try:
        for event in engine.events():
            show.see(event)
    except KeyboardInterrupt:
        interrupted = True
        for request in range(len(texts)):
            engine.cancel(request)
        for event in engine.events():  # what there is of the texts that were under way
            show.see(event)
    if stats:
        click.echo(_speed(engine.stats), err=True)
    if interrupted:
        sys.exit(INTERRUPTED)


def _prompts(prompts: tuple[str, ...], file: str | None, lines: bool) -> list[str]:
    """The prompts of the command line, followed by those of the file or of standard input."""
    if file is None and not prompts and (sys.stdin is None or not sys.stdin.isatty()):
        file = "-"
    if file is None:
        if lines:
            raise UserError("--prompt-lines needs --prompt-file, or prompts on standard input")
        return list(prompts or ("",))
    text = _standard_input() if file == "-" else read_text(file, f"--prompt-file {file}")
    text = text.replace("\r\n", "\n").removesuffix("\n")
    return [*prompts, *(text.split("\n") if lines else [text])]


def _standard_input() -> str:
    if sys.stdin is None:
        raise UserError("cannot read standard input: it is closed; give --prompt, or --prompt-file")
    with told("read standard input", "give --prompt, or --prompt-file"):
        return read_stream(sys.stdin.buffer, "standard input")


class AsMade:
    """Prints the one text there is as it is made; after Ctrl-C, also what waited to become a stop string."""

    def __init__(self) -> None:
        self._shown = 0

    def see(self, event: Event) -> None:
        """Prints what is new: at the end all that was not printed, for an interrupt may have swallowed an event."""
        text = event.text if event.completion is None else event.completion.text[self._shown :]
        self._shown += len(text)
        _write(text if event.completion is None else text + "\n")


class InOrder:
    """Prints each text once it and those before it are complete; after Ctrl-C, what there is of the others.

    Args:
        prompts: how many.
        samples: of each.
        form: what to print for a prompt's number, a sample's number (both from 0) and what became of it.
    """

    def __init__(self, prompts: int, samples: int, form: Callable[[int, int, Completion], str]) -> None:
        self._order = deque((p, s) for p in range(prompts) for s in range(samples))
        self._done: dict[tuple[int, int], Completion] = {}
        self._form = form

    def see(self, event: Event) -> None:
        """Prints what can be printed now."""
        if event.completion is not None:
            self._done[event.request, event.sample] = event.completion
        while self._order and self._order[0] in self._done:
            place = self._order.popleft()
            completion = self._done.pop(place)
            if completion.finish != "interrupted" or completion.tokens:
                _write(self._form(*place, completion))


def _headed(prompt: int, sample: int, done: Completion, *, prompts: int, samples: int) -> str:
    name = [f"prompt {prompt + 1}"] * (prompts > 1) + [f"sample {sample + 1}"] * (samples > 1)
    ending = {"stop": "stop string", "end": "end of text", "length": "token limit"}.get(done.finish)
    count = f"{len(done.tokens)} token{'s' * (len(done.tokens) != 1)}"
    return f"=== {', '.join(name)} ({count}, {ending or done.finish}) ===\n{done.text}\n"


def _json_line(prompt: str, sample: int, done: Completion) -> str:
    line = {
        "prompt": prompt,
        "sample": sample,
        "text": done.text,
        "finish": done.finish,
        "prompt_tokens": done.prompt_tokens,
        "tokens": len(done.tokens),
    }
    return json.dumps(line, ensure_ascii=False) + "\n"


def _write(text: str) -> None:
    """To standard output at once, as UTF-8 whatever the locale."""
    sys.stdout.buffer.write(text.encode("utf-8"))
    sys.stdout.buffer.flush()


def _speed(stats: Stats) -> str:
    def line(name: str, tokens: int, seconds: float) -> str:
        rate = f"{tokens / seconds:,.0f}" if seconds > 0 else "-"
        return f"{name}: {tokens:,} tokens in {seconds:.3f} s ({rate} tokens/s)"

    return "\n".join(
        (
            line("prefill", stats.prefill_tokens, stats.prefill_seconds),
            line("decode", stats.decode_tokens, stats.decode_seconds),
        )
    )
