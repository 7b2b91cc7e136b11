"""Compiling kernels while somebody presses Ctrl-C, and while another process compiles others."""

import signal
import threading

import pytest

from retnet.ops.cpu import jit
from tests.helpers import little_kernels


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


@pytest.mark.slow
def test_ctrl_c_while_kernels_compile_is_not_lost(tmp_path):
    """Pressed while LLVM hands over what it compiled, it was lost in LLVM, and sometimes the process with it."""
    assert little_kernels.run(tmp_path, ["2"], call=f"{little_kernels.__name__}:with_ctrl_c") == [
        "interrupted\ndone\n"
    ]


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


@pytest.mark.slow
def test_kernels_that_two_processes_compiled_do_not_call_each_others_functions(tmp_path):
    """numba counts functions from 1 in every process, so their symbols met where one process loaded both from disk.

    Its symbols also hold a set of words in an order that Python's hashes decide: here they are the same in all of them.
    """
    for words in ["2"], ["3"], ["2.0"], ["2", "2.0", "3"], ["3", "2.0", "2"]:
        assert little_kernels.run(tmp_path, words) == ["done\n"]
