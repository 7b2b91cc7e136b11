"""Training cost on a GPU day: what is noted while it is measured."""

import time

import pytest
import torch

from retnet.paper import TRAINED
from tools.gpu_day import train
from tools.gpu_day.notebook import Notebook
from tools.gpu_day.place import Place

pytest.importorskip("triton")


@pytest.mark.parametrize("compiled", [False, True])
def test_the_papers_length_comes_first_and_no_length_is_lost(tmp_path, monkeypatch, compiled):
    """A length that does not fit costs none that was measured before."""

    def speed(steps, size, tell):
        (length,) = steps.lengths
        if length > train.PAPER_LENGTH:
            raise torch.OutOfMemoryError("out of memory")
        rows = [{"kind": kind, "length": length, "seconds": [1.0, 1.0], "peak_bytes": 1} for kind in TRAINED]
        more = {"device": "cuda", "activation_checkpointing": True, "compile": steps.compile}
        interleaved = length == train.PAPER_LENGTH
        parameters = dict.fromkeys(TRAINED, 7)
        return {**more, "interleaved": interleaved, "parameters": parameters, "rows": rows, "skipped": []}

    noted = []
    monkeypatch.setattr(train, "speed", speed)
    monkeypatch.setattr(Notebook, "note", lambda self, part, found: noted.append(found))
    now = time.time()
    book = Notebook(tmp_path, "train", False)
    place = Place(tmp_path, False, torch.device("cpu"), book, "1.3B", now + 60, 20.0, now + 60)
    if compiled:
        assert train.cost("1.3B", True, place) == noted[0]
        assert [found["lengths"] for found in noted] == [[8192]]
        return
    with pytest.raises(torch.OutOfMemoryError):
        train.cost("1.3B", False, place)
    assert [found["lengths"] for found in noted] == [[8192], [2048, 8192]]
    assert [row["length"] for row in noted[1]["rows"]] == [8192] * 3 + [2048] * 3
    assert [found["interleaved"] for found in noted] == [True, False]
    assert len(train.summarise({"1.3B": noted[1]}).tables[1].rows) == 2
