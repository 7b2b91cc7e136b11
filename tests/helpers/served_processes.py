"""`retnet serve` as processes."""

import subprocess
import sys
import time
from contextlib import contextmanager

import httpx

from retnet.model.checkpoint import model_files, write_checkpoint

RETNET = [sys.executable, "-c", "from retnet.cli import main; main()"]


def write_tiny(path, model, tokenizer):
    """A checkpoint that can be served."""
    write_checkpoint(path, {**model_files(model), "tokenizer.json": tokenizer.save})
    return path


@contextmanager
def started_many(checkpoint, ports, *options):
    """Servers at these ports, when all are ready; they end with the block."""
    words = [*RETNET, "serve", str(checkpoint), *map(str, options), "--port"]
    servers = []
    try:
        servers += [subprocess.Popen([*words, str(port)], stderr=subprocess.DEVNULL) for port in ports]
        end = time.monotonic() + 120
        for server, port in zip(servers, ports, strict=True):
            while True:
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                assert server.poll() is None, "a server ended"
                assert time.monotonic() < end
                time.sleep(0.1)
        yield servers
    finally:
        for server in servers:
            server.kill()
            server.wait()
