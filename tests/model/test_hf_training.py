"""Training with transformers' own tools: loss, gradient checkpointing, Trainer with resume, LoRA."""

import pytest
import torch
import torch.nn.functional as F

from retnet.mixers import RetentionConfig
from retnet.model import ModelConfig
from tests.helpers.lazily import hf, transformers
from tests.helpers.parity import relative
from tests.model.hf_helpers import V, causal_lm, language_model, left_padded, tokens


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- loss


def test_the_loss_is_that_of_the_next_tokens():
    model, law, ids = causal_lm("fla", torch.float32), language_model("fla", torch.float32), tokens(3, 8)
    model.requires_grad_(False)
    law.requires_grad_(False)
    labels = ids.clone()
    labels[0, :4] = -100
    want = F.cross_entropy(law(ids)[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1), ignore_index=-100)
    assert float(model(ids, labels=labels).loss) == pytest.approx(float(want), rel=1e-6)
    summed = F.cross_entropy(
        law(ids)[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
    )
    shared = model(ids, labels=labels, num_items_in_batch=torch.tensor(50)).loss
    assert float(shared) == pytest.approx(float(summed) / 50, rel=1e-6)
    loss, logits = model(ids, labels=labels, return_dict=False)[:2]
    assert float(loss) == pytest.approx(float(want), rel=1e-6)
    assert logits.shape == (3, 8, V)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_loss_nor_gradients(side):
    """Rows of 3 to 9 tokens as one padded batch: their losses one by one, summed."""
    rows = [tokens(length, seed=length) for length in (3, 9, 5)]
    ids, mask = left_padded(rows)
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
    count = torch.tensor(sum(len(row) - 1 for row in rows))
    padded, alone = (causal_lm("torchscale").train() for _ in range(2))
    loss = padded(
        ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), num_items_in_batch=count
    ).loss
    loss.backward()
    total = sum(alone(row[None], labels=row[None], num_items_in_batch=count).loss for row in rows)
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)  # transformers sums in fp32
    want = gradients(alone)
    for name, gradient in gradients(padded).items():
        assert relative(gradient, want[name]) < 1e-5, name


def test_padded_logits_are_those_of_the_rows_alone():
    model, law = causal_lm(), language_model()
    rows = [tokens(length, seed=length) for length in (2, 9, 5)]
    ids, mask = left_padded(rows)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, output_hidden_states=True)
        for row, logits in zip(rows, out.logits, strict=True):
            assert relative(logits[-len(row) :], law(row[None])[0]) < 1e-12
            assert not logits[: -len(row)].any()
    assert [x.shape for x in out.hidden_states] == [(3, 9, 16)] * 3
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)


def test_only_the_logits_that_are_wanted():
    model, ids = causal_lm(), tokens(2, 7)
    with torch.no_grad():
        whole = model(ids).logits
        assert relative(model(ids, logits_to_keep=2).logits, whole[:, -2:]) < 1e-14
        assert relative(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, whole[:, [0, 5]]) < 1e-14


def test_gradients_flow_through_a_cache():
    """Training over long texts in pieces: the state carries gradients, one token at a time included."""
    pieces, whole = causal_lm("torchscale").train(), causal_lm("torchscale").train()
    ids = tokens(2, 9)
    cache = hf.RetNetCache()
    logits = [pieces(piece, past_key_values=cache).logits for piece in ids.split((4, 1, 4), dim=1)]
    torch.cat(logits, dim=1).square().sum().backward()
    whole(ids).logits.square().sum().backward()
    want = gradients(whole)
    for name, gradient in gradients(pieces).items():
        assert relative(gradient, want[name]) < 1e-10, name


# ---- gradient checkpointing


