"""On every mesh of processes gradients are those of one process; a mesh that cannot be is refused with those that can."""

from dataclasses import replace

import pytest

from retnet.mixers import GatedRetentionConfig, RetentionConfig, SoftmaxConfig
from retnet.settings import UserError
from retnet.train.config import ParallelConfig, RunConfig
from retnet.train.start import check_cut
from tests.helpers.ranks import launch


def check(found: list[dict], least: int) -> None:
    for rank, cases in enumerate(found):
        assert len(cases) >= least
        for name, errors in cases.items():
            assert errors.pop("loss") < 1e-6, (rank, name)  # it is made of fp32 logits
            assert max(errors.values()) < 1e-10, (rank, name, errors)


@pytest.mark.slow
def test_two_processes(tmp_path):
    check(launch("tests.train.meshes", 2, tmp_path), 11)


@pytest.mark.slow
def test_four_processes(tmp_path):
    check(launch("tests.train.meshes", 4, tmp_path), 24)


class TestAxes:
    def test_what_is_left_shards(self):
        assert ParallelConfig().of(1) == ParallelConfig(shard=1)
        assert ParallelConfig(replicate=2, cp=2).of(16) == ParallelConfig(replicate=2, shard=4, cp=2)
        assert ParallelConfig(replicate=2, cp=2).of(16).readers == 8

    @pytest.mark.parametrize(
        ("given", "processes", "says"),
        [
            (
                ParallelConfig(replicate=2, shard=1),
                4,
                "parallel.replicate 2 × shard 1 × cp 1 makes 2 processes, and there are 4; set --parallel.replicate 4 or "
                "--parallel.shard 2 or --parallel.cp 2, or start 2 with torchrun --nproc-per-node 2",
            ),
            (
                ParallelConfig(cp=2),
                1,
                "there are 1; set --parallel.cp 1, or start 2 with torchrun --nproc-per-node 2",
            ),
            (
                ParallelConfig(replicate=3, cp=5),
                7,
                "makes 15 processes, and there are 7; start 15 with torchrun",
            ),
        ],
    )
    def test_others_are_refused_with_what_would_do(self, given, processes, says):
        with pytest.raises(UserError) as error:
            given.of(processes)
        assert says in str(error.value)


def test_mixers_that_need_whole_sequences_are_refused_by_name():
    run = RunConfig(parallel=ParallelConfig(cp=2))
    check_cut(run)
    for mixer, name in (
        (SoftmaxConfig(), "the mixer 'softmax'"),
        (GatedRetentionConfig(), "the mixer 'gated_retention'"),
        (RetentionConfig(score_norm="torchscale"), "score_norm = 'torchscale'"),
    ):
        wanted = replace(run, model=replace(run.model, mixer=mixer))
        with pytest.raises(UserError, match=rf"parallel\.cp is 2, but {name} needs whole sequences"):
            check_cut(wanted)
        check_cut(replace(wanted, parallel=ParallelConfig()))
    hybrid = replace(run.model, num_layers=4, layers=("retention", "softmax"))
    with pytest.raises(UserError, match="but the mixer 'softmax' needs whole sequences"):
        check_cut(replace(run, model=hybrid))
    with pytest.raises(UserError, match=r"parallel\.cp is 64, more than the 4 tokens of a pass"):
        check_cut(
            replace(run, parallel=ParallelConfig(cp=64), train=replace(run.train, batch_size=2, seq_len=2))
        )
