"""Compiled kernels are optional: whatever goes wrong with them, torch's operators do the work, and it is said once."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from retnet.ops import log_decays, retention, retention_step
from retnet.ops.cpu import chunkwise_numba, jit, openmp
from tests.helpers import little_kernels
from tests.helpers.parity import relative

pytest.importorskip("numba")
SOURCES = Path(jit.__file__).parents[3]

START = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(name)s %(levelname)s %(message)s", stream=sys.stdout)
import torch
from retnet.ops import log_decays, product, retention, retention_step
torch.manual_seed(0)
q = torch.randn(2, 20, 4, 8, requires_grad=True)
d = log_decays("paper", 4)
"""
SEQUENCES = """
for _ in range(2):
    out, state = retention(q, q, q, d)
    want, _ = retention(q, q, q, d, backend="reference")
    (got,) = torch.autograd.grad(out.sum(), q)
    (exact,) = torch.autograd.grad(want.sum(), q)
    assert torch.allclose(out, want, atol=1e-4) and torch.allclose(got, exact, atol=1e-3)
"""
DECODING = """
with torch.no_grad():
    pool, other = torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8)
    a = retention_step(q[:, 0], q[:, 0], q[:, 0], d, pool)
    b = retention_step(q[:, 0], q[:, 0], q[:, 0], d, other, backend="reference")
    assert torch.allclose(a, b, atol=1e-5)
    x, w = torch.randn(1, 256), torch.randn(256, 256)
    assert torch.allclose(product(x, w), x @ w.T, atol=1e-3)
print("done")
"""
WORK = START + SEQUENCES + DECODING


def run(code=WORK, *, path=None, **environment):
    """What a fresh process says; its exit must be clean."""
    paths = os.pathsep.join([str(p) for p in (path, SOURCES) if p])
    variables = os.environ | {"PYTHONPATH": paths} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "done", done.stdout
    return done.stdout


@pytest.mark.slow
def test_a_read_only_installation_without_a_home(tmp_path):
    """numba finds no place for what it compiled: kernels run all the same, and the way out is said once."""
    sources, home = tmp_path / "site", tmp_path / "home"
    shutil.copytree(SOURCES, sources, ignore=shutil.ignore_patterns("__pycache__"))
    home.mkdir()
    nowhere = "/proc/nowhere"  # no root can write there
    code = f"""
import numba.core.caching as caching
class Nowhere:
    @classmethod
    def from_function(cls, *arguments):
        return None  # as every locator does that finds its directory read-only
caching.CacheImpl._locator_classes = [Nowhere]
{START + DECODING}"""
    said = run(code, path=sources, HOME=nowhere, XDG_CACHE_HOME=nowhere, NUMBA_CACHE_DIR="")
    assert said.count("not kept on disk") == 1
    assert "set NUMBA_CACHE_DIR to a directory that can be written" in said
    assert "backend 'auto' is 'numba'" in said


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_or_is_spoiled(tmp_path):
    (said,) = little_kernels.run(
        tmp_path / "full", ["2", "3"], call=f"{little_kernels.__name__}:with_a_full_disk"
    )
    assert said.count("not kept on disk") == 1
    assert "No space left on device" in said
    cache = tmp_path / "spoiled"
    assert little_kernels.run(cache, ["2"]) == ["done\n"]
    files = [file for kind in ("*.nbi", "*.nbc") for file in cache.rglob(kind)]
    assert len(files) == 6
    for file in files:
        file.write_bytes(b"spoiled")
    (said,) = little_kernels.run(cache, ["2"])
    assert "could not be compiled" not in said


@pytest.mark.slow
def test_processes_that_compile_at_once_into_one_cache(tmp_path):
    """Each finds an empty cache, a half-written one, or a whole one: all compute right, and later ones find it whole."""
    words = ["2", "3", "2.0", "3.0"]
    for said in little_kernels.run(tmp_path, *[words] * 3):
        assert "could not be compiled" not in said
    assert little_kernels.run(tmp_path, words) == ["done\n"]


@pytest.mark.parametrize(
    ("numba", "reason"),
    [
        (
            "raise AttributeError('no such thing in numpy 9')",
            "numba is broken (AttributeError: no such thing",
        ),
        (
            "raise SystemError('initialisation failed')",
            "numba is broken (SystemError: initialisation failed)",
        ),
        ("import llvmlite_that_is_missing", "numba cannot be imported (ModuleNotFoundError: No module named"),
        ("import sys; sys.exit(3)", "numba is broken (SystemExit: 3"),
        ("", "numba cannot be imported (ImportError: cannot import name 'types' from 'numba'"),
    ],
    ids=["AttributeError", "SystemError", "half installed", "SystemExit", "empty"],
)
@pytest.mark.slow
def test_a_broken_numba(tmp_path, numba, reason):
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text(numba)
    said = run(path=tmp_path)
    assert (
        said.count("WARNING kernels for the CPU cannot be compiled, so torch's own operators are used") == 1
    )
    assert reason in said
    assert "backend 'auto' is 'torch'" in said


@pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="its module of interpreters has another name and other errors"
)
def test_a_second_interpreter_is_refused_and_does_not_hang():
    """torch and numba cannot be imported in one: torch waits for a lock that nobody gives back."""
    code = """
import _xxsubinterpreters as interpreters
other = interpreters.create()
for text in ("import retnet", "from retnet.ops import retention"):
    try:
        interpreters.run_string(other, text)
    except interpreters.RunFailedError as error:
        assert "retnet cannot be used in a second interpreter of a process" in str(error), error
    else:
        raise AssertionError(text)
import retnet
print("done")
"""
    run(code)


@pytest.fixture
def anew(monkeypatch):
    """The compiler and the kernels of a fresh process."""
    jit._compiler.cache_clear()
    monkeypatch.setattr(chunkwise_numba, "_kernels", jit.optional(chunkwise_numba._kernels.__self__.make))
    yield
    monkeypatch.undo()
    jit._compiler.cache_clear()


@pytest.mark.usefixtures("anew")
class TestRefusals:
    q = torch.randn(1, 5, 2, 4)
    decay = log_decays("paper", 2)

    def test_no_openmp(self, monkeypatch, caplog):
        monkeypatch.setattr(jit, "parallel", lambda: None)
        with caplog.at_level("INFO", logger="retnet.ops"):
            for _ in range(2):
                retention(self.q, self.q, self.q, self.decay)
        assert caplog.text.count("torch does not use GNU OpenMP here") <= 2  # the compiler, and the choice
        with pytest.raises(ValueError, match=r"'numba' cannot run retention: torch does not use GNU OpenMP"):
            retention(self.q, self.q, self.q, self.decay, backend="numba")

    def test_a_cpu_for_which_nothing_compiles(self, monkeypatch, caplog):
        def refuse(*arguments):
            raise RuntimeError("LLVM ERROR: 64-bit code requested on a subtarget that does not support it")

        monkeypatch.setattr(chunkwise_numba, "compile_packed_gemm", refuse)
        with caplog.at_level("INFO", logger="retnet.ops"):
            for _ in range(2):
                got, _ = retention(self.q, self.q, self.q, self.decay)
        assert (
            caplog.text.count("could not be compiled, so torch's own operators are used: RuntimeError") == 1
        )
        assert relative(got, retention(self.q, self.q, self.q, self.decay, backend="reference")[0]) < 1e-5
        with pytest.raises(ValueError, match=r"cannot run retention: .*could not be compiled"):
            retention(self.q, self.q, self.q, self.decay, backend="numba")
        # as where a program runs that was exported on a machine with kernels
        out, *_ = torch.ops.retnet.retention_chunkwise_numba(
            self.q, self.q, self.q, self.decay, None, None, 0.5, 16, False
        )
        assert relative(out, got) < 1e-5

    def test_threads_that_all_want_kernels_first(self):
        made, wanted = [], jit.optional(lambda compiler, key: made.append(key) or object())
        found = []
        threads = [threading.Thread(target=lambda: found.append(wanted("one"))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert made == ["one"]
        assert len(set(map(id, found))) == 1


def test_several_threads_at_once():
    q, decay = torch.randn(2, 40, 4, 8), log_decays("paper", 4)
    want, _ = retention(q, q, q, decay)
    wrong = []

    def work():
        for _ in range(20):
            out, state = retention(q, q, q, decay)
            pool = torch.zeros(2, 4, 8, 8)
            with torch.no_grad():
                for t in range(40):
                    retention_step(q[:, t], q[:, t], q[:, t], decay, pool)
            if not torch.equal(out, want) or relative(pool, state) > 1e-4:
                wrong.append(out)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 7])
def test_any_number_of_threads_and_a_fork(threads):
    """More threads than cores; and the child of a process whose threads have worked, which inherits none of them."""
    code = f"""
import torch
torch.set_num_threads({threads})
{WORK}
import os
from retnet.ops.cpu import openmp
assert not openmp._forked and torch.get_num_threads() == {threads}
sys.stdout.flush()
child = os.fork()
if not child:
    out, _ = retention(q.detach(), q.detach(), q.detach(), d, backend="numba")
    with torch.no_grad():
        retention_step(q[:, 0], q[:, 0], q[:, 0], d, pool)
    os._exit(0 if torch.equal(out, retention(q.detach(), q.detach(), q.detach(), d)[0]) else 1)
import time
for _ in range(600):
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        break
    time.sleep(0.1)
else:
    os.kill(child, 9)
    raise SystemExit("the child hangs")
assert status == 0
print("done")
"""
    run(code, OMP_NUM_THREADS=str(threads))


def test_a_kernel_in_a_forked_child_runs_on_one_thread(monkeypatch):
    asked = []
    monkeypatch.setattr(openmp, "parallel", lambda: lambda *arguments: asked.append(arguments[2]))

    class Kernel:
        address = 0

    openmp.run(Kernel, (1, 2), 5)
    monkeypatch.setattr(openmp, "_forked", True)
    openmp.run(Kernel, (1, 2), 5)
    assert asked == [5, 1]
