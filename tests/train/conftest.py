import pytest

TEXT = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs; é ü 😀.\n"

CONFIG = """
[model]
d_model = 16
num_layers = 2
dropout = 0.1

[model.mixer]
name = "retention"
num_heads = 2

[data]
corpus = "CORPUS"
validation_fraction = 0.06
cache = "CACHE"

[train]
steps = 12
seq_len = 32
batch_size = 2
accumulate = 2
learning_rate = 1e-2
warmup_steps = 2
precision = "fp32"
eval_every = 4
checkpoint_every = 3
log_every = 1
keep = 2
"""


@pytest.fixture(scope="session")
def config_file(tmp_path_factory):
    """A configuration of a tiny model on a small corpus, prepared once for all tests."""
    home = tmp_path_factory.mktemp("train")
    corpus = home / "corpus"
    corpus.mkdir()
    for i in range(24):
        (corpus / f"{i:02d}.txt").write_text(f"Document {i}. " + TEXT * (i % 5 + 1), encoding="utf-8")
    path = home / "tiny.toml"
    path.write_text(
        CONFIG.replace("CORPUS", str(corpus)).replace("CACHE", str(home / "cache")), encoding="utf-8"
    )
    return path
