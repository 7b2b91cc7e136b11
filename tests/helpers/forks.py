"""Processes that begin with everything imported: a server forks one for each command, which importing torch made long.

A command is a process of its own still: it may be killed, change its directory or lose a stream, and leaves nothing behind
but files. Started as a module, this reads a line of JSON for each command and answers with one.
"""

import atexit
import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import traceback
import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 120  # a command may take
# Importing all takes as long as some commands do: of what is heavy, a verb's own is imported when it is first asked for.
HEAVY = (
    "numba", "torch._dynamo", "retnet.cli.train", "retnet.train.trainer", "retnet.train.progress", "rich.live",
    "retnet.engine",
)  # fmt: skip
LLAMA = ("retnet.model.hf", "transformers.models.llama.modeling_llama")
OF_VERBS = {
    "bench": (*LLAMA, "retnet.bench.report", "scipy.stats"),
    "code": (*LLAMA, "scipy.stats", "retnet.evals.perplexity", "retnet.evals.harness"),  # of a page: anything
    "convert": ("retnet.model.hf",),
    "eval": ("scipy.stats", "retnet.evals.perplexity", "retnet.evals.harness"),
    "serve": ("retnet.serve.app", "retnet.serve.server"),
    "study": ("retnet.studies.report", "scipy.stats"),
}
OTHERS = ("numba", "torch._dynamo", "rich.live", "matplotlib.figure")
_KEPT: list[object] = []  # streams of the server: forgotten, they would close the files of its child


class Forks:
    """A server and its commands, one after the other.

    Args:
        before: the words that its command line begins with.
        module: the server: it calls `serve`.
        heavy: modules that it imports; `OTHERS` are none of this package, for commands of its copies.
    """

    def __init__(
        self, before: Sequence[str] = (), module: str = __name__, heavy: Sequence[str] = HEAVY
    ) -> None:
        words = [*before, sys.executable, "-m", module, *heavy]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._server = subprocess.Popen(words, cwd=ROOT, text=True, **pipes)

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def run(self, words, cwd: Path, **how) -> subprocess.CompletedProcess:
        """What became of a command.

        Args:
            words: behind ``retnet``.
            cwd: where.
            how: ``call`` ("module:function" in place of that of ``retnet``), ``code`` (True: `words` is one text of
                Python, in which warnings are errors), ``seconds`` (it may take); and faults: ``close`` (numbers of files),
                ``stdout`` (a path), ``deaf`` (nobody reads what it prints), ``gone`` (its directory is removed), ``limit``
                (bytes of a file, at most), ``sources`` (folders to import from, before all others), ``environment``
                (variables).
        """
        (done,) = self.together([words], cwd, **how)
        return done

    def together(self, commands, cwd: Path, **how) -> list[subprocess.CompletedProcess]:
        """What became of commands that run at the same time, such as the processes of a group; see `run`."""
        words = [[str(word) for word in command] for command in commands]
        answers = self.ask({"run": words, "cwd": str(cwd), **how})["ended"]
        return [
            subprocess.CompletedProcess(command, found["status"], found["out"], found["err"])
            for command, found in zip(words, answers, strict=True)
        ]

    def ask(self, order: dict) -> dict:
        """The server's answer."""
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer


@cache
def shared(heavy: Sequence[str] = HEAVY) -> Forks:
    """Those that all tests of this process share."""
    found = Forks(heavy=heavy)
    atexit.register(found.close)
    return found


def serve(orders: dict[str, Callable[[dict], dict]]) -> None:
    """The server: orders by the word that each has, `run` among them."""
    out, sys.stdout = sys.stdout, sys.stderr
    os.fsync = os.fstat  # see tests/conftest.py
    _import(sys.argv[1:])
    if "retnet.train.trainer" in sys.argv:  # a second of every child
        from retnet.ops.cpu import chunkwise_numba

        chunkwise_numba._kernels(sys.modules["torch"].float32)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            (do,) = (do for word, do in {"run": _run, **orders}.items() if word in order)
            answer = do(order)
        except Exception as error:
            answer = {"error": repr(error)}
        out.write(json.dumps(answer) + "\n")
        out.flush()
    os._exit(0)  # at the end of an interpreter some libraries complain on standard error


def _import(modules: Iterable[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # what is imported is never garbage: children need not look


def _run(order: dict) -> dict:
    if not order.keys() & {"sources", "call"}:
        _import(OF_VERBS.get("code" if "code" in order else order["run"][0][0], ()))
    begun = [_begin({**order, "run": words}) for words in order["run"]]

    def end(*_: object) -> None:
        for child, _ in begun:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end)
    signal.alarm(order.get("seconds", SECONDS))
    texts = [["", ""] for _ in begun]
    readers = [
        threading.Thread(target=_read, args=(pipe, texts[number], place))
        for number, (_, pipes) in enumerate(begun)
        for place, pipe in enumerate(pipes)
    ]
    for reader in readers:
        reader.start()
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child, _ in begun]
    signal.alarm(0)
    for reader in readers:
        reader.join()
    ended = zip(statuses, texts, strict=True)
    return {"ended": [{"status": status, "out": out, "err": err} for status, (out, err) in ended]}


def _begin(order: dict) -> tuple[int, list[int]]:
    """A child, and what to read of what it says."""
    pipes = [os.pipe(), os.pipe()]  # no files: their size may be limited
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            os._exit(_become(order, *(write for _, write in pipes)))
        finally:
            os._exit(119)
    for _, write in pipes:
        os.close(write)
    return child, [read for read, _ in pipes]


def _read(number: int, texts: list[str], place: int) -> None:
    with open(number, errors="replace") as pipe:
        texts[place] = pipe.read()


def _become(order: dict, out: int, err: int) -> int:
    """Turns this child into the command, as a shell would have started it; returns its exit status."""
    os.chdir(order["cwd"])
    os.environ.update(order.get("environment", {}))
    if sources := order.get("sources"):
        sys.path[:0] = sources
        os.environ["PYTHONPATH"] = os.pathsep.join(sources)
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]  # theirs are imported anew
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    if order.get("deaf"):
        reader, out = os.pipe()
        os.close(reader)
    elif order.get("stdout"):
        out = os.open(order["stdout"], os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(err, 2)
    _KEPT.extend((sys.stdin, sys.stdout, sys.stderr, sys.__stdin__, sys.__stdout__, sys.__stderr__))
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        closed = number in order.get("close", ())  # as Python does where a shell has closed them
        stream = None if closed else open(number, mode)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
        if closed:
            os.close(number)
    if order.get("gone"):
        os.rmdir(order["cwd"])
    if "limit" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
    status = 1
    try:
        _work(order)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError as error:  # Python would complain at its end
            os.write(2, f"Exception ignored: {error}".encode())
            status = 120
    return status


def _work(order: dict) -> None:
    words = order["run"]
    if order.get("code"):
        warnings.simplefilter("error")
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(*words, "<string>", "exec"), main.__dict__)
        return
    module, function = order.get("call", "retnet.cli:main").split(":")
    sys.argv = ["retnet", *words]
    sys.exit(getattr(importlib.import_module(module), function)())


if __name__ == "__main__":
    serve({})
