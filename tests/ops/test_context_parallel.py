"""A sequence cut over ranks is the same retention: outputs, states and gradients, and bytes that do not grow with it."""

import pytest
import torch
import torch.distributed as dist

from retnet.ops.context_parallel import Stretch, context_parallel_retention, cut, entering_state
from tests.helpers.parity import random_inputs
from tests.helpers.ranks import launch


def check(found: list[dict], least: int) -> None:
    assert all(len(cases) >= least for cases in found)
    for rank, cases in enumerate(found):
        for name, errors in cases.items():
            limit = 2e-2 if name == "bf16" else 1e-10
            assert all(error <= limit for error in errors.values()), (rank, name, errors)


@pytest.mark.slow
def test_two_ranks(tmp_path):
    check(launch("tests.ops.stretches", 2, tmp_path), 25)


@pytest.mark.slow
def test_four_ranks_and_64k_tokens(tmp_path):
    found = launch("tests.ops.stretches", 4, tmp_path, "long")
    check(found, 26)
    assert found[3]["65536 tokens"]["final"] < 1e-10


class TestCut:
    """What every rank knows without asking; of four ranks, without processes."""

    @pytest.fixture(autouse=True)
    def _ranks(self, monkeypatch):
        monkeypatch.setattr(dist, "get_world_size", lambda group: 4)
        monkeypatch.setattr(dist, "get_rank", lambda group: group)

    def test_equal_stretches_up_to_a_token(self):
        stretches = [cut(10, rank) for rank in range(4)]
        assert [s.length for s in stretches] == [2, 3, 2, 3]
        assert [s.seen for s in stretches] == [0, 2, 5, 7]
        assert all(s.crossed and s.cu_seqlens is None for s in stretches)
        assert stretches[3].distance(0, 3) == 5
        assert stretches[3].distance(2, 3) == 0
        assert stretches[3].distance(3, 3) is None

    def test_documents(self):
        bounds = torch.tensor([0, 1, 7, 8], dtype=torch.int32)
        stretches = [cut(8, rank, bounds) for rank in range(4)]
        assert [s.cu_seqlens.tolist() for s in stretches] == [[0, 1, 2], [0, 2], [0, 2], [0, 1, 2]]
        assert [s.positions().tolist() for s in stretches] == [[0, 0], [1], [3], [5, 0]]
        assert stretches[0].distance(0, 3) == 4
        assert not cut(8, 0, torch.tensor([0, 2, 4, 6, 8])).crossed

    def test_every_document_begins_on_one_rank(self):
        bounds = torch.tensor([0, 0, 2, 2, 5, 5, 8, 8])
        stretches = [cut(8, rank, bounds) for rank in range(4)]
        assert [s.starts for s in stretches] == [(0, 0), (0, 0), (0, 1, 1), (0, 2)]

    def test_mistakes(self):
        with pytest.raises(ValueError, match=r"bounds is \[0, 5, 8\]; allowed: 5 numbers for 4 ranks"):
            cut(8, 0, bounds=[0, 5, 8])
        with pytest.raises(
            ValueError, match=r"cu_seqlens is \[0, 7\]; allowed: non-decreasing from 0 to T = 8"
        ):
            cut(8, 0, torch.tensor([0, 7]))
        q, k, v, state = (x.detach() for x in random_inputs(1, 3, 2, 4, 4))
        decay = torch.zeros(2)
        with pytest.raises(ValueError, match="q has 3 tokens; allowed: those of rank 0's stretch, 2"):
            context_parallel_retention(q, k, v, decay, cut(8, 0))
        with pytest.raises(ValueError, match="rank 1 has a state of its own; allowed: None"):
            entering_state(k, v, decay, cut(12, 1), state)
        with pytest.raises(ValueError, match="log_decay requires a gradient"):
            entering_state(k, v, decay.requires_grad_(), cut(12, 1))

    def test_no_exchange_where_no_document_crosses(self, monkeypatch):
        monkeypatch.setattr(dist, "all_gather_single", None)
        q, k, v, _ = random_inputs(1, 2, 2, 4, 4)
        stretch = cut(8, 1, torch.tensor([0, 2, 4, 8]))
        assert isinstance(stretch, Stretch)
        assert stretch.crossed  # two other ranks share a document
        stretch = cut(8, 1, torch.tensor([0, 2, 4, 6, 8]))
        out, _ = context_parallel_retention(q, k, v, torch.zeros(2).double(), stretch, backend="torch")
        assert out.shape == v.shape
