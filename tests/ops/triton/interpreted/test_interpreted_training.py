"""Forward, backward, final state and gradient of the initial one, against the law in fp64, at the tiles that ship."""

import itertools
from typing import NamedTuple

import pytest
import torch

from retnet.ops import retention
from retnet.ops.triton import launch, tile_table
from tests.helpers.parity import assert_same, outputs_and_gradients, random_inputs, relative

UNIT = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
GAMMAS = [1.0, 1 - 2**-5, 0.5, 1e-3]


class Case(NamedTuple):
    architecture: str
    B: int
    T: int
    H: int
    K: int
    V: int
    chunk: int | None = None
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] | None = None
    state: bool = True
    form: str = "chunkwise"
    keep_states: bool = False


# Every architecture's tiles, every type, head shapes up to 256/512 with sizes no tile divides, ragged and short lengths.
CASES = [
    Case("sm_90", 1, 300, 1, 256, 512, dtype=torch.bfloat16),
    Case("sm_90", 1, 200, 1, 256, 512, keep_states=True),
    Case("sm_90", 2, 70, 2, 128, 256, dtype=torch.float16, chunk=64, state=False),
    Case("sm_90", 1, 290, 2, 64, 128, lengths=(0, 1, 257, 0, 31, 1)),
    Case("sm_80", 1, 140, 1, 256, 512, chunk=64, state=False),
    Case("sm_80", 1, 280, 2, 60, 100, keep_states=True, lengths=(280,), dtype=torch.bfloat16),
    Case("sm_100", 1, 150, 1, 128, 256, lengths=(64, 0, 86), chunk=64),
    Case("gfx942", 2, 100, 2, 100, 60, chunk=48),
    Case("gfx942", 1, 260, 1, 64, 513, form="parallel", dtype=torch.bfloat16),
    Case("default", 1, 90, 3, 60, 100, chunk=32, lengths=(33, 57), keep_states=True, dtype=torch.float16),
    Case("default", 2, 1, 4, 16, 16),
    Case("default", 3, 40, 2, 3, 1, chunk=7, form="parallel"),
]


