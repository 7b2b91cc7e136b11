"""A process that has imported everything, forks for each command of `retnet`, and can mount file systems of its own.

Started as a script, it reads a line of JSON for each command and answers with one. Where the system lets it, it lives in a
mount namespace of its own, so that a full or a read-only file system is a real one and is gone when it ends; elsewhere the
same faults are had from a limit on the size of files, and from files that stand where folders should be.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path

SECONDS = 120  # a command may take
_KEPT: list[object] = []  # streams of the server: forgotten, they would close the files of its child
_UNSHARE = ["unshare", "--map-root-user", "--mount"]


class Places:
    """Full and read-only folders, and commands that run with one fault each.

    Args:
        home: a folder for what is mounted.
        heavy: modules to import before the first command.
    """

    def __init__(self, home: Path, heavy: list[str]) -> None:
        self.home = home
        # what is mounted must stay out of sight of others, and a mount needs the right to make one
        self.mounts = (
            subprocess.run([*_UNSHARE, "mount", "-t", "tmpfs", "x", home], capture_output=True).returncode
            == 0
        )
        words = [*(_UNSHARE if self.mounts else ()), sys.executable, __file__, *heavy]
        self._server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def make(self, name: str, kind: str, content: Path | None = None, free: int = 0) -> Path:
        """A folder ``full`` (but for so many bytes) or ``read-only``, with a copy of `content` in it."""
        place = self.home / name
        self._ask({"make": str(place), "kind": kind, "content": content and str(content), "free": free})
        return place

    def relieve(self, place: Path) -> None:
        """Makes room in a full folder."""
        self._ask({"relieve": str(place)})

    def run(self, words, cwd: Path, **faults) -> subprocess.CompletedProcess:
        """What became of a command.

        Args:
            words: behind ``retnet``.
            cwd: where.
            faults: ``close`` (numbers of files), ``stdout`` (a path), ``deaf`` (nobody reads what it prints), ``gone``
                (its directory is removed), ``limit`` (bytes of a file, at most).
        """
        found = self._ask({"run": [str(word) for word in words], "cwd": str(cwd), **faults})
        return subprocess.CompletedProcess(words, found["status"], found["out"], found["err"])

    def _ask(self, order: dict) -> dict:
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer


def _serve(heavy: list[str]) -> None:
    out, sys.stdout = sys.stdout, sys.stderr
    for module in heavy:
        __import__(module)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = (
                _run(order) if "run" in order else _relieve(order) if "relieve" in order else _make(order)
            )
        except Exception as error:
            answer = {"error": repr(error)}
        out.write(json.dumps(answer) + "\n")
        out.flush()


def _make(order: dict) -> dict:
    place, read_only = Path(order["make"]), order["kind"] == "read-only"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], check=True)
    if order["content"]:
        shutil.copytree(order["content"], place / "content", symlinks=True)
    if read_only:
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        return {}
    with (place / ".filler").open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            os.ftruncate(filler.fileno(), filler.tell() - order["free"])
    return {}


def _relieve(order: dict) -> dict:
    (Path(order["relieve"]) / ".filler").unlink()
    return {}


def _run(order: dict) -> dict:
    pipes = [os.pipe(), os.pipe()]  # no files: their size may be limited
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            os._exit(_become(order, *(write for _, write in pipes)))
        finally:
            os._exit(119)
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(child, signal.SIGKILL))
    signal.alarm(SECONDS)
    texts = ["", ""]
    readers = [threading.Thread(target=_read, args=(pipes[i][0], texts, i)) for i in (0, 1)]
    for (_, write), reader in zip(pipes, readers, strict=True):
        os.close(write)
        reader.start()
    _, status = os.waitpid(child, 0)
    signal.alarm(0)
    for reader in readers:
        reader.join()
    return {"status": os.waitstatus_to_exitcode(status), "out": texts[0], "err": texts[1]}


def _read(number: int, texts: list[str], place: int) -> None:
    with open(number, errors="replace") as pipe:
        texts[place] = pipe.read()


def _become(order: dict, out: int, err: int) -> int:
    """Turns this child into the command, as a shell would have started it; returns its exit status."""
    os.chdir(order["cwd"])
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
    from retnet.cli import main

    sys.argv = ["retnet", *order["run"]]
    status = 1
    try:
        main()
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


if __name__ == "__main__":
    _serve(sys.argv[1:])
