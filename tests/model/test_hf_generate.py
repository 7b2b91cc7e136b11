"""`generate` with the recurrent cache equals plain loops over whole sequences, however it is asked."""

import copy
from functools import cache as memo

import pytest
import torch

from retnet.data import Tokenizer
from retnet.mixers import RetentionConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.settings import UserError
from tests.helpers.fast import few_fast
from tests.helpers.kinds import KINDS, configured
from tests.helpers.lazily import hf, transformers
from tests.helpers.parity import relative
from tests.model.hf_helpers import DIALECTS, V, beam, causal_lm, greedy, language_model, left_padded, tokens

NEW = 6


@memo
def pair(dialect="paper"):
    return causal_lm(dialect), language_model(dialect)


def generate(model, ids, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, **options)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_greedy(dialect):
    model, law = pair(dialect)
    rows = tokens(3, 9)
    want = torch.stack([greedy(law, row, NEW) for row in rows])
    assert torch.equal(generate(model, rows), want)
    assert torch.equal(generate(model, rows, use_cache=False), want)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("chunk", few_fast([None, 1, 3, 100], None, 3))
def test_left_padded_batches(dialect, chunk):
    model, law = pair(dialect)
    rows = [tokens(length, seed=length) for length in (2, 11, 1, 7)]
    ids, mask = left_padded(rows)
    got = generate(model, ids, attention_mask=mask, prefill_chunk_size=chunk)
    for row, continued in zip(rows, got, strict=True):
        assert torch.equal(continued[ids.shape[1] - len(row) :], greedy(law, row, NEW))
    assert torch.equal(got, generate(model, ids, attention_mask=mask, use_cache=False))


@pytest.mark.parametrize("chunk", [1, 4])
def test_prefill_in_chunks_without_padding(chunk):
    model, law = pair()
    row = tokens(10)
    assert torch.equal(generate(model, row[None], prefill_chunk_size=chunk)[0], greedy(law, row, NEW))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_beam_search(dialect):
    model, law = pair(dialect)
    rows = [tokens(length, seed=length) for length in (4, 9)]
    ids, mask = left_padded(rows)
    got = generate(
        model,
        ids,
        attention_mask=mask,
        num_beams=3,
        num_return_sequences=2,
        return_dict_in_generate=True,
        output_scores=True,
        length_penalty=0.0,
    )
    for i, row in enumerate(rows):
        for j, (score, best) in enumerate(beam(law, row, NEW, 3)[:2]):
            assert torch.equal(got.sequences[2 * i + j][ids.shape[1] - len(row) :], best)
            assert float(got.sequences_scores[2 * i + j]) == pytest.approx(score, abs=1e-4)


def test_beam_search_continues_a_cache():
    model, law = pair()
    row = tokens(8)
    with torch.no_grad():
        cache = model(row[None, :5]).past_key_values
    got = generate(model, row[None], past_key_values=cache, num_beams=3, length_penalty=0.0)[0]
    assert torch.equal(got, beam(law, row, NEW, 3)[0][1])


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8}])
def test_sampling(options):
    """Seeded draws are those made from the probabilities of whole sequences, for each of n samples."""
    model, law = pair()
    options = {"do_sample": True, "num_return_sequences": 3, "top_k": 0, **options}
    row = tokens(5)
    torch.manual_seed(1)
    got = generate(model, row[None], **options)
    torch.manual_seed(1)
    assert torch.equal(got, generate(model, row[None], use_cache=False, **options))
    if set(options) == {"do_sample", "num_return_sequences", "top_k"}:  # the law itself, where it is one line
        torch.manual_seed(1)
        rows = row.repeat(3, 1)
        with torch.no_grad():
            for _ in range(NEW):
                drawn = law(rows)[:, -1].float().softmax(-1).multinomial(1)
                rows = torch.cat([rows, drawn], dim=1)
        assert torch.equal(got, rows)
    assert len({tuple(r.tolist()) for r in got}) > 1


