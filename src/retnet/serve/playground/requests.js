// What is asked of the server: requests, streams of events, and the same as curl or Python.

import {pathTo, textOf} from "./conversation.js";

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "max_tokens", "seed"];
const OURS = ["top_k", "min_p", "repetition_penalty"]; // fields beyond OpenAI's
const ALTERNATIVES = 5;

const field = (id) => document.getElementById(id);
export const isChat = () => document.querySelector("input[name=mode]:checked").value === "chat";

function sampling() {
  const options = {};
  for (const name of NUMBERS) if (field(name).value !== "") options[name] = Number(field(name).value);
  if (field("stop_string").value) options.stop = [field("stop_string").value.replaceAll("\\n", "\n")];
  return options;
}

/** Path and body of the request that continues a piece; a chat's answer that is begun goes on as a completion would. */
export function requestFor(model, id) {
  const path = pathTo(id);
  const options = {model: model.id, ...sampling(), stream: true, stream_options: {include_usage: true}};
  const wanted = field("probabilities").checked;
  if (!isChat()) {
    if (wanted) options.logprobs = ALTERNATIVES;
    return ["/v1/completions", {prompt: path.map(textOf).join(""), ...options}];
  }
  if (wanted) Object.assign(options, {logprobs: true, top_logprobs: ALTERNATIVES});
  const messages = path.map((node) => ({role: node.role === "model" ? "assistant" : "user", content: textOf(node)}));
  return ["/v1/chat/completions", {messages, ...options}];
}

export function headers() {
  const made = {"Content-Type": "application/json"};
  if (field("key").value) made.Authorization = `Bearer ${field("key").value}`;
  return made;
}

/** The tokens that an event brings: their texts, and how likely each and others were, where that was asked for. */
export function tokensIn(choice) {
  const text = choice.text ?? choice.delta?.content ?? "";
  const tokens = placesOf(choice.logprobs);
  if (!tokens.length) return [{text}];
  let end = 0; // of the text that has been given to tokens
  for (const [i, token] of tokens.entries()) {
    const begin = token.name ? text.indexOf(token.name, end) : -1;
    token.text = "";
    if (begin < 0) continue; // a part of a character, or held back
    if (begin > end) tokens[Math.max(0, i - 1)].text += text.slice(end, begin);
    end = begin + token.name.length;
    token.text += token.name;
  }
  tokens[tokens.length - 1].text += text.slice(end);
  return tokens;
}

/** Log-probabilities of an event, a token each; parts of characters have no name. */
function placesOf(said) {
  const whole = (name) => (/^bytes:|\ufffd/.test(name) ? "" : name);
  const best = (top) => top.sort((a, b) => b[1] - a[1]);
  if (said?.content) {
    return said.content.map((place) => ({
      name: whole(place.token), logprob: place.logprob, top: best(place.top_logprobs.map((each) => [each.token, each.logprob])),
    }));
  }
  return (said?.tokens ?? []).map((name, i) => ({
    name: whole(name), logprob: said.token_logprobs[i], top: best(Object.entries(said.top_logprobs[i])),
  }));
}

export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) throw new Error("the connection broke off");
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

export async function errorOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function asCurl([url, body]) {
  const key = field("key").value ? ` -H "Authorization: Bearer $RETNET_KEY"` : "";
  return `curl -N ${location.origin}${url} -H 'Content-Type: application/json'${key} -d ${quoted(JSON.stringify(body))}`;
}

const escaped = (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0");

/** A JSON value as Python writes it. */
function python(value) {
  if (value === true || value === false) return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (value && typeof value === "object") return `{${Object.entries(value).map(([k, v]) => `${python(k)}: ${python(v)}`).join(", ")}}`;
  return JSON.stringify(value).replace(/[\u007f-\uffff]/g, escaped);
}

export function asPython([url, body]) {
  const {stream, stream_options, ...rest} = body;
  const own = Object.entries(rest).filter(([name]) => OURS.includes(name));
  const chat = url.includes("chat");
  return [
    "import os",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${location.origin}/v1", api_key=os.environ.get("RETNET_KEY", "none"))`,
    `for chunk in client.${chat ? "chat.completions" : "completions"}.create(`,
    ...Object.entries(rest).filter(([name]) => !OURS.includes(name)).map(([name, value]) => `    ${name}=${python(value)},`),
    `    extra_body=${python(Object.fromEntries(own))},`,
    "    stream=True,",
    "):",
    "    for choice in chunk.choices:",
    `        print(${chat ? 'choice.delta.content or ""' : "choice.text"}, end="", flush=True)`,
    "",
  ].join("\n");
}
