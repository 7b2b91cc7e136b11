"""A process of llama.cpp's own HTTP server, from the xllamacpp wheel, for one model; run as a file by `bench.llama_cpp`.

It imports nothing of this package, so that only llama.cpp's threads live here. Its argument, JSON, says what to serve; one
line of JSON on stdout says where it listens. It ends when stdin does, and so with the process that started it.
"""

import json
import sys

import xllamacpp


def main() -> None:
    """Serves until stdin ends."""
    asked = json.loads(sys.argv[1])
    params = xllamacpp.CommonParams()
    params.model.path = asked["model"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = asked["threads"]
    params.n_ctx = asked["context"]
    params.slot_save_path = asked["states"]
    params.n_parallel = asked["slots"]
    params.kv_unified = False  # a cache of its own for each slot: nobody reads past those of others
    params.n_gpu_layers = 0
    params.fit_params = False  # take the context asked for
    params.n_ctx_checkpoints = 0  # no copies of states, no cache of earlier prompts: both cost time
    params.cache_ram_mib = 0
    params.cache_idle_slots = False
    params.ui = False
    params.verbosity = 1  # errors, to stderr
    server = xllamacpp.Server(params)
    answer = {"address": server.listening_address, "features": xllamacpp.get_system_info()}
    print(json.dumps(answer), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
