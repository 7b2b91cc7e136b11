"""Which backend runs, what is said about it, and what is refused: without a GPU, and without Triton where that matters."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from retnet.ops import (
    apply_rotary,
    frequencies,
    head_norm,
    log_decays,
    positions,
    retention,
    retention_step,
    retention_steps,
)
from retnet.ops.dispatch import _say_once
from retnet.ops.triton import capability, tile_table
from tests.helpers.parity import random_inputs


@pytest.fixture
def gpu(monkeypatch):
    """Tensors on a GPU that is not there: shapes and types alone. Triton can run on it, unless `missing` says otherwise."""
    monkeypatch.setattr(capability, "_missing", lambda device: None)
    _say_once.cache_clear()
    with FakeTensorMode():
        yield torch.device("cuda")


class Seen(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    def ours(self):
        return [name for name in self.names if name.startswith("retnet::")]


def on(device, B=2, T=300, H=3, K=64, V=128, dtype=torch.bfloat16):
    return [torch.empty(B, T, H, n, device=device, dtype=dtype) for n in (K, K, V)]


def angles(device, T=300, K=64):
    """Positions and frequencies."""
    return torch.empty(1, T, device=device, dtype=torch.int64), torch.empty(K // 2, device=device).double()


def test_auto_takes_triton_on_a_gpu_and_says_so_once(gpu, caplog):
    log_decay = torch.empty(3, device=gpu)
    with caplog.at_level(logging.INFO, logger="retnet.ops"):
        for _ in range(3):
            out, state = retention(*on(gpu), log_decay)
    assert (out.shape, out.dtype) == ((2, 300, 3, 128), torch.bfloat16)
    assert (state.shape, state.dtype) == ((2, 3, 64, 128), torch.float32)
    assert [r.getMessage() for r in caplog.records] == [
        "retention: backend 'auto' is 'triton' (tensors on cuda)"
    ]


def test_what_auto_runs_on_a_gpu_can_be_seen_in_a_trace(gpu):
    """One operator for a sequence, one for a step. (Autograd on CUDA tensors, even fake ones, aborts torch without CUDA.)"""
    inputs = on(gpu)
    with Seen() as seen:
        retention(*inputs, torch.empty(3, device=gpu))
        token = [torch.empty(2, 3, n, device=gpu) for n in (64, 64, 128)]
        pool = torch.empty(9, 3, 64, 128, device=gpu)
        one = retention_step(*token, torch.empty(3, device=gpu), pool)
        few = retention_steps(*inputs, torch.empty(3, device=gpu), pool)
    assert one.shape == (2, 3, 128)
    assert few.shape == (2, 300, 3, 128)
    assert seen.ours() == [
        "retnet::retention_chunkwise_triton",
        "retnet::retention_step_triton",
        "retnet::retention_step_triton",
    ]


def test_what_stands_around_retention_follows_it(gpu, caplog):
    """A layer of the paper in bf16: rotation, norm and gate are one operator each."""
    q, k, v = on(gpu)
    gate = torch.empty(2, 300, 3 * 128, device=gpu, dtype=torch.bfloat16)
    sums = torch.empty(1, 300, 3, device=gpu)
    with caplog.at_level(logging.INFO, logger="retnet.ops"), Seen() as seen:
        turned = apply_rotary(q, k, *angles(gpu))
        y = head_norm(v, gate, sums=sums)
        wide = head_norm(v, dtype=torch.float32)
    assert seen.ours() == ["retnet::rotary_triton", "retnet::head_norm_triton", "retnet::head_norm_triton"]
    assert [(x.shape, x.dtype) for x in turned] == [(q.shape, q.dtype)] * 2
    assert (y.shape, y.dtype) == (gate.shape, torch.bfloat16)
    assert (wide.shape, wide.dtype) == (gate.shape, torch.float32)
    assert [record.getMessage() for record in caplog.records] == [
        "rotary: backend 'auto' is 'triton' (tensors on cuda)",
        "head_norm: backend 'auto' is 'triton' (tensors on cuda)",
    ]


def test_what_stands_around_retention_falls_back_as_it_does(gpu, caplog, monkeypatch):
    monkeypatch.setattr("retnet.ops.rotary.rotation", lambda *arguments: (None, None))
    monkeypatch.setattr("retnet.ops.rotary._turner", lambda *_: lambda *_: "torch ran")
    monkeypatch.setattr("torch.nn.functional.layer_norm", lambda o, *arguments, **options: o)
    q, k, v = on(gpu, dtype=torch.float64)
    with caplog.at_level(logging.INFO, logger="retnet.ops"), Seen() as seen:
        for _ in range(2):
            assert apply_rotary(q, k, *angles(gpu)) == ("torch ran", "torch ran")
            assert head_norm(v).shape == (2, 300, 3 * 128)
            assert head_norm(torch.empty(1, 1, 1025, device=gpu)).shape == (1, 1025)
    assert not seen.ours()
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        "rotary: backend 'auto' is 'torch' (triton: a tensor has type torch.float64",
        "head_norm: backend 'auto' is 'torch' (triton: a tensor has type torch.float64",
        "head_norm: backend 'auto' is 'torch' (triton: heads have width 1025",
    ]
    with pytest.raises(
        ValueError, match=r"backend 'triton' cannot run rotary: a tensor has type torch\.float64"
    ):
        apply_rotary(q, k, *angles(gpu), backend="triton")
    with pytest.raises(
        ValueError, match="cannot run head_norm: heads have width 1025; allowed: from 1 to 1024"
    ):
        head_norm(torch.empty(1, 1, 1025, device=gpu), backend="triton")
    sums = torch.empty(1, 1, 16, device=gpu, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"cannot run head_norm: sums requires a gradient.*or use backend 'auto'"
    ):
        head_norm(torch.empty(1, 1, 16, 8, device=gpu), sums=sums, backend="triton")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "q has type torch.float64; allowed: torch.float32, torch.bfloat16"),
        ({"K": 300}, "heads are 300/128"),
        ({"V": 1025}, "heads are 64/1025"),
    ],
)
def test_auto_falls_back_and_says_why(gpu, caplog, change, reason):
    inputs = on(gpu, T=9, **change)
    with caplog.at_level(logging.INFO, logger="retnet.ops"), Seen() as seen:
        retention(*inputs, torch.empty(3, device=gpu))
    assert seen.ours() == ["retnet::retention_chunkwise_torch"]
    (record,) = caplog.records
    assert record.getMessage().startswith("retention: backend 'auto' is 'torch' (triton: " + reason)
    with pytest.raises(
        ValueError,
        match=f"backend 'triton' cannot run retention: {reason.replace('(', '.')}.*or use backend 'auto'",
    ):
        retention(*inputs, torch.empty(3, device=gpu), backend="triton")


def test_the_recurrent_form_is_not_for_the_kernels(gpu):
    inputs = on(gpu)
    with pytest.raises(ValueError, match="form is 'recurrent'; allowed: 'chunkwise', 'parallel'"):
        retention(*inputs, torch.empty(3, device=gpu), form="recurrent", backend="triton")


def test_auto_without_triton_on_a_gpu(gpu, monkeypatch, caplog):
    monkeypatch.setattr(
        capability, "_missing", lambda device: "Triton is not installed; pip install 'retnet[triton]'"
    )
    with caplog.at_level(logging.INFO, logger="retnet.ops"), Seen() as seen:
        retention(*on(gpu), torch.empty(3, device=gpu))
    assert seen.ours() == ["retnet::retention_chunkwise_torch"]
    assert "'torch' (triton: Triton is not installed; pip install" in caplog.records[0].getMessage()


@pytest.mark.parametrize("backend", ["numba", "cpu"])
def test_a_backend_of_the_cpu_on_a_gpu(gpu, backend):
    match = {"numba": "'numba' cannot run retention: tensors are on cuda", "cpu": "'cpu' is now 'torch'"}[
        backend
    ]
    with pytest.raises(ValueError, match=match):
        retention(*on(gpu), torch.empty(3, device=gpu), backend=backend)


def test_the_table_has_every_backend_for_every_op():
    from retnet.ops import BACKENDS
    from retnet.ops.dispatch import TABLE

    assert {"retention", "retention_step", "retention_steps", "rotary", "head_norm", "linear"} <= TABLE.keys()
    for op in TABLE.values():
        assert op.implementations.keys() == set(BACKENDS) - {"auto"}
        assert list(op.implementations)[-1] == "reference"


def test_steps_at_once_are_steps_in_turn():
    q, k, v, _ = (x.detach() for x in random_inputs(3, 4, 2, 8, 12))
    pool = torch.randn(5, 2, 8, 12, dtype=torch.float64)
    other, log_decay = pool.clone(), log_decays("paper", 2)
    slots = torch.tensor([3, -1, 0])
    got = retention_steps(q, k, v, log_decay, pool, slots)
    for t in range(4):
        assert torch.equal(got[:, t], retention_step(q[:, t], k[:, t], v[:, t], log_decay, other, slots))
    assert torch.equal(pool, other)
    with pytest.raises(ValueError, match=r"slots has shape \(2,\)"):
        retention_steps(q, k, v, log_decay, pool, slots[:2])
    with pytest.raises(ValueError, match="slots is on meta; allowed: the device of q, cpu"):
        retention_steps(q, k, v, log_decay, pool, slots.to("meta"))


class TestMissing:
    """The reasons themselves, asked past the cache."""

    ask = staticmethod(capability._missing.__wrapped__)

    def test_tensors_of_the_cpu(self):
        pytest.importorskip("triton")
        inputs = [x.detach() for x in random_inputs(1, 5, 2, 16, 16, dtype=torch.float32)[:3]]
        with pytest.raises(
            ValueError, match="tensors are on cpu, where Triton runs in its interpreter alone"
        ):
            retention(*inputs, log_decays("paper", 2), backend="triton")
        with pytest.raises(
            ValueError, match="cannot run rotary: tensors are on cpu, where Triton runs in its"
        ):
            apply_rotary(*inputs[:2], positions(5), frequencies(16), backend="triton")
        with pytest.raises(
            ValueError, match="cannot run head_norm: tensors are on cpu, where Triton runs in"
        ):
            head_norm(inputs[2], backend="triton")

    def test_no_triton(self, monkeypatch):
        monkeypatch.setattr(capability, "find_spec", lambda name: None)
        assert "Triton is not installed; pip install 'retnet[triton]'" in self.ask("cuda:0")

    def test_other_devices(self):
        assert self.ask("mps") == "tensors are on mps; Triton runs on CUDA and ROCm"

    def test_an_old_triton(self, monkeypatch):
        triton = pytest.importorskip("triton")
        monkeypatch.setattr(triton, "__version__", "3.5.1")
        assert self.ask("cuda:0").startswith("Triton is 3.5.1, and it is older than any")

    def test_an_old_gpu(self, monkeypatch):
        pytest.importorskip("triton")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        assert self.ask("cuda:0") == "Tesla T4 is older than compute capability 8.0 (Ampere)"


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.8.0+git12ab", "3.9.0", "3.10.0"])
def test_versions_that_run(version):
    assert capability.refusal(version) is None


@pytest.mark.parametrize("version", ["2.3.1", "3.5.1", "3.5.0+cu128"])
def test_versions_that_do_not(version):
    assert f"Triton is {version}, and" in capability.refusal(version)
    assert "install one from 3.6 to 3.9" in capability.refusal(version)


@pytest.mark.slow
def test_triton_is_imported_by_nobody_who_does_not_need_it():
    """Training and decoding on a CPU, in a process where importing Triton fails."""
    program = """
