"""How fast text becomes tokens: preparing a mixed corpus by the wall clock, by CPU time, and in memory.

    python -m tools.measure_prepare FOLDER [--megabytes 120] [--rounds 3]

The text is that of the Python packages installed here, every file once: a third as .txt, a third as .jsonl.zst, a third as
.parquet of several row groups. It is written to FOLDER once, and a BPE of 8,192 tokens is learned from a tenth of it. Each
round prepares all of it anew in a fresh process that remembers nothing of it: read to be known, divided, read again,
tokenised, written, hashed. Imports are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import zstandard
from pyarrow import parquet

from retnet.data import Tokenizer

ROUND = """
import json, resource, sys, time
from retnet.data import DataConfig, prepare
from retnet.data.encoding import cores
corpus, tokenizer, cache = sys.argv[1:]
def spent():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
begin, before = time.perf_counter(), spent()
found = prepare(DataConfig(corpus=corpus, tokenizer=tokenizer, cache=cache))
wall, cpu = time.perf_counter() - begin, spent() - before
tokens = found.train.num_tokens + found.validation.num_tokens
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
print(json.dumps({"tokens": tokens, "seconds": wall, "core_seconds": cpu, "peak_mib": peak, "cores": cores()}))
"""


def texts() -> Iterator[str]:
    """Python sources of the packages installed here, of more than a line, every text once."""
    seen: set[int] = set()
    for folder in ("stdlib", "purelib"):
        for file in sorted(Path(sysconfig.get_path(folder)).rglob("*.py")):
            text = file.read_text("utf-8", "replace").replace("\0", "")
            if len(text) > 200 and hash(text) not in seen:
                seen.add(hash(text))
                yield text


def build(folder: Path, size: int) -> None:
    """A corpus of about `size` bytes, in files of three kinds."""
    folder.mkdir(parents=True)
    found, left = list[str](), size
    for text in texts():
        found.append(text)
        if (left := left - len(text.encode())) <= 0:
            break
    for number, text in enumerate(found[::3]):
        (folder / f"{number:05d}.txt").write_text(text, "utf-8")
    for shard in range(4):
        lines = "".join(
            json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(found[1 + 3 * shard :: 12])
        )
        (folder / f"{shard}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
        table = pyarrow.table({"text": found[2 + 3 * shard :: 12]})
        parquet.write_table(table, folder / f"{shard}.parquet", row_group_size=256)


def main() -> None:
    """Measures, and prints one line a round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    corpus, tokenizer = asked.folder / "corpus", asked.folder / "tokenizer.json"
    if not corpus.is_dir():
        build(corpus, asked.megabytes * 1_000_000)
    if not tokenizer.is_file():
        Tokenizer.train((file.read_text("utf-8") for file in sorted(corpus.glob("*0.txt"))), 8192).save(
            tokenizer
        )
    for _ in range(asked.rounds):
        cache = asked.folder / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        words = [sys.executable, "-c", ROUND, str(corpus), str(tokenizer), str(cache)]
        environment = {**os.environ, "RETNET_CACHE": str(cache / "known")}
        run = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
        seen = json.loads(run.stdout)
        print(
            f"{seen['tokens']:,} tokens in {seen['seconds']:.1f} s: {seen['tokens'] / seen['seconds'] / 1e6:.2f} M/s, "
            f"{seen['tokens'] / seen['core_seconds'] / 1e6:.2f} M a core-second, "
            f"{seen['core_seconds'] / seen['seconds']:.2f} of {seen['cores']} cores, peak {seen['peak_mib']} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
