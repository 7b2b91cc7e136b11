"use strict";
// The text is a tree of pieces; the path from its root to the current piece is what the model is asked to continue.
// What it has read before is not read again: the server keeps states along it.

const $ = (id) => document.getElementById(id);
const nodes = new Map(); // id → {id, parent, role, text}
let current = 0; // the root, which has no text
let nextId = 1;
let running = null; // AbortController of the request under way
let model = {id: "", state_bytes: 0};

nodes.set(0, {id: 0, parent: null, role: "root", text: ""});

const mode = () => document.querySelector("input[name=mode]:checked").value;
const childrenOf = (id) => [...nodes.values()].filter((node) => node.parent === id);

function add(parent, role, text) {
  const node = {id: nextId++, parent, role, text};
  nodes.set(node.id, node);
  return node;
}

function pathTo(id) {
  const path = [];
  for (let node = nodes.get(id); node.id !== 0; node = nodes.get(node.parent)) path.unshift(node);
  return path;
}

function button(text, label, action) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.setAttribute("aria-label", label);
  made.title = label;
  made.disabled = running !== null;
  made.addEventListener("click", action);
  return made;
}

function choose(id) {
  current = id;
  render();
}

// -- the page ------------------------------------------------------------------------------------------------------

function names(node) {
  if (node.role === "model") return model.id;
  return mode() === "chat" ? "You" : "Your text";
}

function message(node) {
  const box = document.createElement("article");
  box.className = node.role === "model" ? "message" : "message mine";
  const head = document.createElement("div");
  head.className = "head";
  const who = document.createElement("span");
  who.textContent = names(node);
  head.append(who);
  const others = childrenOf(node.parent);
  const place = others.indexOf(node);
  if (others.length > 1) {
    const step = (by) => choose(deepest(others[(place + by + others.length) % others.length].id));
    head.append(button("‹", "Previous branch", () => step(-1)));
    const count = document.createElement("span");
    count.textContent = `${place + 1}/${others.length}`;
    head.append(count, button("›", "Next branch", () => step(1)));
  }
  const gap = document.createElement("span");
  gap.className = "grow";
  head.append(gap);
  if (node.role === "model") head.append(button("Again", "Generate another answer here", () => generate(node.parent)));
  head.append(button("Edit", "Edit this as a new branch", () => edit(node, box)));
  if (node.id !== current) head.append(button("Rewind here", "Go on from here: a fork", () => choose(node.id)));
  const text = document.createElement("div");
  text.className = "text";
  text.textContent = node.text;
  box.append(head, text);
  node.view = text;
  return box;
}

function edit(node, box) {
  const area = document.createElement("textarea");
  area.value = node.text;
  area.rows = Math.min(12, node.text.split("\n").length + 1);
  area.setAttribute("aria-label", "New text of this piece");
  const row = document.createElement("div");
  row.className = "actions";
  const keep = (then) => {
    const made = add(node.parent, node.role, area.value);
    choose(made.id);
    if (then) generate(made.id);
  };
  row.append(
    button("Generate", "Keep the new text and continue it", () => keep(true)),
    button("Keep", "Keep the new text as a branch", () => keep(false)),
    button("Cancel", "Leave it as it was", render),
  );
  box.replaceChildren(area, row);
  area.focus();
}

function deepest(id) {
  const children = childrenOf(id);
  return children.length ? deepest(children[children.length - 1].id) : id;
}

function branch(id, onPath) {
  const list = document.createElement("ul");
  for (const node of childrenOf(id)) {
    const item = document.createElement("li");
    const short = (node.role === "model" ? "↳ " : "• ") + (node.text.trim().replace(/\s+/g, " ").slice(0, 48) || "…");
    const made = button(short, `Rewind to: ${short}`, () => choose(node.id));
    if (onPath.has(node.id)) made.classList.add("onpath");
    made.setAttribute("aria-current", String(node.id === current));
    item.append(made);
    if (childrenOf(node.id).length) item.append(branch(node.id, onPath));
    list.append(item);
  }
  return list;
}

function render() {
  const path = pathTo(current);
  $("transcript").replaceChildren(...path.map(message));
  $("transcript").scrollTop = $("transcript").scrollHeight;
  const root = document.createElement("li");
  const start = button("◦ beginning", "Rewind to the beginning", () => choose(0));
  start.setAttribute("aria-current", String(current === 0));
  root.append(start);
  const onPath = new Set(path.map((node) => node.id));
  $("tree").replaceChildren(root, ...branch(0, onPath).childNodes);
  $("input-label").textContent = mode() === "chat" ? "Your message" : "Text to continue";
  $("input").placeholder = mode() === "chat" ? "What is a generator?" : "def area(width, height):";
  $("send").textContent = mode() === "chat" ? "Send" : "Generate";
  for (const id of ["send", "clear"]) $(id).disabled = running !== null;
  $("stop").disabled = running === null;
}

function fail(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

// -- requests ------------------------------------------------------------------------------------------------------

function sampling() {
  const options = {};
  for (const name of ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "max_tokens", "seed"]) {
    if ($(name).value !== "") options[name] = Number($(name).value);
  }
  if ($("stop_string").value) options.stop = [$("stop_string").value.replaceAll("\\n", "\n")];
  return options;
}

function requestFor(id) {
  const path = pathTo(id);
  const options = {model: model.id, ...sampling(), stream: true, stream_options: {include_usage: true}};
  if (mode() === "completion") return ["/v1/completions", {prompt: path.map((node) => node.text).join(""), ...options}];
  const messages = path.map((node) => ({role: node.role === "model" ? "assistant" : "user", content: node.text}));
  return ["/v1/chat/completions", {messages, ...options}];
}

