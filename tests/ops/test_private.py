"""Private interfaces of torch and numba that the ops rely on: when a new version moves one, its name is what fails here."""

import pytest
import torch

from retnet.ops import torch_private

TORCH = [
    "torch._C._AutoDispatchBelowAutograd",
    "torch._C._ExcludeDispatchKeyGuard",
    "torch._C._dispatch_key_for_device",
    "torch._C._len_torch_dispatch_stack",
    "torch._C._get_tracing_state",
    "torch._C._functorch.peek_interpreter_stack",
    "torch._C._functorch.is_functorch_wrapped_tensor",
    "torch._C._functorch.is_batchedtensor",
    "torch._C._functorch.is_legacy_batchedtensor",
    "torch._C._functorch.get_unwrapped",
    "torch.autograd.function._SingleLevelFunction",
    "torch._functorch.autograd_function.enable_single_level_autograd_function",
    "torch.autograd.forward_ad._current_level",
    "torch.autograd.forward_ad._set_fwd_grad_enabled",
    "torch._assert_async",
]
NUMBA = [
    "numba.core.ccallback.CFunc",
    "numba.types.ExternalFunction",
    "numba.extending.intrinsic",
    "numba.core.cgutils.alloca_once_value",
    "numba.core.cgutils.for_range_slice",
]


def find(path):
    import importlib

    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return found
    raise AttributeError(path)


@pytest.mark.parametrize("path", TORCH)
def test_torch_has(path):
    assert find(path) is not None, (
        f"{path} is gone from torch {torch.__version__}; see retnet/ops/torch_private.py"
    )


@pytest.mark.parametrize("path", NUMBA)
def test_numba_has(path):
    numba = pytest.importorskip("numba")
    assert find(path) is not None, (
        f"{path} is gone from numba {numba.__version__}; see retnet/ops/cpu/numba_private.py"
    )


def test_what_they_mean():
    x = torch.randn(3)
    assert torch_private.plain()
    seen = []
    torch.func.vmap(lambda y: seen.append((torch_private.plain(), not torch_private.is_readable(y))) or y)(x)
    torch.func.grad(
        lambda y: (seen.append((torch_private.plain(), torch_private.is_differentiated(y))) or y).sum()
    )(x)
    torch.func.jvp(
        lambda y: seen.append((torch_private.plain(), torch_private.is_differentiated(y))) or y, (x,), (x,)
    )
    assert seen == [(False, True)] * 3
    assert torch_private.is_readable(x)
    assert not torch_private.is_differentiated(x)
    assert torch_private.autocast_key("cpu") == "AutocastCPU"


def test_onednn_multiplies():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN here")
    x, weight = torch.randn(70, 5), torch.randn(4, 5)
    assert torch.allclose(torch_private.onednn_linear(x, weight), x @ weight.T, atol=1e-5)


def test_kernels_of_numba_have_a_cache_with_our_key(tmp_path, monkeypatch):
    pytest.importorskip("numba")
    from retnet.ops.cpu import numba_private

    def kernel(table):
        table[0] = 1

    compiled = numba_private.c_function(kernel)
    numba_private.keep_on_disk(compiled, ["a key"])
    key = compiled._cache._index_key(None, type("Codegen", (), {"magic_tuple": lambda self: ()})())
    assert "a key" in repr(key)
