"""torchrun starts a run again whose processes are killed or hang, and it ends as one to which nothing happened."""

import json
import threading

import pytest

from retnet.data import Batches, prepare
from retnet.model.checkpoint import verify
from retnet.train.distributed import Ranks
from retnet.train.hangs import HangDetector, Place, blamed
from retnet.train.trainer import train
from tests.train.ranks import base
from tests.train.restarts import HUNG
from tests.train.test_distributed import ROOT, assert_same, launch


@pytest.mark.slow
def test_killed_while_it_saves_then_hung(config_file, tmp_path):
    """A rank is killed with its files of a checkpoint written and not yet hashed, while the other waits; then one hangs."""
    folder = tmp_path / "runs"
    folder.mkdir()
    words = ["--standalone", "--nproc-per-node=2", "--max-restarts=2", "-m", "tests.train.restarts"]
    done = launch(*words, config_file, folder, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("retnet: error:") == 1
    assert f"no progress for 4 s (train.patience): process 1 is in step {HUNG}, where it reads" in done.stderr
    train(base(config_file), tmp_path / "plain")
    assert_same(folder / "run", tmp_path / "plain")
    launches = [json.loads(line) for line in (folder / "run/launches.jsonl").read_text().splitlines()]
    assert [(line["step"], line["restarts"]) for line in launches] == [(0, 0), (3, 1), (3, 2)]
    checkpoints = folder / "run/checkpoints"
    names = {"best", "last", "step-00000003", "step-00000006"}
    assert {path.name for path in checkpoints.iterdir()} == names
    for name in sorted(names)[2:]:
        verify(checkpoints / name)
    # the last attempt reads what the first read after the checkpoint, and all else was read before it
    c = base(config_file).train
    batches = Batches(prepare(base(config_file).data).train, seq_len=c.seq_len, batch_size=2, seed=c.seed)
    want = [[place, list(batches.batch(place).documents)] for place in range(c.passes_before(6))]
    read = [
        sorted(
            json.loads(line)
            for rank in (0, 1)
            for line in (folder / f"{attempt}.{rank}.batches").read_text().splitlines()
        )
        for attempt in (0, 2)
    ]
    assert read == [want, want[c.passes_before(3) :]]


AT = Place(step=7, place=1, beat=5)


@pytest.mark.parametrize(
    ("now", "late", "says"),
    [
        (
            {0: (7, 2, 7), 1: (7, 0, 7), 2: (7, 2, 7)},
            [1],
            "process 1 is in step 7, where it reads its batches",
        ),
        ({0: (7, 1, 7), 1: (7, 1, 5), 2: (7, 1, 7)}, [1], "process 1 is in step 7 and does not answer"),
        ({0: (8, 0, 7), 1: (7, 3, 7)}, [2], "process 2 is in step 0 and does not answer"),
        ({0: (6, 4, 7), 1: (6, 4, 7), 2: (7, 0, 7)}, [0, 1], "each of the processes 0, 1 is in step 6"),
        ({0: (7, 1, 7), 1: (7, 1, 7), 2: (7, 1, 7)}, [0, 1, 2], "cannot be told"),
    ],
)
def test_who_is_waited_for(now, late, says):
    found = blamed(dict.fromkeys(range(3), AT), {rank: Place(*at) for rank, at in now.items()}, 3)
    assert found[0] == late
    assert says in found[1]


class Told:
    """A store, and another process that tells of its looks there for so long."""

    def __init__(self, looks):
        self.text, self.looks = {}, iter(range(looks))

    def set(self, name, text):
        self.text[name] = text
        if (beat := next(self.looks, None)) is not None:
            self.text["at 1"] = json.dumps((7, 4, beat))

    def get(self, name):
        return self.text[name]

    def check(self, names):
        return names[0] in self.text


@pytest.mark.parametrize(
    ("looks", "ends"), [(3, ["process 1 is in step 7 and does not answer"]), (10**9, [])]
)
def test_whoever_is_gone_is_missed_where_others_may_take_any_time(looks, ends, monkeypatch):
    """As while all wait for a checkpoint, which a machine that was lost does not write."""
    detector, found = HangDetector(Ranks(0, 2), patience=0.1), []
    detector.at(7, "saves")
    monkeypatch.setattr(detector, "_end", lambda _, why: (found.append(why), detector._ended.set()))
    with detector.paused():
        thread = threading.Thread(target=detector._look, args=(Told(looks),))
        thread.start()
        thread.join(0.6)
        detector._ended.set()
        thread.join()
    assert [part for part in ends if part in found[0]] == ends
    assert len(found) == len(ends)
