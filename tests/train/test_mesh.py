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
            assert max(errors.values()) < 1e-10, (rank, name, errors)


@pytest.mark.slow
def test_four_processes(tmp_path):
    """What two make on every mesh, test_distributed.py sees in whole runs."""
    check(launch("tests.train.meshes", 4, tmp_path), 28)


class TestAxes:
    def test_what_is_left_shards(self):
        assert ParallelConfig().of(1) == ParallelConfig(shard=1)
        assert ParallelConfig(replicate=2, cp=2).of(16) == ParallelConfig(replicate=2, shard=4, cp=2)
        assert ParallelConfig(replicate=2, cp=2).of(16).readers == 8
        assert ParallelConfig(tp=2, cp=2).of(16) == ParallelConfig(shard=4, tp=2, cp=2)

    @pytest.mark.parametrize(
        ("given", "processes", "says"),
        [
            (
                ParallelConfig(replicate=2, shard=1),
                4,
                "parallel.replicate 2 × shard 1 × tp 1 × cp 1 makes 2 processes, and there are 4; set "
                "--parallel.replicate 4 or --parallel.shard 2 or --parallel.tp 2 or --parallel.cp 2, "
                "or start 2 with torchrun --nproc-per-node 2",
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


class TestHeads:
    """What tensor parallelism cannot cut is refused by name, with what can be."""

    @pytest.mark.parametrize(
        ("tp", "model", "says"),
        [
            (
                2,
                {"layers": ("retention", "rwkv4"), "num_layers": 2},
                "the mixer 'rwkv4' has no heads that stand by themselves; set it to 1 (in training parallel.shard cuts any "
                "weights), or take mixers that can be cut by heads: retention, gated_retention, softmax, linear",
            ),
            (
                4,
                {"mixer": SoftmaxConfig(kv_heads=2, qk_norm=True)},
                "the mixer 'softmax' has 2 heads of keys, which is no multiple of it; set it to 1 or 2",
            ),
            (
                2,
                {"mixer": RetentionConfig(head_norm_groups=1)},
                "the mixer 'retention' normalises its heads in 1 groups, which is no multiple of it; set it to 1",
            ),
            (8, {}, "the mixer 'retention' has 4 heads, which is no multiple of it; set it to 1 or 2 or 4"),
            (
                4,
                {"ffn_dim": 30},
                "an FFN is 30 wide, which is no multiple of it; set another number, or model.ffn_dim to 32",
            ),
            (4, {"vocab_size": 6}, "a vocabulary of 6 leaves the last rank without any; lower it"),
        ],
    )
    def test_refused(self, tp, model, says):
        run = RunConfig(parallel=ParallelConfig(tp=tp))
        with pytest.raises(UserError) as error:
            check_cut(replace(run, model=replace(run.model, **model)))
        assert f"parallel.tp is {tp}, " in str(error.value)
        assert says in str(error.value)
        check_cut(replace(run, model=replace(run.model, **model), parallel=ParallelConfig()))

    def test_muon(self):
        run = RunConfig(parallel=ParallelConfig(tp=2))
        check_cut(run)
        with pytest.raises(UserError, match="'muon' makes updates of whole matrices orthogonal"):
            check_cut(replace(run, train=replace(run.train, optimizer="muon")))
