"""Private interfaces of torch and numba: one file knows each; when a new version moves one, its name is what fails here."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch

import retnet
from retnet.ops import torch_private

SOURCES = Path(retnet.__file__).parent
TORCH, NUMBA = SOURCES / "ops/torch_private.py", SOURCES / "ops/cpu/numba_private.py"
PRIVATE = re.compile(
    r"(torch(?!\.ops\.)|numba)\.(\w+\.)*_(?!_)\w|numba\.core\b"
)  # operators have a test of their own


def private_names(file):
    """The private names of torch and numba in a file, in full: what it imports, and attributes of that."""
    tree, whole, found = ast.parse(file.read_text(encoding="utf-8")), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name in node.names:
                path = f"{node.module}.{name.name}" if isinstance(node, ast.ImportFrom) else name.name
                found.add(path)
                whole[name.asname or name.name.partition(".")[0]] = (
                    path if name.asname or isinstance(node, ast.ImportFrom) else path.partition(".")[0]
                )
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name, _, rest = ast.unparse(node).partition(".")
            found.add(f"{whole.get(name)}.{rest}")
    return {path for path in found if re.fullmatch(r"[\w.]+", path) and PRIVATE.match(path)}


def is_there(path):
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for name in parts[length:]:
            found = getattr(found, name, None)
        return found is not None
    return False


def test_nobody_else_knows_any():
    files = [*SOURCES.rglob("*.py"), *(SOURCES.parents[1] / "tools").rglob("*.py")]
    assert len(files) > 200
    known = {
        str(file): names for file in files if file not in (TORCH, NUMBA) and (names := private_names(file))
    }
    assert not known, "private interfaces stand in ops/torch_private.py and ops/cpu/numba_private.py"


def test_torch_has_them():
    names = private_names(TORCH)
    assert {"torch._C._functorch.get_unwrapped", "torch.autograd.forward_ad._current_level"} < names
    gone = sorted(name for name in names if not is_there(name))
    assert not gone, f"gone from torch {torch.__version__}; see retnet/ops/torch_private.py"
    assert set(torch_private.HOOKS) < set(torch.nn.Module().__dict__)


def test_numba_has_them():
    numba = pytest.importorskip("numba")
    names = private_names(NUMBA)
    assert "numba.core.ccallback.CFunc" in names
    used = ("alloca_once", "alloca_once_value", "for_range", "for_range_slice", "get_or_insert_function")
    names |= {"numba.types.ExternalFunction", *(f"numba.core.cgutils.{name}" for name in used)}
    gone = sorted(name for name in names if not is_there(name))
    assert not gone, f"gone from numba {numba.__version__}; see retnet/ops/cpu/numba_private.py"


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
