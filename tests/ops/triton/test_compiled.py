"""Every kernel compiled for GPUs that are not there: the same function as `python -m tools.compile_report`."""

import pytest
import torch

pytest.importorskip("triton")
from retnet.ops.triton import tile_table
from tools import triton_report as report
from tools.compile_report import ARCHITECTURES, main


@pytest.mark.slow
@pytest.mark.parametrize("architecture", report.TARGETS)
@pytest.mark.parametrize(("K", "V"), report.SHAPES)
def test_within_the_limits_of_the_architecture(architecture, K, V):
    rows = report.examine(architecture, K, V)
    assert [row.kernel for row in rows] == [
        "STATE h",
        "STATE dh",
        "OUT o",
        "OUT dq",
        "OUT dk",
        "OUT dv",
        "STEP",
        "ROTARY i",
        "ROTARY h",
        "NORM",
        "NORM dx",
    ]
    assert not [(row.kernel, row.faults) for row in rows if row.faults]
    assert all(row.registers > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "K", "V", "dtype", "packed"),
    [
        ("sm_90", 256, 512, torch.float16, False),
        ("sm_80", 60, 100, torch.bfloat16, True),
        ("gfx942", 64, 128, torch.float32, True),
    ],
)
def test_other_types_packed_rows_and_odd_sizes(architecture, K, V, dtype, packed):
    rows = report.examine(architecture, K, V, dtype, packed=packed)
    assert not [(row.kernel, row.faults) for row in rows if row.faults]


@pytest.mark.slow
def test_the_tiles_that_fit_any_gpu(monkeypatch):
    """An architecture without a row of its own, with less shared memory than any that has one."""
    small = report.TARGETS["sm_80"]._replace(gpu=report.GPUTarget("cuda", 89, 32), shared=65_536)
    monkeypatch.setitem(report.TARGETS, "sm_89", small)
    assert not [(row.kernel, row.faults) for row in report.examine("sm_89", 128, 256) if row.faults]


@pytest.mark.slow
def test_scores_shared_by_all_columns_compile_for_hopper(monkeypatch):
    """The row of the table that docs/kernels.md proposes for a card to judge."""
    table = tile_table.table("sm_90")
    row = tile_table.OutTiles(64, 32, 256, 32, 512, 8, 3)
    monkeypatch.setitem(tile_table.TABLES, "sm_90", table._replace(out={**table.out, 256: row}))
    rows = [row for row in report.examine("sm_90", 256, 512) if row.kernel in ("OUT o", "OUT dv")]
    assert [(row.faults, row.matrix, row.copies, row.programs) for row in rows] == 2 * [
        ((), True, "async", 1)
    ]


@pytest.mark.slow
def test_kernels_around_retention_spill_nothing():
    """They are bounded by memory, so registers must be left for many programs at once: the widest, most laden variant."""
    for name, kernel, constants, options, _ in report.kernels_of("sm_90", 60, 1024, torch.float32, False):
        if name.startswith(("ROTARY", "NORM")):
            compiled = report.compile_for(report.TARGETS["sm_90"], kernel, constants, options, torch.float32)
            registers, spilled = report.resources(compiled)
            assert spilled == 0
            assert registers <= 168  # three programs of four warps


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_arguments_that_are_one_become_constants(packed):
    """One head, vectors of one number: Triton compiles such arguments in, which not every operation survives."""
    target = report.TARGETS["gfx942"]
    for _, kernel, constants, options, _ in report.kernels_of("gfx942", 1, 1, torch.bfloat16, packed):
        ones = {name: 1 for name in kernel.arg_names if name == "H" or name.endswith(("_head", "_token"))}
        compiled = report.compile_for(target, kernel, constants | ones, options, torch.bfloat16)
        assert report.resources(compiled)[1] == 0


def test_a_fault_is_reported(monkeypatch, capsys):
    """The limits bite: next to no shared memory, fewer spills than none, an instruction that does not exist."""
    target = report.TARGETS["gfx942"]._replace(shared=1024, instruction="v_nonsense")
    monkeypatch.setitem(report.TARGETS, "gfx942", target)
    monkeypatch.setattr(report, "SPILL_LIMIT", -1)
    first = next(report.kernels_of("gfx942", 16, 16, torch.bfloat16, False))
    monkeypatch.setattr(report, "kernels_of", lambda *arguments: [first])
    rows = report.examine("gfx942", 16, 16)
    faults = " ".join(rows[0].faults)
    assert "shared memory, the limit is 1024" in faults
    assert "0 bytes spilled, the limit is -1" in faults
    assert "no v_nonsense" in faults
    monkeypatch.setattr(report, "SHAPES", [(16, 16)])
    assert main(["gfx942"]) == 1
    assert "1 kernels break a limit." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "interpret", "message"),
    [
        (["sm_70"], "0", "unknown architecture 'sm_70'; allowed: sm_80, sm_90, sm_100, gfx942"),
        ([], "1", "TRITON_INTERPRET is set, which interprets kernels instead of compiling them; unset it"),
    ],
)
def test_what_the_command_refuses(arguments, interpret, message, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_knows_every_target():
    assert list(report.TARGETS) == ARCHITECTURES


def test_the_pattern_that_hopper_miscompiles_would_be_found():
    """A kernel that has it, compiled the same way: the search does not come back empty because it searches wrongly."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, y, z, out):
        i = tl.arange(0, 64)[:, None]
        j = tl.arange(0, 64)[None, :]
        product = tl.dot(tl.load(x + i * 64 + j), tl.load(y + i * 64 + j))
        turned = tl.trans(product.to(x.dtype.element_ty))
        tl.store(out + i * 64 + j, tl.dot(turned, tl.load(z + i * 64 + j)).to(x.dtype.element_ty))

    target = report.TARGETS["sm_90"]
    compiled = report.compile_for(
        target, kernel, {}, {"num_warps": 4, "enable_fp_fusion": True}, torch.bfloat16
    )
    assert report.transposes_a_product(compiled)
