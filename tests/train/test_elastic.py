"""What attempts of torchrun leave for the next ones; its environment is played."""

import signal

import pytest

from retnet.settings import UserError
from retnet.train import elastic, signals
from retnet.train.trainer import train
from tests.train.runs import tiny


@pytest.fixture
def again(tmp_path, monkeypatch):
    """Begins an attempt of one launch; whether torchrun counts it depends on where the one before failed."""
    monkeypatch.setattr(elastic, "_noted", set())

    def again(attempt: int) -> None:
        folder = tmp_path / f"launch/attempt_{attempt}/0"
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        elastic._noted.clear()  # it is another process

    return again


@pytest.mark.parametrize("counted", [1, 0])
def test_an_attempt_goes_on_with_what_the_one_before_began(counted, config_file, tmp_path, again):
    again(0)
    train(tiny(config_file, steps=3), tmp_path / "run")
    with pytest.raises(UserError, match="already holds a run"):  # the same attempt must say what it means
        train(tiny(config_file, steps=4), tmp_path / "run")
    again(counted)
    assert train(tiny(config_file, steps=4), tmp_path / "run").step == 4
    with pytest.raises(UserError, match="already holds a run"):
        train(tiny(config_file), tmp_path / "run")


def test_only_torchruns_own_folder_is_written_to(tmp_path, monkeypatch, again):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "a/b/c/error.json"))
    elastic.note(elastic.MISTAKE)
    assert not list(tmp_path.iterdir())
    again(0)
    elastic.note(elastic.MISTAKE)
    assert not elastic.said()
    again(0)
    assert not elastic.said()  # another process of this attempt may have said it just now, and must be heard
    again(1)
    assert elastic.said()


@pytest.mark.parametrize("number", signals.STOPPING)
def test_a_signal_that_torchrun_hands_on_is_no_second_one(number, monkeypatch):
    with signals.signals() as received:
        signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a job")
    with signals.signals() as received:
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert received == [number]
        monkeypatch.setattr(signals, "TOGETHER", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