def test_continuing_from_a_returned_cache():
    model, law = pair("torchscale")
    rows = [tokens(length, seed=length) for length in (3, 8)]
    ids, mask = left_padded(rows)
    first = generate(model, ids, attention_mask=mask, return_dict_in_generate=True)
    more = tokens(2, 4, seed=5)
    longer = torch.cat([first.sequences, more], dim=1)
    mask = torch.cat([mask, torch.ones(2, NEW + 4, dtype=torch.long)], dim=1)
    got = generate(model, longer, attention_mask=mask, past_key_values=first.past_key_values)
    for row, start, end, continued in zip(rows, first.sequences, more, got, strict=True):
        whole = torch.cat([start[len(start) - NEW - len(row) :], end])
        assert torch.equal(whole[: len(row) + NEW], greedy(law, row, NEW))
        assert torch.equal(continued[-len(whole) - NEW :], greedy(law, whole, NEW))


def test_forked_caches_are_independent():
    model, law = pair()
    row = tokens(9)
    with torch.no_grad():
        cache = model(row[None, :6]).past_key_values
    forks = {seed: copy.deepcopy(cache) for seed in (1, 2)}
    for seed, fork in forks.items():
        text = torch.cat([row[:6], tokens(3, seed=seed)])
        assert torch.equal(generate(model, text[None], past_key_values=fork)[0], greedy(law, text, NEW))
    assert torch.equal(generate(model, row[None], past_key_values=cache)[0], greedy(law, row, NEW))
    assert cache.get_seq_length() == len(row) + NEW - 1


def test_a_cache_made_in_inference_mode_goes_on_outside():
    model, law = pair()
    row = tokens(9)
    with torch.inference_mode():
        cache = model(row[None, :6]).past_key_values
    assert torch.equal(generate(model, row[None], past_key_values=cache)[0], greedy(law, row, NEW))


def test_steps_and_prefills_are_the_whole_sequence():
    for dialect in DIALECTS:
        model, law = pair(dialect)
        ids = tokens(2, 12)
        with torch.no_grad():
            want, cache, got = law(ids), hf.RetNetCache(), []
            for piece in ids.split((1, 4, 1, 1, 5), dim=1):
                got.append(model(piece, past_key_values=cache).logits)
        assert relative(torch.cat(got, dim=1), want) < 1e-12
        assert cache.get_seq_length() == 12


@pytest.mark.parametrize("name", KINDS)
def test_any_mixer(name):
    """The cache knows no mixer: rows are padded, chosen, repeated and continued alike."""
    torch.manual_seed(0)
    law = LanguageModel(configured(name, vocab_size=V, d_model=16, num_layers=2)).double().eval()
    model = hf.RetNetForCausalLM.from_language_model(law)
    rows = [tokens(length, seed=length) for length in (4, 9)]
    ids, mask = left_padded(rows)
    got = generate(model, ids, attention_mask=mask, num_beams=2, length_penalty=0.0)
    for row, continued in zip(rows, got, strict=True):
        assert torch.equal(continued[ids.shape[1] - len(row) :], beam(law, row, NEW, 2)[0][1])


def test_a_finished_row_does_not_disturb_the_others():
    model, law = pair()
    rows = tokens(4, 6)
    want = [greedy(law, row, NEW) for row in rows]
    end = int(want[0][7])  # the first row ends after two tokens
    got = generate(model, rows, eos_token_id=end, pad_token_id=0)
    for continued, whole in zip(got, want, strict=True):
        new = whole[6:].tolist()
        new = new[: new.index(end) + 1] if end in new else new
        assert continued[6:].tolist() == (new + [0] * NEW)[: got.shape[1] - 6]


def test_embeddings_in_place_of_tokens():
    model, law = pair("torchscale")
    row = tokens(7)
    embeds = model.get_input_embeddings()(row[None])
    got = generate(model, None, inputs_embeds=embeds)
    assert torch.equal(got[0], greedy(law, row, NEW)[7:])


