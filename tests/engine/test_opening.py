"""What `retnet generate`, `eval` and `convert` are pointed at: runs, what lies in them, folders of other libraries."""

import shutil

import pytest
import torch

from retnet.convert import convert, folder_of, read
from retnet.data import Tokenizer
from retnet.engine import Sampling, find_checkpoint, generate, open_run
from retnet.evals.models import check_model, open_model
from retnet.mixers import RetentionConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.model.checkpoint import load_model, model_files, write_checkpoint
from retnet.model.wrapped import unwrapped
from retnet.settings import UserError
from tests.helpers.checkpoints import (
    FLA,
    TORCHSCALE,
    fla_weights,
    save_folder,
    save_torchscale,
    torchscale_weights,
)
from tests.helpers.lazily import hf, needs
from tests.model.hf_helpers import causal_lm, tokens

pytestmark = needs("transformers")

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a2146' * 8}\nsize 12345\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    home = tmp_path_factory.mktemp("runs") / "tiny"
    torch.manual_seed(0)
    mixer = RetentionConfig(num_heads=2, head_norm_affine=True)
    for step in ("step-00000010", "step-00000020"):
        model = LanguageModel(ModelConfig(vocab_size=257, d_model=16, num_layers=2, mixer=mixer))
        files = {**model_files(model), "tokenizer.json": Tokenizer.load("bytes").save}
        write_checkpoint(home / "checkpoints" / step, files)
    (home / "checkpoints" / "best").write_text("step-00000010\n")
    (home / "checkpoints" / "last").write_text("step-00000020\n")
    (home / "config.toml").touch()
    (home / "metrics.jsonl").touch()
    return home


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("folders") / "exported"
    convert(run, path)
    return path


def text(path, **options):
    opened = open_run(path, **options)
    sampling = Sampling(temperature=0.8)
    return generate(opened.model, opened.tokenizer, ["ab"], max_tokens=20, sampling=sampling)[0][0].text


@pytest.mark.parametrize(
    ("inside", "means"),
    [
        ("checkpoints", "step-00000010"),
        ("config.toml", "step-00000010"),
        ("metrics.jsonl", "step-00000010"),
        ("checkpoints/best", "step-00000010"),
        ("checkpoints/last", "step-00000020"),
        ("checkpoints/step-00000020", "step-00000020"),
        ("checkpoints/step-00000020/model.safetensors", "step-00000020"),
        ("checkpoints/step-00000010/manifest.json", "step-00000010"),
    ],
)
def test_a_path_inside_a_run(run, inside, means):
    where = run / "checkpoints" / means
    assert find_checkpoint(run / inside)[0] == where
    assert open_run(run / inside).checkpoint == where
    assert open_model(run / inside).about["path"] == str(where)
    assert "model.safetensors" in read(run / inside).hashes
    check_model(run / inside)


def test_a_file_of_nothing_is_named(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"notes\.txt is a file, and neither of a run nor of a checkpoint"):
        open_run(tmp_path / "notes.txt")


def test_a_hugging_face_folder_is_the_run_it_was_made_of(run, folder):
    for path in (folder, folder / "config.json", folder / "model.safetensors"):
        assert text(path) == text(run)
    assert text(folder, dtype="bfloat16") == text(run, dtype="bfloat16")
    assert text(folder, weights="int8") == text(run, weights="int8")
    with pytest.raises(UserError, match="is no run; leave out the checkpoint name 'best'"):
        open_run(folder, checkpoint="best")


def test_folders_of_others(tmp_path, run):
    other = save_folder(tmp_path / "fla", fla_weights({**FLA, "vocab_size": 257}), {**FLA, "vocab_size": 257})
    with pytest.raises(
        UserError, match=r"no tokenizer .*; `retnet convert .* --to run --tokenizer …` puts one"
    ):
        open_run(other)
    convert(other, tmp_path / "run", to="run")
    with pytest.raises(
        UserError, match=r"no tokenizer .*; `retnet convert .*run DEST --to run --tokenizer …`"
    ):
        open_run(tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "mended", to="run", tokenizer=Tokenizer.load("bytes"))
    assert open_run(tmp_path / "mended").tokenizer.vocab_size == 257
    Tokenizer.load("bytes").save(other / "tokenizer.json")
    assert open_run(other).model.config.vocab_size == 257
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match=r"holds no RetNet that can be run here, but a model of type 'gpt2'"):
        open_run(tmp_path / "gpt2")


