"""Winners of the tile table: what becomes of them, and what they are checked at."""

import time
from concurrent.futures import BrokenExecutor, Future
from functools import cache

import pytest
import torch

from tools.gpu_day import verify
from tools.gpu_day.notebook import Notebook
from tools.gpu_day.place import Place, StoppedError

pytest.importorskip("triton")


def test_winners_become_rows_of_the_table():
    from retnet.ops.triton import tile_table
    from tools.gpu_day import tiles, tune

    table = tile_table.table("sm_90")
    found = {
        "state": {"start": list(table.state), "best": list(table.state)},
        "out-256": {"start": list(table.out[256]), "best": [64, 32, 256, 64, 512, 8, 2], "verified": True},
    }
    assert tune.winners(found) == {"out": {"256": [64, 32, 256, 64, 512, 8, 2]}}
    namespace = {
        name: getattr(tile_table, name)
        for name in ("ArchitectureTiles", "StateTiles", "OutTiles", "StepTiles")
    }
    rows = eval("{" + tune.patch("sm_90", found) + "}", namespace)
    assert rows["sm_90"].out[256] == tile_table.OutTiles(64, 32, 256, 64, 512, 8, 2)
    assert rows["sm_90"]._replace(out=table.out) == table
    found["step"] = {"start": list(table.step), "best": [4096, 2], "verified": True}
    rows = eval("{" + tune.patch("sm_90", found) + "}", namespace)
    assert rows["sm_90"].step == tile_table.StepTiles(4096, 2)
    assert tile_table.StepTiles(4096, 2) in tiles.neighbours(table.step)
    assert tile_table.OutTiles(64, 32, 256, 64, 512, 8, 3) in tiles.neighbours(table.out[256])
    assert tile_table.OutTiles(64, 32, 256, 32, 512, 8, 3) in tiles.neighbours(
        table.out[256]
    )  # docs/kernels.md
    assert table.out[256] not in tiles.neighbours(table.out[256])


def test_winners_that_were_not_checked_are_named_and_in_no_patch(tmp_path):
    from retnet.ops.triton import tile_table
    from tools.gpu_day import tune

    start = list(tile_table.table("sm_90").out[256])
    found = {"architecture": "sm_90", "start": start, "best": [64, *start[1:]], "ratio": 0.5, "tried": [1, 2]}
    checked = {"cases": 4, "right": 3, "wrong": [{}], "refused": [], "missed": []}
    old = tmp_path / "tile_table.txt"
    for more, said in (
        ({}, "unverified"),
        ({"checked": {**checked, "wrong": []}}, "unverified"),  # cut before the last case
        ({"checked": checked, "verified": False}, "wrong in 1 of 4 cases"),
    ):
        old.write_text("of another day")
        parts = {"out-256": {**found, **more}}
        shown = tune.summarise(parts)
        assert said in shown.findings[0]
        assert len(shown.tables) == 1
        assert tune.write_patch(tmp_path, False, parts) is None
        assert not old.exists()
    parts = {"out-256": {**found, "checked": {**checked, "wrong": []}, "verified": True}}
    assert tune.write_patch(tmp_path, False, parts) == old
    assert "256: OutTiles(64, " in old.read_text()
    assert len(tune.summarise(parts).tables) == 2


def test_a_winner_is_checked_at_every_head_shape_that_it_changes():
    """fp16 takes the widest row where bf16 takes another."""
    from tools.gpu_day import tune

    row = [64, 32, 64, 32, 128, 8, 2]
    assert tune.shapes_of("state", "sm_90", {"state": [32, 64, 64, 4, 2]}) == list(verify.HEADS)
    assert tune.shapes_of("step", "sm_90", {"step": [16384, 4]}) == [(128, 256), (256, 512)]
    assert tune.shapes_of("step", "sm_90", {"step": [8192, 4]}) == []
    assert tune.shapes_of("out-64", "sm_90", {"out": {"64": row}}) == [(64, 128)]
    assert tune.shapes_of("out-128", "sm_90", {"out": {"128": row}}) == [(64, 128), (128, 256)]
    assert tune.shapes_of("out-1024", "sm_90", {"out": {"1024": row}}) == [(128, 256), (256, 512)]


def test_each_process_compiles_its_share_and_all_of_them_everything():
    from tools.gpu_day.fla_tuning import share

    for count in (5, 12):
        shares = [share(range(48), n, count) for n in range(count)]
        assert sorted(x for one in shares for x in one) == list(range(48))
        assert all(share(range(6), n, count) for n in range(count))


