"""lm-evaluation-harness around our model: its definitions untouched, its numbers those of the model itself."""

import json
import math
from pathlib import Path

import pytest
import torch

from retnet import paper
from retnet.evals.models import open_model
from retnet.settings import UserError
from tests.evals.local_tasks import COUNT, SPLITS, examples, write_tasks
from tests.helpers.fast import few_fast
from tests.helpers.lazily import Lazy, needs

pytestmark = needs("lm_eval")
harness = Lazy("retnet.evals.harness")
DEFINITIONS = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "copa": "super_glue/copa/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "wsc273": "wsc273/default.yaml",
    "winogrande": "winogrande/default.yaml",
    "storycloze_2016": "storycloze/storycloze_2016.yaml",
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Whoever asks for one fails."""

    def refuse(*args, **kwargs):
        raise AssertionError("a network was asked for")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def candidate(checkpoint):
    return open_model(checkpoint)


@pytest.fixture(scope="module")
def outcome(candidate, local):
    return harness.evaluate(candidate, list(paper.TASKS), num_fewshot=(0, 4), batch_size=4, local=local)


def test_all_seven_tasks_run_on_local_files(outcome, local):
    assert [scores.num_fewshot for scores in outcome.scores] == [0, 4]
    for scores in outcome.scores:
        assert list(scores.tasks) == list(paper.TASKS)
        assert set(scores.samples.values()) == {COUNT}
        for task, metrics in scores.tasks.items():
            assert 0 <= metrics["acc"] <= 1
            assert ("acc_norm" in metrics) == (task in ("hellaswag", "piqa"))
    assert len(outcome.files) == sum(map(len, SPLITS.values()))
    assert all(len(digest) == 64 for digest in outcome.files.values())


def plain(value):
    """A setting as one can compare it: functions are loaded anew by each reading of a file."""
    return value.__qualname__ if callable(value) else value


@pytest.mark.parametrize("task", paper.TASKS)
def test_a_local_task_is_the_harness_s_own_but_for_its_files(task, local, tmp_path):
    from lm_eval.tasks import __file__ as definitions
    from lm_eval.tasks._yaml_loader import load_yaml

    loaded = harness.load_tasks([task], local, str(tmp_path))[task]
    theirs = load_yaml(Path(definitions).parent / DEFINITIONS[task])
    for key in theirs.keys() - {"dataset_path", "dataset_name", "tag", "metadata"}:
        assert plain(getattr(loaded.config, key)) == plain(theirs[key]), key
    assert theirs["metadata"]["version"] == loaded.VERSION
    splits = {
        s
        for s in (loaded.config.training_split, loaded.config.validation_split, loaded.config.test_split)
        if s
    }
    assert splits == set(SPLITS[task])


def log_likelihood(model, tokenizer, context, continuation):
    """Nats of a continuation after BOS and a context, by one forward pass of the model itself."""
    ids = [tokenizer.bos_id, *tokenizer.encode(context + continuation)]
    with torch.no_grad():
        logs = model(torch.tensor([ids]))[0].double().log_softmax(-1)
    scored = len(tokenizer.encode(continuation))
    return sum(float(logs[i - 1, ids[i]]) for i in range(len(ids) - scored, len(ids)))


def best(scores):
    return max(range(len(scores)), key=scores.__getitem__)


def test_accuracies_are_those_of_the_model_itself(outcome, candidate):
    """PIQA and Winogrande by hand: BOS first, normalised by characters, or one end after two beginnings."""
    right, right_by_length, right_beginnings = 0, 0, 0
    for i in range(100, 100 + COUNT):
        doc = examples("piqa", i)
        context, choices = f"Question: {doc['goal']}\nAnswer:", [doc["sol1"], doc["sol2"]]
        nats = [log_likelihood(candidate.model, candidate.tokenizer, context, " " + c) for c in choices]
        right += best(nats) == doc["label"]
        right_by_length += best([n / len(c) for n, c in zip(nats, choices, strict=True)]) == doc["label"]
        doc = examples("winogrande", i)
        before, after = doc["sentence"].split("_")
        nats = [
            log_likelihood(candidate.model, candidate.tokenizer, before + name, " " + after.strip())
            for name in (doc["option1"], doc["option2"])
        ]
        right_beginnings += best(nats) == int(doc["answer"]) - 1
    zero_shot = outcome.scores[0].tasks
    assert zero_shot["piqa"]["acc"] == pytest.approx(right / COUNT)
    assert zero_shot["piqa"]["acc_norm"] == pytest.approx(right_by_length / COUNT)
    assert zero_shot["winogrande"]["acc"] == pytest.approx(right_beginnings / COUNT)


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, words, i) for i, words in enumerate(arguments)]


PAIRS = [
    ("", "a text from its beginning"),
    ("The", " cat"),
    ("A longer context, of several words, that makes for much padding beside it:", " x"),
    ("The", " dog and its long, long tail"),
    ("é", "ü"),
]


def test_batches_score_as_one_by_one(candidate):
    """The harness pads on the right, without a mask."""
    one, four = (
        harness.language_model(candidate, size).loglikelihood(requests("loglikelihood", *PAIRS))
        for size in (1, 4)
    )
    for (nats, greedy), (batched, batched_greedy), pair in zip(one, four, PAIRS, strict=True):
        assert batched == pytest.approx(nats, rel=1e-5)
        assert greedy == batched_greedy
        assert nats == pytest.approx(log_likelihood(candidate.model, candidate.tokenizer, *pair), rel=1e-5)


def test_batches_generate_as_one_by_one(candidate):
    """The harness pads on the left, with a mask."""
    options = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
    prompts = [(context or "A", options) for context, _ in PAIRS]
    one, four = (
        harness.language_model(candidate, size).generate_until(requests("generate_until", *prompts))
        for size in (1, 4)
    )
    assert one == four
    assert any(one)


@pytest.mark.parametrize("size", few_fast([1, "auto"], "auto"))
def test_the_batch_size_changes_no_number(outcome, candidate, local, size):
    again = harness.evaluate(
        candidate, ["hellaswag", "wsc273"], num_fewshot=(4,), batch_size=size, local=local
    )
    for task, metrics in again.scores[0].tasks.items():
        assert metrics == pytest.approx(outcome.scores[1].tasks[task])


def test_an_automatic_batch_fits_the_longest_request(candidate):
    model = harness.language_model(candidate)
    short, long, endless = (("", ""), [0] * 9, [0]), (("", ""), [0] * 999, [0]), (("", ""), [0] * 99_999, [0])
    assert model._detect_batch_size([short]) == 64
    assert model._detect_batch_size([short, long], 1) == 8192 // 1000
    assert model._detect_batch_size([endless]) == 1


def test_a_foreign_model(llama_folder, local):
    scores = harness.evaluate(
        open_model(llama_folder), ["piqa"], num_fewshot=(0,), batch_size=4, local=local
    ).scores
    assert scores[0].samples == {"piqa": COUNT}


def test_the_first_questions_only(candidate, local):
    scores = harness.evaluate(candidate, ["copa"], num_fewshot=(0,), limit=1, local=local).scores[0]
    assert scores.samples == {"copa": 1}
    assert all(map(math.isfinite, scores.tasks["copa"].values()))


def test_the_paper_s_table():
    """Its averages, which stand beside the numbers in the paper, follow from them."""
    averages = {
        ("Transformer", 0): 66.07,
        ("RetNet", 0): 69.51,
        ("Transformer", 4): 66.44,
        ("RetNet", 4): 69.76,
    }
    for (model, shots), average in averages.items():
        numbers = paper.accuracies(model, shots, list(paper.TASKS))
        assert sum(numbers) / 7 == pytest.approx(average, abs=0.006)
    assert paper.accuracies("RetNet", 0, ["piqa", "boolq"]) == [75.4, 62.2]
    assert paper.accuracies("RetNet", 1, ["piqa"]) is None


def test_mistakes_end_in_one_sentence(candidate, local, tmp_path):
    def fails(message, *tasks, **options):
        with pytest.raises(UserError, match=message):
            harness.evaluate(candidate, tasks, **options)

    fails("unknown task 'helaswag'; did you mean 'hellaswag'", "piqa", "helaswag", local=local)
    fails(
        r"missing: .*piqa/train.jsonl \(fields goal, sol1, sol2, label\); .*piqa/validation",
        "piqa",
        local=tmp_path,
    )
    fails(
        "copa has 7 examples to choose from; --num-fewshot 7 needs 8", "copa", num_fewshot=(7,), local=local
    )
    (tmp_path / "copa").mkdir()
    for line, message in [
        (
            json.dumps({"premise": "It rained."}),
            r"train.jsonl:1 lacks choice1, choice2, question, label; needed: premise,",
        ),
        ("[1]", "train.jsonl:1 is no JSON object with the fields premise"),
        ("{", "train.jsonl:1 is no JSON object with the fields premise"),
        ("", r"train\.jsonl is empty"),
        ("\n", r"train\.jsonl is empty"),
        ("\udcff", "train.jsonl:1 is no JSON object"),
    ]:
        for split in ("train", "validation"):
            (tmp_path / "copa" / f"{split}.jsonl").write_text(
                line + "\n" * bool(line), errors="surrogateescape"
            )
        fails(message, "copa", local=tmp_path)
    for split in ("train", "validation"):
        rows = [examples("copa", i) | {"question": "why"} for i in range(2)]
        (tmp_path / "copa" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fails(r"cannot load the data of copa: KeyError: 'why'", "copa", local=tmp_path)
    (tmp_path / "winogrande").mkdir()
    for split in ("train", "validation"):
        rows = [examples("winogrande", i) | {"answer": str(1 + 2 * i)} for i in range(2)]
        (tmp_path / "winogrande" / f"{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    fails(r"the local files do not fit their tasks: KeyError: '3'", "winogrande", local=tmp_path)


def test_without_a_network_and_without_files(candidate, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match=r"cannot load the data of storycloze_2016: .*give --local DIR"):
        harness.evaluate(candidate, ["storycloze_2016"])
