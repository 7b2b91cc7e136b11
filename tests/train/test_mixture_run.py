"""A run on a mixture: its epochs are in the metrics, and a new phase in mid-run is the same for one that was ended."""

import json
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from retnet.data.config import MixturePhase
from retnet.settings import UserError
from retnet.train.progress import TrainingProgress
from retnet.train.trainer import train
from tests.train.runs import Fails, equal, tiny, weights


def test_a_mixture_is_resumed_across_a_phase(config_file, tmp_path):
    run = tiny(config_file, steps=5, checkpoint_every=2, eval_every=0)
    corpora = (f"{run.data.corpus}/0*.txt", f"{run.data.corpus}/1*.txt")
    run = replace(
        run, data=replace(run.data, corpus=corpora, weights=(3.0, 1.0), phases=(MixturePhase(3, (0.0, 1.0)),))
    )
    said = StringIO()
    late = replace(run.data, phases=(*run.data.phases, MixturePhase(5, (1.0, 0.0))))
    train(
        replace(run, data=late), tmp_path / "whole", progress=TrainingProgress(Console(file=said, width=400))
    )
    assert "the data.phases from step 5 on never begin, since there are 5 steps" in said.getvalue()
    with pytest.raises(RuntimeError, match="a bug"):
        train(run, tmp_path / "run", progress=Fails(3))
    other = replace(run, data=replace(run.data, weights=(1.0, 1.0)))
    with pytest.raises(UserError, match=r"data\.weights"):
        train(other, tmp_path / "run", begin="resume")
    early = replace(run.data, phases=(MixturePhase(1, (1.0, 0.0)), *run.data.phases))
    with pytest.raises(UserError, match=r"data\.phases"):
        train(replace(run, data=early), tmp_path / "run", begin="resume")
    later = replace(run, data=replace(run.data, phases=(*run.data.phases, MixturePhase(4, (0.0, 2.0)))))
    train(later, tmp_path / "run", begin="resume")
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, second = ([line[f"epochs/{corpus}"] for line in lines if "loss" in line] for corpus in corpora)
    # four rows a step: three and one of them, and from the fourth step on all of the second corpus
    assert [round(times / first[0], 6) for times in first] == [1, 2, 3, 3, 3]
    assert [round(times / second[0], 6) for times in second] == [1, 2, 3, 7, 11]
