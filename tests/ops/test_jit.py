"""Compiling kernels while somebody presses Ctrl-C, and while another process compiles others."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from retnet.ops.cpu import jit


def test_ctrl_c_waits_for_what_must_not_be_interrupted():
    reached = []

    def work():
        with jit._uninterrupted():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            reached.append("end")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["end"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with jit._uninterrupted():
        pass  # nobody pressed


def test_other_threads_have_no_signals_to_hold_back():
    entered = []

    def work():
        with jit._uninterrupted():
            entered.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered


PRESSED = """
import signal
import torch
from numba.core.codegen import CPUCodeLibrary
from retnet.ops import log_decays, retention_step

compiled, pressed = CPUCodeLibrary._object_compiled_hook.__func__, []
def press(cls, *args):
    if not pressed:
        pressed.append(True)
        signal.raise_signal(signal.SIGINT)
    compiled(cls, *args)
CPUCodeLibrary._object_compiled_hook = classmethod(press)

q = k = v = torch.ones(1, 2, 4)
given = (q, k, v, log_decays("none", 2), torch.zeros(1, 2, 4, 4), None, 1.0, "numba")
try:
    retention_step(*given)
except KeyboardInterrupt:
    print("interrupted")
print([retention_step(*given)[0, 0, 0].item() for _ in range(3)])
"""


@pytest.mark.slow
def test_ctrl_c_while_kernels_compile_is_not_lost(tmp_path):
    """Pressed while LLVM hands over what it compiled, it was lost in LLVM, and sometimes the process with it."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PRESSED], env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "interrupted\n[4.0, 8.0, 12.0]\n"


def test_a_package_replaced_under_a_process_does_not_spoil_the_kernels_on_disk(tmp_path):
    """The file says something else by the time it is hashed: what runs is part of the key."""
    file = tmp_path / "replaced.py"
    keys = []
    for body in ("return x + 1", "return x + 2"):
        space = {}
        exec(compile(f"def kernel(x):\n    {body}\n", str(file), "exec"), space)
        space["kernel"].__module__ = "replaced"
        file.write_text("the same new text")
        keys.append(jit._constants(space["kernel"]))
    assert keys[0] != keys[1]


PRODUCTS = """
import sys
import torch
from retnet.ops.cpu import decode

for number in sys.argv[1:]:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 200), torch.randint(-9, 9, (300, 200))
    scales = None if number == "float32" else torch.rand(300)
    weight = weight.to(getattr(torch, number))
    expected = x @ weight.float().T * (1 if scales is None else scales)
    error = (decode.skinny_gemm(x, weight, scales) - expected).norm() / expected.norm()
    assert error < 1e-6, error
"""


@pytest.mark.slow
def test_kernels_that_two_processes_compiled_do_not_call_each_others_functions(tmp_path):
    """numba counts functions from 1 in every process, so their symbols met where one process loaded both from disk.

    Its symbols also hold a set of words in an order that Python's hashes decide.
    """
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONHASHSEED": "0"}

    for numbers in [("float32",), ("int8",), ("float32", "int8"), ("int8", "float32")]:
        done = subprocess.run(
            [sys.executable, "-c", PRODUCTS, *numbers],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert (done.returncode, done.stderr) == (0, "")