class Saved:
    """Counts the bytes that autograd keeps for the backward pass."""

    def __enter__(self):
        self.bytes = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def _pack(self, x):
        self.bytes += x.nbytes
        return x

    def __exit__(self, *error):
        return self.hooks.__exit__(*error)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_gradient_checkpointing_saves_memory_and_changes_nothing(reentrant, padded):
    config = ModelConfig(
        vocab_size=V, d_model=32, num_layers=4, mixer=RetentionConfig(num_heads=2), dropout=0.1
    )
    ids, mask = left_padded([tokens(length, seed=length) for length in (70, 130)])
    found, kept = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = hf.RetNetForCausalLM(hf.RetNetConfig.from_model_config(config)).double().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            assert all(block.gradient_checkpointing for block in model.model.blocks)
        torch.manual_seed(1)  # of the dropout
        with Saved() as saved:
            loss = model(ids, attention_mask=mask if padded else None, labels=ids).loss
        loss.backward()
        found.append(gradients(model))
        kept.append(saved.bytes)
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[1].items():
        assert relative(gradient, found[0][name]) < 1e-6, name
    if not reentrant:  # whose saved tensors do not pass these hooks
        assert kept[1] < kept[0] / 3


# ---- Trainer


def trained(folder, data, **options):
    """Six steps on tiny data with dropout, a checkpoint after three."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        activation_checkpointing=True,
        learning_rate=1e-2,
        save_steps=3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
    )
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=V, d_model=16, num_layers=2, mixer=RetentionConfig(num_heads=2), dropout=0.1
    )
    model = hf.RetNetForCausalLM(hf.RetNetConfig.from_model_config(config))
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train(**options)
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_trainer_resumes_exactly(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in tokens(40, 12)]
    whole, losses = trained(tmp_path, data)
    assert len(losses) == 6
    resumed, repeated = trained(tmp_path, data, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert repeated == losses  # with those of the first three steps, from the checkpoint's log
    want = whole.state_dict()
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, want[name]), name
    opened = hf.RetNetForCausalLM.from_pretrained(tmp_path / "checkpoint-6").state_dict()
    for name, tensor in opened.items():
        assert torch.equal(tensor, want[name]), name
    assert (tmp_path / "checkpoint-6/manifest.json").exists()


# ---- LoRA


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def adapted(peft, dialect="fla", targets="all-linear", model=None):
    model = model or causal_lm(dialect, torch.float32)
    settings = peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM", r=2, init_lora_weights=False)
    return peft.get_peft_model(model, settings).eval()


# PEFT still asks for the old name of a property
old_name = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@old_name
def test_lora_trains_saves_and_merges(peft, tmp_path):
    model, ids = adapted(peft).train(), tokens(4, 9)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(causal_lm("fla", torch.float32), str(tmp_path)).eval()
    with torch.no_grad():
        want = model(ids).logits
        assert torch.equal(loaded(ids).logits, want)
        merged = loaded.merge_and_unload()
        assert type(merged) is hf.RetNetForCausalLM
        assert relative(merged(ids).logits, want) < 1e-5
        assert relative(merged.to_language_model()(ids), want) < 1e-5
        assert relative(causal_lm("fla", torch.float32)(ids).logits, want) > 1e-3


@old_name
def test_decoding_does_not_bypass_adapters(peft):
    """Weights of this size are read by the kernels for decoding, which know nothing of layers wrapped around them."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=V, d_model=128, num_layers=1, mixer=RetentionConfig(num_heads=2), ffn="geglu"
    )
    for targets in (["q_proj", "v_proj"], ["out_proj"], ["fc1"], ["gate"], ["fc2"]):
        model = adapted(
            peft, "", targets, hf.RetNetForCausalLM(hf.RetNetConfig.from_model_config(config)).eval()
        )
        ids = tokens(2, 6)
        with torch.no_grad():
            want, cache = model(ids).logits, hf.RetNetCache()
            got = [model(token, past_key_values=cache).logits for token in ids.split(1, dim=1)]
        assert relative(torch.cat(got, dim=1), want) < 1e-5, targets


@old_name
def test_lora_with_gradient_checkpointing(peft):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = adapted(peft).train()
        if checkpointing:
            model.base_model.model.activation_checkpointing_enable({"use_reentrant": True})
        ids = tokens(2, 9)
        model(ids, labels=ids).loss.backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 10
    for name, gradient in found[1].items():
        assert relative(gradient, found[0][name]) < 1e-5, name


@old_name
def test_a_model_with_adapters_is_no_plain_language_model(peft):
    with pytest.raises(ValueError, match="merge its adapters"):
        adapted(peft).base_model.model.to_language_model()
