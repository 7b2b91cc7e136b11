"""OpenAI's responses and Anthropic's messages say what chat completions say, and remember what was said."""

import json

import pytest

from retnet.serve import response_store
from tests.helpers.serving import refused

USER = [{"role": "user", "content": "hello"}]


def chat(http, messages, **options):
    body = {"messages": messages, "temperature": 0, "max_tokens": 8, **options}
    return http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]


def events(http, url, body):
    with http.stream("POST", url, json={**body, "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.status_code == 200, lines
    kinds = [line.removeprefix("event: ") for line in lines[::2]]
    found = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert kinds == [each["type"] for each in found]
    return found


def test_messages(http):
    body = {"max_tokens": 8, "messages": USER, "system": "Be brief.", "temperature": 0}
    want = chat(http, [{"role": "system", "content": "Be brief."}, *USER])
    whole = http.post("/v1/messages", json=body).json()
    assert whole["content"] == [{"type": "text", "text": want}]
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("max_tokens", None)
    found = events(http, "/v1/messages", body)
    assert "".join(each["delta"]["text"] for each in found if each["type"] == "content_block_delta") == want
    assert found[0]["message"]["content"] == []
    assert found[-2]["usage"]["output_tokens"] == 8
    assert found[-1]["type"] == "message_stop"
    counted = http.post("/v1/messages/count_tokens", json={"messages": USER, "system": "Be brief."}).json()
    assert counted == {"input_tokens": whole["usage"]["input_tokens"]}
    stop = want[3]
    cut = http.post("/v1/messages", json={**body, "stop_sequences": [stop]}).json()
    assert (cut["stop_reason"], cut["stop_sequence"]) == ("stop_sequence", stop)
    assert cut["content"][0]["text"] == want.partition(stop)[0]


def test_responses_go_on(http):
    first = http.post(
        "/v1/responses", json={"input": "hello", "temperature": 0, "max_output_tokens": 8}
    ).json()
    said = first["output"][0]["content"][0]["text"]
    assert said == chat(http, USER)
    assert first["status"] == "incomplete"
    assert http.get(f"/v1/responses/{first['id']}").json() == first
    more = {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "and?"}]}],
        "temperature": 0,
    }
    more |= {"previous_response_id": first["id"], "max_output_tokens": 8}
    turns = [*USER, {"role": "assistant", "content": said}, {"role": "user", "content": "and?"}]
    found = events(http, "/v1/responses", more)
    want = chat(http, turns)
    assert "".join(each["delta"] for each in found if each["type"] == "response.output_text.delta") == want
    assert found[-1]["type"] == "response.incomplete"
    assert found[-1]["response"]["output"][0]["content"][0]["text"] == want
    assert [each["sequence_number"] for each in found] == list(range(len(found)))
    assert http.delete(f"/v1/responses/{first['id']}").json()["deleted"]
    assert "whole conversation" in refused(http.post("/v1/responses", json=more), 404)
    hidden = http.post("/v1/responses", json={"input": "a", "max_output_tokens": 1, "store": False}).json()
    refused(http.get(f"/v1/responses/{hidden['id']}"), 404)


def test_of_responses_no_more_is_remembered_than_there_is_room_for(http, monkeypatch):
    monkeypatch.setattr(response_store, "MOST_BYTES", 10_000)
    body = {"input": "a" * 3000, "max_output_tokens": 1}
    names = [http.post("/v1/responses", json=body).json()["id"] for _ in range(5)]
    status = [http.get(f"/v1/responses/{name}").status_code for name in names]
    assert status == [404, 404, 200, 200, 200]
    http.delete(f"/v1/responses/{names[2]}")
    name = http.post("/v1/responses", json=body).json()["id"]
    assert all(http.get(f"/v1/responses/{each}").status_code == 200 for each in (*names[3:], name))


@pytest.mark.parametrize(
    ("url", "body", "message"),
    [
        ("messages", {"messages": USER}, "max_tokens is missing"),
        ("messages", {"max_tokens": 3}, "messages is missing"),
        ("messages", {"max_tokens": 3, "messages": USER, "tools": []}, "tools is not supported"),
        ("messages", {"max_tokens": 3, "messages": USER, "temperature": 2}, "temperature"),
        ("messages", {"max_tokens": 3, "messages": USER, "system": 3}, "system must be a string"),
        ("messages", {"max_tokens": 3, "messages": [{"role": "system", "content": "a"}]}, "messages[0].role"),
        ("messages/count_tokens", {}, "messages is missing"),
        ("responses", {}, "input is missing"),
        ("responses", {"input": 3}, "input must be a string, or a list of messages"),
        ("responses", {"input": "a", "tools": []}, "tools is not supported"),
        ("responses", {"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_bad_requests(http, url, body, message):
    assert message in refused(http.post(f"/v1/{url}", json=body))


@pytest.mark.slow
def test_the_openai_client_goes_on(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    first = client.responses.create(model="tiny", input="hello", temperature=0, max_output_tokens=8)
    more = {"model": "tiny", "input": "and?", "previous_response_id": first.id, "temperature": 0}
    more |= {"max_output_tokens": 8, "stream": True}
    pieces = [each.delta for each in client.responses.create(**more) if hasattr(each, "delta")]
    turns = [*USER, {"role": "assistant", "content": first.output_text}, {"role": "user", "content": "and?"}]
    assert "".join(pieces) == chat(server.http, turns)
    assert first.output_text == chat(server.http, USER)
    client.close()


@pytest.mark.slow
def test_the_anthropic_client(server):
    """Streams, counts tokens, and is told what is missing."""
    anthropic = pytest.importorskip("anthropic")
    ask = {"model": "tiny", "messages": USER, "max_tokens": 8, "extra_body": {"temperature": 0}}
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        with client.messages.stream(**ask) as streamed:
            text = "".join(streamed.text_stream)
            last = streamed.get_final_message()
        assert text == chat(server.http, USER)
        assert (last.stop_reason, last.usage.output_tokens) == ("max_tokens", 8)
        assert client.messages.create(**ask).content[0].text == text
        counted = client.messages.count_tokens(model="tiny", messages=USER)
        assert counted.input_tokens == last.usage.input_tokens + last.usage.cache_read_input_tokens
        tool = {"name": "now", "input_schema": {"type": "object"}}
        with pytest.raises(anthropic.BadRequestError, match="tools is not supported"):
            client.messages.create(**ask, tools=[tool])
        with pytest.raises(anthropic.NotFoundError, match="there is no model"):
            client.messages.create(**ask | {"model": "other"})