import sys
sys.modules["triton"] = None  # importing it raises
import torch
from retnet import LanguageModel, ModelConfig
from retnet.mixers import RetentionConfig
model = LanguageModel(ModelConfig(vocab_size=9, d_model=16, num_layers=1, mixer=RetentionConfig(num_heads=2)))
model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
model.step(torch.zeros(1, dtype=torch.long), model.init_state(1))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tiles_that_do_not_fit_a_gpu_say_so():
    errors = pytest.importorskip("triton.runtime.errors")
    from retnet.ops.triton import launch

    class Kernel:
        __name__ = "retention_chunkwise_out_triton"

        def __getitem__(self, grid):
            raise errors.OutOfResources(150_000, 101_376, "shared memory")

    with pytest.raises(
        RuntimeError,
        match=r"retention_chunkwise_out_triton do not fit sm_90.*150000.*AUTOTUNE=1.*or use backend='reference'",
    ):
        launch.start(Kernel(), 1, torch.device("cpu"))


class TestTiles:
    @pytest.mark.parametrize("architecture", [*tile_table.TABLES, "sm_103", "sm_120", "gfx1100"])
    @pytest.mark.parametrize("dtype", capability.KERNEL_DTYPES)
    @pytest.mark.parametrize(("K", "V"), [(1, 1), (16, 16), (60, 100), (256, 512), (256, 1024)])
    def test_every_head_has_tiles_that_the_kernels_can_take(self, architecture, dtype, K, V):
        for chunk in (16, 48, 256, 640):
            state = tile_table.fit_state(tile_table.state_tiles(architecture, K, V, dtype), chunk)
            assert chunk % state.bt == 0
            for X, Z in ((K, V), (V, K)):
                out = tile_table.fit_out(tile_table.out_tiles(architecture, X, Z, dtype), chunk, 1)
                assert chunk % out.bm == 0
                assert out.bm % out.bn == 0
                for size in (*state[:3], *out[:5]):
                    assert size >= 16
                    assert size & (size - 1) == 0
        keys, values, _ = tile_table.step_tiles(architecture, K, V)
        assert K <= keys < 2 * K
        assert keys * values <= 8192

    def test_families(self):
        assert tile_table.table("sm_103") is tile_table.TABLES["sm_100"]
        assert tile_table.table("gfx950") is tile_table.TABLES["gfx942"]
        assert tile_table.table("sm_86") is tile_table.TABLES["default"]  # less shared memory than sm_80