def test_batch_operations_of_the_cache():
    model, law = pair()
    ids, after = tokens(3, 5), tokens(4, 3, seed=2)
    with torch.no_grad():
        cache = model(ids).past_key_values
        cache.batch_repeat_interleave(2)  # 0 0 1 1 2 2
        cache.batch_select_indices(torch.tensor([5, 0, 3]))  # 2 0 1
        cache.reorder_cache(torch.tensor([1, 1, 0, 2]))  # 0 0 2 1
        want = law(torch.cat([ids[[0, 0, 2, 1]], after], dim=1))[:, 5:]
        assert relative(model(after, past_key_values=cache).logits, want) < 1e-12
        assert cache.batch_size == 4
        cache.batch_select_indices(torch.tensor([True, False, False, True]))
    assert (cache.batch_size, cache.get_seq_length(), len(cache)) == (2, 8, 2)
    cache.reset()
    assert (cache.batch_size, cache.get_seq_length(), cache.has_previous_state()) == (-1, 0, False)


def test_a_mixer_that_no_state_can_carry_runs_without_a_cache():
    torch.manual_seed(0)
    mixer = RetentionConfig(num_heads=2, head_norm="rms", score_norm="torchscale")
    law = LanguageModel(ModelConfig(vocab_size=V, d_model=16, num_layers=2, mixer=mixer)).double().eval()
    model = hf.RetNetForCausalLM.from_language_model(law)
    row = tokens(6)
    with torch.no_grad():
        out = model(row[None])
        assert relative(out.logits, law(row[None])) < 1e-14
    assert out.past_key_values is None
    assert torch.equal(generate(model, row[None])[0], greedy(law, row, NEW))
    with pytest.raises(UserError, match="torchscale"):
        generate(model, row[None], use_cache=True)