class Compilers:
    """Stands for the processes: each answer is that of a candidate, None that of one which is never compiled."""

    def __init__(self, *answers):
        self.answers, self.ended = iter(answers), False

    def submit(self, compile_all, tiles):
        future = Future()
        future.set_running_or_notify_cancel()
        answer = next(self.answers)
        if isinstance(answer, Exception):
            future.set_exception(answer)
        elif answer is not None:
            future.set_result(answer)
        return future

    def map(self, *_, **__):
        return []

    def shutdown(self, **_):
        self.ended = True


@pytest.mark.parametrize(
    ("answers", "ready", "replaced"),
    [
        pytest.param((True, None, True), [0, 2], False, id="its time was over", marks=pytest.mark.slow),
        pytest.param((True, False, True), [0, 2], True, id="has lost the card"),
        pytest.param((True, BrokenExecutor(), BrokenExecutor()), [0, 1, 2], True, id="has died"),
    ],
)
def test_a_compiler_that_is_gone_costs_no_row(monkeypatch, place, answers, ready, replaced):
    from tools.gpu_day import tune

    made = []
    monkeypatch.setattr(tune, "_compilers", cache(lambda rehearsal: made.append(1) or Compilers(*answers)))
    batch = [(8192, 2), (8192, 4), (8192, 8)]
    found = tune._compiled(lambda tiles: True, batch, place, time.time() + 1)
    assert found == [batch[n] for n in ready]
    tune._compilers(place.rehearsal)
    assert len(made) == 1 + replaced


@pytest.mark.parametrize("fails", ["passes", "run"])
def test_a_candidate_that_fails_says_whether_its_process_has_the_card(monkeypatch, fails):
    from tools.gpu_day import tune

    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(tune, "passes", broken if fails == "passes" else lambda *_: [broken])
    asked = []
    monkeypatch.setattr(tune, "usable", lambda device: asked.append(device) or False)
    assert tune._compile("step", "cpu", ((16, 32),), [1024, 2]) is False
    assert asked == [torch.device("cpu")]


@pytest.mark.slow
def test_a_row_for_which_nothing_could_be_tried_is_searched_again(monkeypatch, tmp_path):
    from tools.gpu_day import tune

    book = Notebook(tmp_path, "tune", False)
    book.begin("step")
    now = time.time()
    place = Place(tmp_path, False, torch.device("cpu"), book, "step", now + 60, 20.0, now + 60)
    monkeypatch.setattr(tune, "_compilers", cache(lambda rehearsal: Compilers(*[None] * 100)))
    monkeypatch.setattr(tune, "CHECK", 19.5)
    monkeypatch.setattr(tune, "passes", lambda *_: [lambda: None])
    monkeypatch.setattr(tune, "_seconds", lambda *_: 1.0)
    with pytest.raises(StoppedError, match="no other tiles could be tried"):
        tune.search("step", place)
    assert tune.summarise({"step": book.parts()["step"]["found"]}).findings == ()
    monkeypatch.setattr(tune, "CHECK", 10.0)
    monkeypatch.setattr(tune, "_compilers", cache(lambda rehearsal: Compilers(*[True] * 100)))
    assert len(tune.search("step", place)["tried"]) > 2


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where a search has come to another row at once."""
    from tools.gpu_day import tune

    found = {"architecture": "sm_90", "start": [64, 64, 128, 4, 3], "best": [64, 64, 64, 4, 3], "tried": []}
    monkeypatch.setattr(tune, "climb", lambda kind, place: dict(found))
    book = Notebook(tmp_path, "tune", True)
    book.begin("state")
    now = time.time()
    return Place(tmp_path, True, torch.device("cpu"), book, "state", now + 60, 20.0, now + 60)


def test_a_winner_that_changes_no_kernel_is_not_verified(place, monkeypatch):
    """Nothing was checked, so nothing is known to be right."""
    from tools.gpu_day import tune

    monkeypatch.setattr(tune, "shapes_of", lambda *_: [])
    assert tune.search("state", place)["verified"] is False


def test_a_winner_that_there_was_no_time_to_check_is_searched_again(place, monkeypatch):
    from tools.gpu_day import tune

    checked = {"cases": 0, "right": 0, "wrong": [], "refused": [], "missed": [{}]}
    monkeypatch.setattr(tune.Checks, "run", lambda self, until: checked)
    with pytest.raises(StoppedError):
        tune.search("state", place)
    found = place.notebook.parts()["state"]["found"]
    assert "unverified" in tune.summarise({"state": found}).findings[0]
