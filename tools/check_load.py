"""Does another load tool see what the load generator of `retnet bench serve` sees? guidellm and it ask one server in turns.

    python -m venv guide && guide/bin/pip install guidellm==0.8.1
    python -m tools.check_load guide/bin/guidellm             # 4 streams, 128 tokens of context, 256 to write

guidellm takes more than a gigabyte and pins of its own, so it lives in an environment of its own. Each stream of either
asks its next prompt when its last answer has ended. The server has one half of the cores, whoever asks the other: else what
a load tool takes itself is seen as the server's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console

from retnet.bench import served
from retnet.bench.load import LoadSample, generator
from retnet.settings import UserError, config_path, load
from retnet.tables import Table, print_table
from retnet.train.config import RunConfig

Numbers = Mapping[str, float]
NAMES = ("tokens/s", "first token, ms", "between tokens, ms")


def ours(sample: LoadSample, waves: int) -> Numbers:
    """What our generator saw of so many prompts a stream; tokens per second from the first token on, as guidellm counts."""
    began = min(sample.first[::waves])  # of each stream the first prompt
    seen = (
        sample.tokens / (sample.seconds - began),
        statistics.mean(sample.first) * 1e3,
        statistics.mean(sample.between) * 1e3,
    )
    return dict(zip(NAMES, seen, strict=True))


def theirs(command: str, url: str, prompts: Path, streams: int, count: int) -> Numbers:
    """What guidellm saw of so many requests."""
    report = prompts.with_suffix(".report.json")
    words = [command, "run", "--disable-console", "--profile", f"kind=concurrent,streams={streams}"]
    body = {"cache": False, "temperature": 0}
    backend = {
        "kind": "openai_http",
        "target": url,
        "request_format": "/v1/completions",
        "extras": {"body": body},
    }
    words += ["--backend", json.dumps(backend)]
    words += ["--constraint", f"kind=max_requests,count={count}"]
    words += ["--data", f"kind=json_file,path={prompts}", "--output", f"kind=json,path={report}"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    clean["GUIDELLM__MAX_WORKER_PROCESSES"] = "1"  # not 10, which take two cores from the server
    subprocess.run(words, check=True, env=clean, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = json.loads(report.read_text(encoding="utf-8"))["benchmarks"][0]["metrics"]
    names = "output_tokens_per_second", "time_to_first_token_ms", "inter_token_latency_ms"
    totals = metrics["request_totals"]
    if totals["errored"] or not totals["successful"]:
        raise UserError(f"guidellm had {totals['successful']} answers and {totals['errored']} errors")
    return dict(zip(NAMES, (metrics[name]["successful"]["mean"] for name in names), strict=True))


def main() -> None:
    """Prints what both saw, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("guidellm", help="its command")
    parser.add_argument("--config", default="laptop/17m")
    for name, default in (("streams", 4), ("context", 128), ("tokens", 256), ("rounds", 4), ("waves", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    streams, tokens = options.streams, options.tokens
    config = replace(load(RunConfig, config_path(options.config), {}).model, vocab_size=257)
    random, rounds = np.random.default_rng(0), list[tuple[Numbers, Numbers]]()
    cores = sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)
    with TemporaryDirectory() as folder, ExitStack() as stack:
        server = served.ours(served.OURS, config, "fp32", Path(folder))
        os.sched_setaffinity(0, cores[:half])  # of what is started from here on
        place = stack.enter_context(server.start(streams, options.context + tokens))
        os.sched_setaffinity(0, cores[half:] or cores)
        ask = stack.enter_context(generator())
        for number in range(options.rounds + 1):  # the first warms up
            ids = random.integers(97, 123, (2, streams, options.waves, options.context)).tolist()
            bodies = [[server.body(prompt, tokens) for prompt in prompts] for prompts in ids[0]]
            sample = ask.streams(f"{place.url}/v1/completions", bodies, tokens, served.OURS)
            seen = ours(sample, options.waves)
            prompts = Path(folder) / f"{number}.jsonl"
            texts = [bytes(prompt[1:]).decode() for stream in ids[1] for prompt in stream]  # BOS comes before
            rows = [json.dumps({"prompt": text, "output_tokens_count": tokens}) for text in texts]
            prompts.write_text("\n".join(rows), encoding="utf-8")
            rounds.append((seen, theirs(options.guidellm, place.url, prompts, streams, len(rows))))
    table = []
    for name in NAMES:
        a, b = (statistics.median(pair[side][name] for pair in rounds[1:]) for side in (0, 1))
        ratio = statistics.median(pair[1][name] / pair[0][name] for pair in rounds[1:])
        table.append((name, f"{a:.2f}", f"{b:.2f}", f"{ratio:.3f}"))
    title = f"{streams} streams, {options.context} tokens of context, {tokens} to write"
    columns = "", "bench serve", "guidellm", "guidellm ÷ bench serve"
    print_table(Table(title, columns, tuple(table)), Console())


if __name__ == "__main__":
    main()