def test_what_a_recurrent_state_cannot_do_is_said():
    model, _ = pair()
    ids = tokens(1, 5)
    with torch.no_grad():
        cache = model(ids).past_key_values
    assert not cache.is_croppable
    assert not cache.is_compileable
    cache.crop(0)
    with pytest.raises(UserError, match=r"cannot forget its last tokens.*copy.deepcopy"):
        cache.crop(-1)
    with pytest.raises(UserError, match="takes no keys and values"):
        cache.update(ids, ids, 0)
    for kind in ("static", "offloaded", "quantized"):
        with pytest.raises(UserError, match=f"cache_implementation is '{kind}'.*leave it unset"):
            generate(model, ids, cache_implementation=kind)
    with pytest.raises(UserError, match="past_key_values is a DynamicCache"):
        generate(model, ids, past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(model, ids, assistant_model=model)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(model, ids, prompt_lookup_num_tokens=2)
    with pytest.raises(UserError, match="generate_batch pages keys and values"):
        model.generate_batch([[1, 2, 3]], max_new_tokens=3)
    with pytest.raises(UserError, match="no attention weights"):
        model(ids, output_attentions=True)


def test_what_tokenizers_and_defaults_pass_is_taken():
    model, _ = pair()
    ids = tokens(2, 5)
    want, zeros = generate(model, ids), torch.zeros_like(ids)
    assert torch.equal(generate(model, ids, token_type_ids=zeros), want)
    assert torch.equal(generate(model, ids, cache_implementation="dynamic"), want)
    assert torch.equal(model(ids, token_type_ids=zeros).logits, model(ids).logits)
    for call in (
        lambda: generate(model, ids, token_type_ids=zeros + 1),
        lambda: model(ids, token_type_ids=zeros + 1),
        lambda: model.model(ids, token_type_ids=zeros + 1),
    ):
        with pytest.raises(UserError, match="token_type_ids tell segments of a text apart"):
            call()


def test_mistakes_are_answered():
    model, _ = pair()
    ids = tokens(2, 5)
    with torch.no_grad():
        cache = model(ids).past_key_values
    for call, message in (
        (lambda: model(ids[:1], past_key_values=cache), "the cache has 2 rows, the input 1"),
        (lambda: model(), "either input_ids or inputs_embeds"),
        (lambda: model(ids, attention_mask=torch.ones(2, 3)), r"attention_mask has shape \(2, 3\)"),
        (lambda: model(ids, attention_mask=torch.ones(2, 1, 5, 5)), r"allowed: \[B,T\] = \(2, 5\)"),
        (lambda: model(ids, position_ids=ids), "forward takes no position_ids; positions come from"),
        (lambda: model(ids, head_mask=ids), "forward takes no head_mask; leave it out"),
        (
            lambda: generate(model, ids, attention_mask=torch.tensor([[1, 1, 1, 1, 0], [1] * 5])),
            "pad on the left",
        ),
        (lambda: generate(model, ids, past_key_values=cache), "has read 5 tokens.* 5"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_generation_settings_come_from_the_configuration():
    model = causal_lm(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    found = model.generation_config
    assert isinstance(found, transformers.GenerationConfig)
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, 2, 3)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"use_cache": False}]
)
def test_stop_strings_as_for_a_llama(options, tmp_path):
    """What `generate` hands on beside the model's own arguments is accepted, as any model of transformers does."""
    tokenizer = hf.hf_tokenizer(Tokenizer.load("bytes"))
    sizes = {"vocab_size": 257, "num_hidden_layers": 1}
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, hidden_size=16, intermediate_size=16, num_attention_heads=2)
    )
    ours = hf.RetNetForCausalLM.from_language_model(
        LanguageModel(
            ModelConfig(vocab_size=257, d_model=16, num_layers=1, mixer=RetentionConfig(num_heads=2))
        )
    )
    batch = tokenizer(["ab"], return_tensors="pt")
    for model in (llama, ours):
        for word, text in (("uu", "abuu"), ("uv", "abvuv")):
            letters = [ord(letter) for letter in word]  # it writes them in turns, whatever its weights
            found = model.generate(
                **batch,
                **{"max_new_tokens": 9, "pad_token_id": 256, "do_sample": False, **options},
                prefix_allowed_tokens_fn=lambda _, row, letters=letters: [letters[len(row) % 2]],
                stop_strings=[word],
                tokenizer=tokenizer,
            )
            assert {tokenizer.decode(row, skip_special_tokens=True) for row in found} == {text}


def test_everything_that_generate_has_to_hand_on():
    """A streamer, token healing, guidance, constraints on tokens: asked of the model, they end in text, not in an error."""
    model = hf.RetNetForCausalLM.from_language_model(
        LanguageModel(
            ModelConfig(vocab_size=257, d_model=16, num_layers=1, mixer=RetentionConfig(num_heads=2))
        )
    )
    tokenizer = hf.hf_tokenizer(Tokenizer.load("bytes"))
    ids = tokenizer(["ab"], return_tensors="pt").input_ids
    seen = []

    class Streamer:
        def put(self, value):
            seen.append(value)

        def end(self):
            seen.append(None)

    for options in (
        {"streamer": Streamer()},
        {"tokenizer": tokenizer},
        {"tokenizer": tokenizer, "token_healing": True},
        {"guidance_scale": 1.5, "negative_prompt_ids": ids},
        {"prefix_allowed_tokens_fn": lambda batch, row: [97, 98]},
        {
            "output_scores": True,
            "output_logits": True,
            "output_hidden_states": True,
            "return_dict_in_generate": True,
        },
        {"synced_gpus": False, "bad_words_ids": [[97]], "min_new_tokens": 2, "repetition_penalty": 1.1},
        {"stop_strings": "zz", "tokenizer": tokenizer, "prefill_chunk_size": 1},
    ):
        found = generate(model, ids, pad_token_id=256, **options)
        assert getattr(found, "sequences", found).shape[1] > ids.shape[1]
    assert seen[-1] is None
