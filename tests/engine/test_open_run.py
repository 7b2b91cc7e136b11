import pytest

from retnet.engine import find_checkpoint, open_run
from retnet.settings import UserError


@pytest.fixture
def run(tmp_path):
    """A run with two checkpoints, pointers to both, and what a crash may leave behind."""
    home = tmp_path / "runs" / "tiny" / "checkpoints"
    for step in ("step-00000010", "step-00000020"):
        (home / step).mkdir(parents=True)
        (home / step / "manifest.json").write_text("{}")
    (home / "step-00000030.tmp").mkdir()
    (home / "best").write_text("step-00000010\n")
    (home / "last").write_text("step-00000020\n")
    return home.parent


@pytest.mark.parametrize(
    ("name", "directory", "chosen"),
    [
        (None, "step-00000010", "best"),
        ("best", "step-00000010", "best"),
        ("last", "step-00000020", "last"),
        ("step-00000020", "step-00000020", "step-00000020"),
    ],
)
def test_names_of_checkpoints(run, name, directory, chosen):
    assert find_checkpoint(run, name) == (run / "checkpoints" / directory, chosen)


def test_last_stands_in_for_best_unless_best_was_asked_for(run):
    (run / "checkpoints" / "best").unlink()
    assert find_checkpoint(run) == (run / "checkpoints" / "step-00000020", "last")
    with pytest.raises(UserError, match=r"no checkpoint 'best' in .*known: last, step-00000010"):
        find_checkpoint(run, "best")
    (run / "checkpoints" / "last").unlink()
    assert find_checkpoint(run) == (run / "checkpoints" / "step-00000020", "step-00000020")


def test_a_checkpoint_directory_itself(run):
    path = run / "checkpoints" / "step-00000010"
    assert find_checkpoint(str(path)) == (path, "step-00000010")
    with pytest.raises(UserError, match="is a checkpoint itself; leave out the checkpoint name 'last'"):
        find_checkpoint(path, "last")


def test_mistakes_end_in_a_sentence_that_helps(run, tmp_path):
    with pytest.raises(UserError, match=r"no run at .*tyni; did you mean 'tiny'\?"):
        find_checkpoint(run.parent / "tyni")
    with pytest.raises(UserError, match=r"no run at .*elsewhere$"):
        find_checkpoint(tmp_path / "nowhere" / "elsewhere")
    with pytest.raises(UserError, match=r"neither a run .* nor a checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint 'step-0000020'.*did you mean 'step-00000020'"):
        find_checkpoint(run, "step-0000020")
    with pytest.raises(UserError, match=r"no checkpoint '../../tiny'"):
        find_checkpoint(run, "../../tiny")


def test_a_run_without_a_checkpoint_yet(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has no checkpoint yet"):
        find_checkpoint(tmp_path)


def test_a_pointer_to_nothing_is_named(run):
    (run / "checkpoints" / "best").write_text("step-00000099\n")
    with pytest.raises(
        UserError, match="names 'step-00000099', which is not there; choose from: step-00000010"
    ):
        find_checkpoint(run)


def test_device_and_dtype_that_do_not_exist(run):
    with pytest.raises(UserError, match=r"unknown dtype 'bf16'.*known: float32, bfloat16, float16"):
        open_run(run, dtype="bf16")
    with pytest.raises(UserError, match=r"device 'gpu' cannot be used here: .*known: auto, cpu"):
        open_run(run, device="gpu")
