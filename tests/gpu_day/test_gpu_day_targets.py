"""What a GPU should show, from the records alone."""

import re

import pytest
import torch

from tools.gpu_day import targets

pytest.importorskip("triton")


class TestTargets:
    """A line for each, from the records alone."""

    def steps(self, factor):
        """Everything is this many times what is wanted."""

        def some(x):
            return {"median": x, "low": x, "high": x}

        def row(name, length, times):
            return {"name": name, "mode": "forward + backward", "length": length, "times_ours": some(times)}

        sizes = {"key_dim": 256, "value_dim": 512}
        times = [512, 4096, 131072]
        return {
            "verify": {"heads": {"cases": 9, "right": 9, "wrong": []}},
            "ops": {
                "kernels": {"rows": [{"kernel": "OUT o", **sizes, "of_products": some(0.6 * factor)}]},
                "256-512": {
                    "rows": [
                        row(name, n, 0.1 if n == 512 else factor)
                        for name in ("SDPA, H·K wide", "SDPA, H·V wide")
                        for n in times
                    ]
                },
                "fla-256-512": {"rows": [row("flash-linear-attention, chunk", 2048, 3 * factor)]},
                "fla-64-64": {"rows": [row("flash-linear-attention, fused", 2048, factor)]},
                "fla-128-128": {"rows": [row("flash-linear-attention, fused", 2048, factor)]},
            },
            "decode": {
                "steps": {
                    "steps": [
                        {"batch": 1, **sizes, "of_bandwidth": some(0.1)},
                        {"batch": 8, **sizes, "of_bandwidth": some(0.8 * factor)},
                    ]
                }
            },
            "train": {
                label: {
                    "rows": [
                        {"kind": "RetNet", "length": 8192, "seconds": [1.0, 1.0], "peak_bytes": 100},
                        {
                            "kind": "Transformer + FlashAttention",
                            "length": 8192,
                            "seconds": [factor, factor],
                            "peak_bytes": 100 * factor,
                        },
                    ]
                }
                for label in ("1.3B", "350M")
            },
        }

    @pytest.mark.parametrize(("factor", "met"), [(1.1, "yes"), (0.9, "no")])
    def test_met_or_not(self, factor, met):
        rows = targets.summarise(self.steps(factor)).tables[0].rows
        assert [row[-1] for row in rows] == ["yes", *[met] * (len(rows) - 1)]
        assert len(rows) == 12

    @pytest.mark.parametrize("step", ["verify", "ops", "decode", "train"])
    def test_what_was_not_measured_is_neither(self, step):
        steps = self.steps(1.1)
        del steps[step]
        shown = targets.summarise(steps)
        open_ = [row for row in shown.tables[0].rows if row[-1] == "not known"]
        assert {row[2] for row in open_} == {"not measured"}
        assert f"{len(open_)} were not measured" in shown.findings[0]
        assert targets.summarise({}).findings[0].startswith("0 of 12 targets are met, 0 are not, 12")

    def test_a_wrong_kernel_comes_first(self):
        steps = self.steps(1.1)
        steps["verify"]["heads"]["wrong"] = [{}]
        shown = targets.summarise(steps)
        assert shown.tables[0].rows[0][2:] == ("1 of 9", "heads 1", "no")
        assert "no speed of it counts" in shown.findings[1]


def test_what_a_peer_is_not_measured_at_is_said():
    """FlashAttention, forward + backward at 131,072 tokens: a second a call."""
    from retnet.bench.implementations import for_device, implementations_on
    from retnet.bench.ops import _not_measured
    from retnet.bench.ops_summary import _not_measured as sentences
    from tools.gpu_day.ops import LENGTHS, SHAPES

    shape = SHAPES["256-512"]
    bench = for_device(torch.device("cuda"), shapes=(shape,), lengths=LENGTHS)
    peers = {shape: implementations_on(torch.device("cpu"), shape)}
    said = "\n".join(sentences({"not_measured": _not_measured(bench, peers)}, tuple(shape)))
    assert re.search(r"SDPA, H·V wide, forward \+ backward, T 131,072: a call takes [\d,]+ Gflop", said)
    assert "retnet, reference, forward and forward + backward, T 2,048, 4,096" in said
    assert 4096 in LENGTHS


def test_ratios_of_training_stand_beside_the_published_ones():
    """Tokens/s and memory of each Transformer against RetNet's, at the paper's length."""
    from retnet.paper import TRAINED, TRAINING_COST
    from tools.gpu_day.train import summarise

    rows = [
        {"kind": kind, "length": 8192, "seconds": [seconds, seconds], "peak_bytes": peak}
        for kind, seconds, peak in zip(TRAINED, (3.0, 2.0, 1.0), (400, 300, 100), strict=True)
    ]
    found = {"size": "1.3B", "lengths": [8192], "tokens": 8192, "rows": rows, "parameters": {}, "skipped": []}
    table = summarise({"1.3B-compiled": found}).tables[0]
    memory, words = TRAINING_COST["1.3B"]
    assert [row[2] for row in table.rows] == ["3 (3..3)", "2 (2..2)"]
    assert [row[3] for row in table.rows] == [f"{words[2] / words[n]:.2f}" for n in (0, 1)]
    assert [row[4] for row in table.rows] == ["4.00", "3.00"]
    assert [row[5] for row in table.rows] == [f"{memory[n] / memory[2]:.2f}" for n in (0, 1)]
    assert table.rows[0][0] == "1.3B, compiled"
