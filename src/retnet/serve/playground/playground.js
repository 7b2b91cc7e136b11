// The page: what is current, what runs, and what buttons do.

import {add, deepest, pathTo, remove} from "./conversation.js";
import {asCurl, asPython, errorOf, eventsOf, headers, isChat, requestFor, tokensIn} from "./requests.js";
import {comparison, extend, hideToken, listenToPopover, message, tree} from "./views.js";

const $ = (id) => document.getElementById(id);
let current = 0; // the end of the path that is shown; the root has no text
let running = null; // AbortController of the request under way
let compared = null; // ends of the two branches that are shown side by side
let model = {id: "", state_bytes: 0};

function choose(id) {
  [current, compared] = [id, null];
  render();
}

/** Another text in the place of a piece: a branch beside it. */
function keep(node, text, then) {
  const made = add(node.parent, node.role, text);
  choose(made.id);
  if (then) generate(made.id);
}

/** A branch that has another token at one place, and goes on from there. */
function fork(node, place, text) {
  if (running) return;
  const made = add(node.parent, node.role, [...node.tokens.slice(0, place), {text}]);
  compared = null;
  generate(made.id, made);
}

function compare(one, other) {
  compared = [deepest(one.id), deepest(other.id)];
  render();
}

function change(side, id) {
  compared[side] = id;
  render();
}

function render() {
  hideToken();
  const busy = running !== null;
  const shown = {model, current, busy, choose, generate, fork, compare, render, keep, change, close: () => choose(current)};
  $("transcript").hidden = compared !== null;
  $("comparison").hidden = compared === null;
  $("comparison").replaceChildren(...(compared ? comparison(compared, shown) : []));
  $("transcript").replaceChildren(...pathTo(current).map((node) => message(node, shown)));
  $("transcript").scrollTop = $("transcript").scrollHeight;
  $("tree").replaceChildren(...tree(shown));
  $("input-label").textContent = isChat() ? "Your message" : "Text to continue";
  $("input").placeholder = isChat() ? "What is a generator?" : "def area(width, height):";
  $("send").textContent = isChat() ? "Send" : "Generate";
  for (const id of ["send", "clear"]) $(id).disabled = busy;
  $("stop").disabled = !busy;
}

function say(status, state) {
  $("status").textContent = status;
  $("status").dataset.state = state;
}

function fail(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

// -- generating ----------------------------------------------------------------------------------------------------

/** Continues a piece: in a new one, or in `node` itself, where it was begun. */
async function generate(from, node = null) {
  if (running) return;
  fail("");
  running = new AbortController();
  const [url, body] = requestFor(model, from);
  const begun = node !== null;
  node ??= add(from, "model", []);
  current = node.id;
  compared = null;
  render();
  say("generating …", "busy");
  const clock = {began: performance.now(), first: 0, count: 0};
  try {
    const response = await fetch(url, {method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal});
    if (!response.ok) throw new Error(await errorOf(response));
    const usage = await receive(response, node, clock);
    if (usage) showUsage(usage, clock);
    say("ready", "ready");
  } catch (error) {
    const stopped = error.name === "AbortError";
    say(stopped ? "stopped" : "failed", stopped ? "ready" : "failed");
    if (!stopped) fail(error.message);
    if (!begun && !node.tokens.length) {
      remove(node.id);
      current = from;
    }
  } finally {
    running = null;
    render();
  }
}

const rate = (clock) => ((clock.count - 1) / Math.max(1e-3, (performance.now() - clock.first) / 1000)).toFixed(1);

/** Adds the tokens of a stream to a piece, drawn no faster than they can be seen; its usage. */
async function receive(response, node, clock) {
  let usage = null, shown = 0, drawn = node.tokens.length;
  for await (const event of eventsOf(response)) {
    if (event.error) throw new Error(event.error.message);
    if (event.usage) usage = event.usage;
    for (const choice of event.choices) {
      if (!clock.first) {
        clock.first = performance.now();
        $("first").textContent = `${Math.round(clock.first - clock.began)} ms`;
      }
      const tokens = tokensIn(choice);
      clock.count += tokens.length;
      node.tokens.push(...tokens.filter((token) => token.text));
    }
    if (performance.now() - shown > 50) {
      extend(node.view, node, drawn, fork);
      drawn = node.tokens.length;
      $("transcript").scrollTop = $("transcript").scrollHeight;
      const told = node.tokens.at(-1)?.logprob !== undefined; // else nobody knows how many tokens a text has
      if (told && clock.count > 1) $("rate").textContent = rate(clock);
      await new Promise((resume) => setTimeout(resume));
      shown = performance.now();
    }
  }
  return usage;
}

function showUsage(usage, clock) {
  const number = (count) => count.toLocaleString("en");
  if (usage.completion_tokens > 1) $("rate").textContent = rate({...clock, count: usage.completion_tokens});
  $("position").textContent = `${number(usage.total_tokens)} tokens`;
  $("cached").textContent = `${number(usage.prompt_tokens_details.cached_tokens)} of ${number(usage.prompt_tokens)}`;
}

// -- copying -------------------------------------------------------------------------------------------------------

async function copy(make) {
  const text = make(pendingRequest());
  try {
    await navigator.clipboard.writeText(text);
    say("copied", "ready");
  } catch {
    window.prompt("Copy this:", text);
  }
}

/** The request that the button would send now, with what stands in the field. */
function pendingRequest() {
  const typed = $("input").value;
  if (!typed) return requestFor(model, current);
  const node = add(current, "mine", typed);
  const request = requestFor(model, node.id);
  remove(node.id);
  return request;
}

// -- beginning -----------------------------------------------------------------------------------------------------

const bytes = (count) => (count < 1e6 ? `${(count / 1e3).toFixed(1)} kB` : `${(count / 1e6).toFixed(1)} MB`);

async function meet() {
  try {
    const response = await fetch("/v1/models", {headers: headers()});
    if (response.status === 401) {
      $("key-box").open = true;
      say("this server wants an API key", "failed");
      return;
    }
    model = (await response.json()).data[0];
    $("model").textContent = model.id;
    $("state").textContent = bytes(model.state_bytes);
    $("constant").textContent = model.state_grows
      ? "A token; this model's cache grows with the text."
      : "The state has this size however long the text becomes.";
    const ready = (await fetch("/ready")).ok;
    say(ready ? "ready" : "not ready yet", ready ? "ready" : "busy");
    render();
  } catch {
    say("the server does not answer", "failed");
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return;
  const text = $("input").value;
  if (!text && isChat()) return;
  $("input").value = "";
  generate(text ? add(current, "mine", text).id : current);
});
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey || (isChat() && !event.shiftKey))) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  hideToken();
  if (running) running.abort();
  else if (compared) choose(current);
});
$("stop").addEventListener("click", () => running && running.abort());
$("clear").addEventListener("click", () => choose(0));
$("curl").addEventListener("click", () => copy(asCurl));
$("python").addEventListener("click", () => copy(asPython));
$("key").addEventListener("change", meet);
$("probabilities").addEventListener("change", () => document.body.classList.toggle("plain", !$("probabilities").checked));
for (const radio of document.querySelectorAll("input[name=mode]")) radio.addEventListener("change", render);
listenToPopover();
render();
meet();