def test_a_git_lfs_pointer_in_place_of_a_file(run, folder, tmp_path):
    def pointed(source, *names):
        copy = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(source, copy)
        for name in names:
            (copy / name).write_text(POINTER)
        return copy

    checkpoint = pointed(run / "checkpoints/step-00000010", "model.safetensors")
    ours = pointed(folder, "model.safetensors")
    (ours / "manifest.json").unlink()
    theirs = save_folder(tmp_path / "fla", fla_weights(FLA), FLA)
    (theirs / "model.safetensors").write_text(POINTER)
    scale = save_torchscale(tmp_path / "scale", torchscale_weights(TORCHSCALE), TORCHSCALE)
    scale.write_text(POINTER)
    words = pointed(run / "checkpoints/step-00000010", "tokenizer.json")
    (words / "manifest.json").unlink()
    for call in (
        lambda: open_run(checkpoint),
        lambda: open_run(ours),
        lambda: open_model(ours),
        lambda: read(theirs),
        lambda: read(scale),
        lambda: Tokenizer.load(words),
    ):
        with pytest.raises(UserError, match="it is a Git LFS pointer, not the file itself; `git lfs pull`"):
            call()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."])
class TestWrappers:
    def test_a_state_dict(self, prefix):
        model = causal_lm()
        ids = tokens(1, 5)
        plain = model.to_language_model()
        for one in (plain, model):
            state = {f"{prefix}{name}": x.clone() for name, x in one.state_dict().items()}
            want = {name: x.clone() for name, x in one.state_dict().items()}
            with torch.no_grad():
                for x in one.parameters():
                    x.zero_()
            one.load_state_dict(state)
            assert all(torch.equal(x, want[name]) for name, x in one.state_dict().items())
        with torch.no_grad():
            assert plain(ids).isfinite().all()
        with pytest.raises(RuntimeError, match="Unexpected key"):
            plain.load_state_dict({f"nothing.{name}": x for name, x in plain.state_dict().items()})

    def test_checkpoints_of_others(self, prefix, tmp_path):
        def wrapped(weights):
            return {f"{prefix}{name}": x for name, x in weights.items()}

        plain = torchscale_weights(TORCHSCALE)
        one = read(save_torchscale(tmp_path / "a", plain, TORCHSCALE))
        other = read(save_torchscale(tmp_path / "b", wrapped(plain), TORCHSCALE))
        assert all(torch.equal(other.tensors[name], x) for name, x in one.tensors.items())
        plain = fla_weights(FLA)
        one = read(save_folder(tmp_path / "c", plain, FLA))
        other = read(save_folder(tmp_path / "d", wrapped(plain), FLA))
        assert all(torch.equal(other.tensors[name], x) for name, x in one.tensors.items())

    def test_a_folder_of_ours_is_named_and_converted(self, prefix, folder, tmp_path):
        from safetensors.torch import load_file, save_file

        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        (copy / "manifest.json").unlink()
        weights = load_file(copy / "model.safetensors")
        wrapped = {f"{prefix}{name}": x for name, x in weights.items()}
        save_file(wrapped, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            UserError, match=rf"inside a wrapper, by names such as {prefix}\S+; `retnet convert "
        ):
            hf.RetNetForCausalLM.from_pretrained(copy)
        convert(copy, tmp_path / "mended")
        assert text(tmp_path / "mended") == text(folder) == text(copy)


@pytest.mark.slow
def test_a_compiled_model_is_saved_by_its_own_names(tmp_path):
    torch.manual_seed(0)
    model = LanguageModel(
        ModelConfig(vocab_size=31, d_model=16, num_layers=1, mixer=RetentionConfig(num_heads=2))
    )
    write_checkpoint(tmp_path / "c", model_files(torch.compile(model)))
    loaded = load_model(tmp_path / "c")
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())


def test_a_weight_with_and_without_a_prefix():
    with pytest.raises(UserError, match=r"the weights have a\.weight twice"):
        unwrapped({"a.weight": 1, "module.a.weight": 2})


def test_only_folders_that_say_what_they_are_stand_behind_their_files(tmp_path):
    scale = save_torchscale(tmp_path / "a", torchscale_weights(TORCHSCALE), TORCHSCALE)
    assert folder_of(scale) == scale
    assert read(scale).kind == "torchscale"
