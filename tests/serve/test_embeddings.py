"""/v1/embeddings: the mean of what the head reads, of unit length, in either format; bad input is refused."""

import base64

import numpy as np
import pytest
import torch

from tests.helpers.serving import refused


@pytest.fixture(scope="module")
def law(tiny, tokenizer):
    """The vector by definition: one forward pass."""

    @torch.inference_mode()
    def vector(prompt):
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
        mean = tiny.features(torch.tensor([ids]))[0].double().mean(0)
        return (mean / mean.norm()).numpy()

    return vector


def vectors(response):
    assert response.status_code == 200, response.text
    found = response.json()
    assert [each["index"] for each in found["data"]] == list(range(len(found["data"])))
    return found, [each["embedding"] for each in found["data"]]


@pytest.mark.parametrize(
    "given",
    ["a", "zwölf Bäume \0", "x" * 1000, [1, 2, 3], ["a", "b" * 300], [[1], [5, 6]]],
    ids=range(6),
)
def test_vectors_are_what_they_are_said_to_be(http, law, given):
    inputs = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    found, numbers = vectors(http.post("/v1/embeddings", json={"input": given}))
    assert len(numbers) == len(inputs)
    for each, vector in zip(inputs, numbers, strict=True):
        np.testing.assert_allclose(vector, law(each), atol=1e-5)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] > 0
    _, coded = vectors(http.post("/v1/embeddings", json={"input": given, "encoding_format": "base64"}))
    for text, vector in zip(coded, numbers, strict=True):
        np.testing.assert_array_equal(np.frombuffer(base64.b64decode(text), "<f4"), np.float32(vector))


@pytest.mark.slow
def test_the_official_client(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    found = client.embeddings.create(model="tiny", input=["one", "two"])  # it asks for base64
    assert [len(each.embedding) for each in found.data] == [32, 32]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "input is missing"),
        ({"input": ""}, "empty text"),
        ({"input": ["a", ""]}, "empty text"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", 1]}, "input must be a string, a list of strings"),
        ({"input": [1, -1]}, "input"),
        ({"input": [257]}, "token id 257"),
        ({"input": [True]}, "input"),
        ({"input": 1.5}, "input"),
        ({"input": None}, "input is missing"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "dimensions": 3}, "dimensions is not supported"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format must be"),
        ({"input": "a", "inputs": "b"}, "no field 'inputs'"),
        ({"input": [1] * 1_048_577}, "1,048,577 tokens"),
    ],
    ids=range(16),
)
def test_bad_bodies(http, body, message):
    assert message in refused(http.post("/v1/embeddings", json=body))
    assert http.post("/v1/embeddings", json={"input": "a"}).status_code == 200