class TestTuning:
    tiles = tile_table.OutTiles(64, 32, 16, 16, 16, 4, 2)

    @pytest.fixture(autouse=True)
    def _fresh(self, monkeypatch, tmp_path):
        self.tuning = pytest.importorskip("retnet.ops.triton.autotune")
        monkeypatch.setattr(self.tuning, "_known", {})
        monkeypatch.setenv("RETNET_CACHE", str(tmp_path))
        monkeypatch.setenv("RETNET_TRITON_AUTOTUNE", "1")
        self.file = tmp_path / "triton.json"

    def tuned(self, run=lambda tiles: None):
        return self.tuning.tuned("out", "sm_90", (16, 16, False), torch.bfloat16, self.tiles, run)

    def clock(self, monkeypatch, time):
        import triton

        monkeypatch.setattr(triton.testing, "do_bench", lambda run, return_mode: run() or time(run.args[0]))

    def test_off_unless_asked_for(self, monkeypatch):
        monkeypatch.delenv("RETNET_TRITON_AUTOTUNE")
        assert self.tuned() is self.tiles
        assert not self.file.exists()

    def test_candidates_change_one_thing_and_stay_powers_a_matrix_unit_takes(self):
        found = self.tuning.candidates(self.tiles)
        assert found[0] == self.tiles
        assert len(set(found)) == len(found) > 5
        for other in found[1:]:
            assert sum(a != b for a, b in zip(other, self.tiles, strict=True)) == 1
            assert all(size >= 16 for size in other[:5])

    def test_the_fastest_of_those_that_run(self, monkeypatch):
        self.clock(monkeypatch, lambda tiles: tiles.stages + (tiles.bm == 64))

        def run(tiles):
            if tiles.stages == 1:
                raise RuntimeError("does not fit")

        assert self.tuned(run) == self.tiles._replace(bm=32)
        assert list(json.loads(self.file.read_text()).values()) == [[32, 32, 16, 16, 16, 4, 2]]

    def test_none_that_runs(self, monkeypatch):
        self.clock(monkeypatch, lambda tiles: 1.0)

        def run(tiles):
            raise RuntimeError("does not fit")

        with pytest.raises(
            RuntimeError, match=r"no tiles for out/sm_90/16/16/False.*use backend='reference'"
        ):
            self.tuned(run)

    @pytest.mark.parametrize("content", ["{ not JSON", "[1, 2]", '{"out": 3}'])
    def test_a_broken_file_is_written_anew(self, monkeypatch, content):
        self.file.write_text(content)
        self.clock(monkeypatch, lambda tiles: float(tiles.warps))
        assert self.tuned() == self.tiles
        assert list(self.tiles) in json.loads(self.file.read_text()).values()

    def test_what_other_processes_found_stays(self, monkeypatch):
        self.clock(monkeypatch, lambda tiles: 1.0)
        self.tuning._read(self.file)
        self.file.write_text('{"theirs": [1, 2]}')
        self.tuned()
        assert json.loads(self.file.read_text())["theirs"] == [1, 2]