@pytest.fixture
def tiles(monkeypatch):
    """The tiles of an architecture, and for fp32 those of the half types as well: exact numbers prove the addressing."""

    def choose(architecture):
        monkeypatch.setattr(launch, "architecture", lambda device: architecture)
        for name in ("state_tiles", "out_tiles"):
            plain = getattr(tile_table, name)

            def half(architecture, a, z, dtype, plain=plain):
                return plain(architecture, a, z, torch.bfloat16 if dtype == torch.float32 else dtype)

            monkeypatch.setattr(tile_table, name, half)

    return choose


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c.architecture}-{c.K}-{c.V}-{c.dtype}".replace("torch.", "")
)
def test_outputs_states_and_all_gradients(case, seed, tiles):
    tiles(case.architecture)
    options = {"chunk_size": case.chunk, "form": case.form}
    if case.lengths is not None:
        options["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(case.lengths)], dtype=torch.int32)
    rows = case.B if case.lengths is None else len(case.lengths)
    inputs = list(random_inputs(*case[1:6], dtype=case.dtype, rows=rows, seed=seed))
    inputs[3] = inputs[3].detach() * 5 if case.state else None
    log_decay = torch.tensor((GAMMAS * 2)[seed % 4 :][: case.H], dtype=torch.float64).log()
    got = outputs_and_gradients(
        inputs, log_decay.float(), backend="triton", keep_states=case.keep_states, **options
    )
    exact = [None if x is None else x.detach().double() for x in inputs]
    want = outputs_and_gradients(exact, log_decay, backend="reference", **options)
    assert_same(got, want, UNIT[case.dtype])
    assert got["out"].dtype == case.dtype
    assert got["state"].dtype == torch.float32


def test_full_precision_tiles_of_fp32(seed):
    inputs = random_inputs(1, 75, 2, 100, 60, dtype=torch.float32, seed=seed)
    log_decay = torch.tensor([1.0, 0.9], dtype=torch.float64).log()
    got = outputs_and_gradients(inputs, log_decay, chunk_size=64, backend="triton")
    want = outputs_and_gradients([x.detach().double() for x in inputs], log_decay, backend="reference")
    assert_same(got, want, UNIT[torch.float32])


def test_a_long_sequence_forgets_without_overflow(seed):
    """What a global power of γ could not hold: γ^(−T) overflows at T 200 for γ 0.5; a state of γ 1 only grows."""
    inputs = random_inputs(1, 600, 2, 16, 16, dtype=torch.float16, seed=seed)
    log_decay = torch.tensor([0.5, 1.0], dtype=torch.float64).log()
    got = outputs_and_gradients(inputs, log_decay.float(), backend="triton")
    want = outputs_and_gradients([x.detach().double() for x in inputs], log_decay, backend="reference")
    assert_same(got, want, UNIT[torch.float16])


def test_a_state_beyond_fp16_is_not_lost():
    """Snapshots of fp16 inputs are fp32: 10⁵ does not fit fp16, and comes back as it was."""
    q = torch.full((1, 3, 1, 16), 1e-3, dtype=torch.float16)
    k, v = torch.zeros_like(q), torch.zeros_like(q)
    state = torch.full((1, 1, 16, 16), 1e5)
    out, final = retention(q, k, v, torch.zeros(1), state, backend="triton", scale=1.0)
    assert relative(out, torch.full_like(out, 1600.0)) < 1e-3
    assert torch.equal(final, state)


def strange(x, how):
    """The same numbers, lying otherwise in memory."""
    x = x.detach()
    if how == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "a slice of a wider projection":
        return torch.cat([x, torch.full_like(x, float("nan"))], dim=-1)[..., : x.shape[-1]]
    return torch.stack([x, torch.full_like(x, float("nan"))], dim=-1)[..., 0]  # every second number


@pytest.mark.parametrize("how", ["heads first", "a slice of a wider projection", "every second number"])
def test_inputs_and_gradients_that_are_not_contiguous(how, seed):
    inputs = random_inputs(2, 40, 2, 16, 20, dtype=torch.float32, seed=seed)
    log_decay = torch.tensor([1.0, 0.9]).log()
    leaves = [strange(x, how).requires_grad_() for x in inputs]
    assert not any(x.is_contiguous() for x in leaves)
    out, final = retention(*leaves[:3], log_decay, leaves[3], chunk_size=16, backend="triton")
    grads = torch.autograd.grad(out.sum() + final.transpose(2, 3).sum(), leaves)  # expanded gradients
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want_out, want_final = retention(*exact[:3], log_decay.double(), exact[3], backend="reference")
    wants = torch.autograd.grad(want_out.sum() + want_final.sum(), exact)
    for got, want in zip((out, final, *grads), (want_out, want_final, *wants), strict=True):
        assert relative(got, want) < 1e-6


@pytest.mark.parametrize("wanted", ["out", "final"])
def test_one_output_may_have_no_gradient(wanted, seed):
    inputs = random_inputs(1, 20, 1, 16, 16, dtype=torch.float32, seed=seed)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    log_decay = torch.tensor([0.9]).log()
    results = []
    for backend, leaves in (("triton", inputs), ("reference", exact)):
        q, k, v, state = leaves
        both = dict(
            zip(
                ("out", "final"),
                retention(q, k, v, log_decay.to(state.dtype), state, backend=backend),
                strict=True,
            )
        )
        results.append(torch.autograd.grad(both[wanted].square().sum(), leaves, materialize_grads=True))
    for got, want in zip(*results, strict=True):
        assert relative(got, want) < 1e-6


@pytest.mark.parametrize(("B", "T"), [(2, 0), (0, 5), (0, 0)])
def test_nothing_to_do(B, T, seed):
    inputs = random_inputs(B, T, 2, 16, 20, dtype=torch.float32, seed=seed)
    log_decay = torch.zeros(2)
    want = outputs_and_gradients(inputs, log_decay, backend="torch")
    assert_same(outputs_and_gradients(inputs, log_decay, backend="triton"), want, 0.0)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_no_tokens_in_any_document(lengths, seed):
    options = {"cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)])}
    inputs = random_inputs(1, 0, 2, 16, 20, dtype=torch.float32, rows=len(lengths), seed=seed)
    want = outputs_and_gradients(inputs, torch.zeros(2), backend="torch", **options)
    assert_same(outputs_and_gradients(inputs, torch.zeros(2), backend="triton", **options), want, 0.0)


def test_mistakes_that_only_the_device_could_see_are_loud():
    """On a GPU nobody reads γ or cu_seqlens back to check them: a γ above 1 gives NaN, wrong bounds an assertion."""
    q = torch.ones(1, 4, 1, 16)
    arguments = (q, q, q, torch.tensor([0.1]), None)
    out, final, _ = torch.ops.retnet.retention_chunkwise_triton(*arguments, None, 1.0, 16, False)
    assert out.isnan().all()
    assert final.isnan().all()
    for bounds in ([0, 5], [1, 4], [0, 3, 2, 4]):
        with pytest.raises(RuntimeError, match="cu_seqlens must rise from 0 to T = 4"):
            torch.ops.retnet.retention_chunkwise_triton(*arguments, torch.tensor(bounds), 1.0, 16, False)


class TestFarAddresses:
    """Offsets past 2³¹ in every factor that can reach there. Memory is mapped when it is touched: a few pages."""

    FAR = 5 << 29  # numbers, a quarter more than 2³¹; of bf16, 5 GiB of addresses

    @pytest.fixture(autouse=True)
    def _no_copies(self, monkeypatch):
        from triton.runtime.interpreter import GridExecutor

        # The interpreter ends by copying each storage onto itself, which would map all of it.
        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *arguments: None)
        torch.use_deterministic_algorithms(False)  # nor may all of it be filled with NaN

    def spread(self, x, dim):
        """x with so large a stride in one dimension that its last element lies past 2³¹."""
        stride = -(-self.FAR // (x.shape[dim] - 1)) // 16 * 16 + 16
        strides = list(x.stride())
        strides[dim] = stride
        far = torch.empty(stride * (x.shape[dim] - 1) + x.numel(), dtype=x.dtype).as_strided(x.shape, strides)
        assert sum((n - 1) * s for n, s in zip(far.shape, far.stride(), strict=True)) >= self.FAR
        return far.copy_(x)

    @pytest.mark.parametrize(
        ("dim", "shape", "chunk", "block"),
        [
            (0, (3, 20, 1), 16, 16),
            (1, (1, 520, 1), 64, 64),
            (1, (1, 520, 1), 640, 64),
            (2, (1, 20, 3), 16, 16),
        ],
        ids=["row", "chunk", "place in a chunk", "head"],
    )
    def test_inputs_and_output(self, dim, shape, chunk, block, seed, monkeypatch):
        monkeypatch.setattr(
            launch, "_REACH", 1 << 40
        )  # such strides would be copied: here they are the point
        monkeypatch.setattr(tile_table, "fit_out", lambda tiles, *_: tiles._replace(bm=block, bn=block))
        monkeypatch.setattr(tile_table, "fit_state", lambda tiles, _: tiles._replace(bt=block))
        q, k, v, _ = (x.detach() for x in random_inputs(*shape, 16, 16, dtype=torch.bfloat16, seed=seed))
        log_decay = torch.full((shape[2],), 0.999).log()
        exact = [x.double() for x in (q, k, v)]
        want, want_final = retention(*exact, log_decay.double(), backend="reference")
        q, k, v, out = (self.spread(x, dim) for x in (q, k, v, torch.zeros_like(v)))
        chunks = launch.cut(q, None, chunk)
        snapshots, final = launch.state_pass(k, v, None, log_decay, chunks, reverse=False)
        direction = {"reverse": False, "transposed": False}
        launch.out_pass(q, k, v, snapshots, log_decay, 0.25, chunks, **direction, out=out)
        assert relative(final, want_final) < UNIT[torch.bfloat16]
        assert relative(out, want) < UNIT[torch.bfloat16]


def test_the_checks_of_a_gpu_day_see_a_wrong_kernel(monkeypatch):
    """Right as it is, with scores shared by all columns of V 512 as well; wrong by a percent, or not written to the end."""
    from tools.gpu_day import verify
    from tools.gpu_day.cases import answer
    from tools.gpu_day.checks import faults

    cpu = torch.device("cpu")
    wide = {"out": {"256": [64, 32, 256, 32, 512, 8, 3]}}
    for case in (
        verify.tiny(verify.base(state=True)),
        verify.base(K=256, V=512, T=130, H=1, chunk=128, tiles=wide),
    ):
        assert not faults(answer(case, cpu))
    plain = launch.out_pass
    monkeypatch.setattr(launch, "out_pass", lambda *args, **more: plain(*args, **more) * 1.01)
    case = verify.tiny(verify.base(dtype="float32"))
    assert faults(answer(case, cpu))

    def unfinished(*args, **more):
        out = plain(*args, **more)
        out[:, -1] = torch.empty_like(out[:, -1])
        return out

    monkeypatch.setattr(launch, "out_pass", unfinished)
    assert faults(answer(case, cpu))