function headers() {
  const made = {"Content-Type": "application/json"};
  if ($("key").value) made.Authorization = `Bearer ${$("key").value}`;
  return made;
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
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

async function errorOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function generate(from) {
  if (running) return;
  fail("");
  running = new AbortController();
  const [url, body] = requestFor(from);
  const node = add(from, "model", "");
  current = node.id;
  render();
  $("status").textContent = "generating …";
  const began = performance.now();
  let first = 0, shown = 0, count = 0, usage = null;
  const rate = (tokens) => `${(tokens / Math.max(1e-3, (performance.now() - first) / 1000)).toFixed(1)}`;
  try {
    const response = await fetch(url, {method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal});
    if (!response.ok) throw new Error(await errorOf(response));
    for await (const event of eventsOf(response)) {
      if (event.error) throw new Error(event.error.message);
      if (!first) {
        first = performance.now();
        $("first").textContent = `${Math.round(first - began)} ms`;
      }
      for (const choice of event.choices) node.text += choice.text ?? choice.delta?.content ?? "";
      if (event.choices.length && count++ && performance.now() - shown > 50) $("rate").textContent = rate(count - 1);
      if (event.usage) usage = event.usage;
      if (performance.now() - shown > 50) { // tokens may come faster than a page can be drawn
        node.view.textContent = node.text;
        $("transcript").scrollTop = $("transcript").scrollHeight;
        await new Promise((resume) => setTimeout(resume));
        shown = performance.now();
      }
    }
    if (usage) {
      if (usage.completion_tokens > 1) $("rate").textContent = rate(usage.completion_tokens - 1);
      $("position").textContent = `${usage.total_tokens.toLocaleString("en")} tokens`;
      $("cached").textContent = `${usage.prompt_tokens_details.cached_tokens.toLocaleString("en")} of ${usage.prompt_tokens.toLocaleString("en")}`;
    }
    $("status").textContent = "ready";
  } catch (error) {
    const stopped = error.name === "AbortError";
    $("status").textContent = stopped ? "stopped" : "failed";
    if (!stopped) fail(error.message);
    if (!node.text) {
      nodes.delete(node.id);
      current = from;
    }
  } finally {
    running = null;
    render();
  }
}

// -- copying -------------------------------------------------------------------------------------------------------

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function asCurl([url, body]) {
  const key = $("key").value ? ` -H "Authorization: Bearer $RETNET_KEY"` : "";
  return `curl -N ${location.origin}${url} -H 'Content-Type: application/json'${key} -d ${quoted(JSON.stringify(body))}`;
}

function asPython([url, body]) {
  const {stream, stream_options, ...rest} = body;
  const ours = ["top_k", "min_p", "repetition_penalty"];
  const python = (value) => JSON.stringify(value).replace(/[\u007f-\uffff]/g, (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
  const lines = Object.entries(rest).filter(([name]) => !ours.includes(name)).map(([name, value]) => `    ${name}=${python(value)},`);
  const extra = Object.fromEntries(Object.entries(rest).filter(([name]) => ours.includes(name)));
  const call = url.includes("chat") ? "chat.completions" : "completions";
  const text = url.includes("chat") ? "choice.delta.content or \"\"" : "choice.text";
  return [
    "import os",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${location.origin}/v1", api_key=os.environ.get("RETNET_KEY", "none"))`,
    `for chunk in client.${call}.create(`,
    ...lines,
    `    extra_body=${python(extra)},`,
    "    stream=True,",
    "):",
    "    for choice in chunk.choices:",
    `        print(${text}, end="", flush=True)`,
    "",
  ].join("\n");
}

async function copy(make) {
  const text = make(pendingRequest());
  try {
    await navigator.clipboard.writeText(text);
    $("status").textContent = "copied";
  } catch {
    window.prompt("Copy this:", text);
  }
}

/** The request that the button would send now, with what stands in the field. */
function pendingRequest() {
  const typed = $("input").value;
  if (!typed) return requestFor(current);
  const node = add(current, "mine", typed);
  const request = requestFor(node.id);
  nodes.delete(node.id);
  return request;
}

// -- beginning -----------------------------------------------------------------------------------------------------

function bytes(count) {
  return count < 1e6 ? `${(count / 1e3).toFixed(1)} kB` : `${(count / 1e6).toFixed(1)} MB`;
}

async function meet() {
  try {
    const response = await fetch("/v1/models", {headers: headers()});
    if (response.status === 401) {
      $("key-box").open = true;
      $("status").textContent = "this server wants an API key";
      return;
    }
    model = (await response.json()).data[0];
    $("model").textContent = model.id;
    $("state").textContent = bytes(model.state_bytes);
    $("constant").textContent = model.state_grows ? "A token; this model's cache grows with the text." : "The state has this size however long the text becomes.";
    $("status").textContent = (await fetch("/ready")).ok ? "ready" : "not ready yet";
    render();
  } catch (error) {
    $("status").textContent = "the server does not answer";
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return;
  const text = $("input").value;
  if (!text && mode() === "chat") return;
  $("input").value = "";
  generate(text ? add(current, "mine", text).id : current);
});
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey || (mode() === "chat" && !event.shiftKey))) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});
$("stop").addEventListener("click", () => running && running.abort());
$("clear").addEventListener("click", () => choose(0));
$("curl").addEventListener("click", () => copy(asCurl));
$("python").addEventListener("click", () => copy(asPython));
$("key").addEventListener("change", meet);
for (const radio of document.querySelectorAll("input[name=mode]")) radio.addEventListener("change", render);
render();
meet();
