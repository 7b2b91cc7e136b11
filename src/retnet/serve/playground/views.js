// What is drawn: pieces with their tokens, the tree, and two branches side by side.

import {childrenOf, deepest, leaves, nodes, pathTo, shared, short, textOf} from "./conversation.js";
import {isChat} from "./requests.js";

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "class") made.className = value;
    else if (value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

export function button(text, label, action, busy) {
  return element("button", {type: "button", "aria-label": label, title: label, disabled: busy, onclick: action}, text);
}

const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅";
const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(Math.exp(logprob) < 0.1 ? 1 : 0)} %`;

// -- tokens --------------------------------------------------------------------------------------------------------

/** A text, its tokens to be pointed at where their probabilities are known. */
export function tokensOf(node, fork) {
  const box = element("div", {class: "text"});
  extend(box, node, 0, fork);
  return box;
}

/** Draws the tokens of a piece from a place on, behind those that are there. */
export function extend(box, node, from, fork) {
  for (let place = from; place < node.tokens.length; place++) {
    const token = node.tokens[place];
    if (token.logprob === undefined) {
      box.append(token.text);
      continue;
    }
    const span = element("span", {class: `token likely-${Math.min(4, Math.floor(-token.logprob))}`}, token.text);
    const show = () => showToken(span, node, place, fork);
    span.addEventListener("mouseenter", show);
    span.addEventListener("click", show);
    box.append(span);
  }
}

const popover = () => document.getElementById("token");
let hiding = 0;

/** The likeliest tokens at a place; each begins a branch when it is chosen. */
function showToken(span, node, place, fork) {
  clearTimeout(hiding);
  const token = node.tokens[place], box = popover();
  const rows = token.top.map(([text, logprob]) => {
    const bar = element("span", {class: "bar"});
    bar.style.setProperty("--share", Math.exp(logprob));
    const label = `Fork here with ${visible(text)}`;
    const whole = text && !text.startsWith("bytes:") && !text.includes("\ufffd"); // else it is part of a character, or an end
    return element("button", {type: "button", class: "choice", disabled: !whole, title: label, "aria-label": `${label}, ${percent(logprob)}`, onclick: () => { hideToken(); fork(node, place, text); }},
      bar, element("code", {}, visible(text)), element("span", {}, percent(logprob)));
  });
  const head = element("p", {}, element("code", {}, visible(token.text)), ` chosen at ${percent(token.logprob)}`);
  box.replaceChildren(head, ...rows, element("p", {class: "quiet"}, "Choose one to fork here"));
  box.hidden = false;
  const at = span.getBoundingClientRect(), width = box.offsetWidth, height = box.offsetHeight;
  box.style.left = `${Math.max(8, Math.min(at.left, innerWidth - width - 8))}px`;
  box.style.top = `${at.bottom + height + 8 > innerHeight ? Math.max(8, at.top - height - 4) : at.bottom + 4}px`;
  span.addEventListener("mouseleave", () => { hiding = setTimeout(hideToken, 250); }, {once: true});
}

export function hideToken() {
  popover().hidden = true;
}

export function listenToPopover() {
  popover().addEventListener("mouseenter", () => clearTimeout(hiding));
  popover().addEventListener("mouseleave", () => { hiding = setTimeout(hideToken, 250); });
  document.addEventListener("scroll", hideToken, true);
}

// -- pieces --------------------------------------------------------------------------------------------------------

const speaker = (node, model) => (node.role === "model" ? model.id || "model" : isChat() ? "You" : "Your text");

/** A piece of the text with what may be done at it. */
export function message(node, {model, current, busy, choose, generate, fork, compare, render, keep}) {
  const box = element("article", {class: `message ${node.role === "model" ? "model" : "mine"}`});
  const head = element("div", {class: "head"}, element("span", {class: "who"}, speaker(node, model)));
  const others = childrenOf(node.parent), place = others.indexOf(node);
  if (others.length > 1) {
    const step = (by) => choose(deepest(others[(place + by + others.length) % others.length].id));
    head.append(element("span", {class: "branches"},
      button("‹", "Previous branch", () => step(-1), busy), `${place + 1} / ${others.length}`, button("›", "Next branch", () => step(1), busy)));
    head.append(button("Compare", "Show this branch beside another one", () => compare(node, others[(place + 1) % others.length]), busy));
  }
  const tools = element("span", {class: "tools"});
  if (node.role === "model") tools.append(button("Again", "Generate another answer here", () => generate(node.parent), busy));
  tools.append(button("Edit", "Edit this as a new branch", () => edit(node, box, {render, keep, busy}), busy));
  if (node.id !== current) tools.append(button("Rewind here", "Go on from here: a fork", () => choose(node.id), busy));
  head.append(tools);
  node.view = tokensOf(node, fork);
  box.append(head, node.view);
  return box;
}

function edit(node, box, {render, keep, busy}) {
  const area = element("textarea", {rows: Math.min(12, textOf(node).split("\n").length + 1), "aria-label": "New text of this piece"});
  area.value = textOf(node);
  box.replaceChildren(area, element("div", {class: "actions"},
    button("Generate", "Keep the new text and continue it", () => keep(node, area.value, true), busy),
    button("Keep", "Keep the new text as a branch", () => keep(node, area.value, false), busy),
    button("Cancel", "Leave it as it was", render, busy)));
  area.focus();
}

// -- tree ----------------------------------------------------------------------------------------------------------

/** The whole tree, a line a piece. */
export function tree({current, busy, choose}) {
  const onPath = new Set(pathTo(current).map((node) => node.id));
  const line = (node, text) => {
    const made = button(text, `Rewind to: ${text}`, () => choose(node.id), busy);
    if (onPath.has(node.id)) made.classList.add("onpath");
    made.setAttribute("aria-current", String(node.id === current));
    return made;
  };
  const below = (id) => element("ul", {}, ...childrenOf(id).map((node) => {
    const item = element("li", {}, line(node, (node.role === "model" ? "↳ " : "") + short(node)));
    if (childrenOf(node.id).length) item.append(below(node.id));
    return item;
  }));
  return [element("li", {}, line(nodes.get(0), "beginning")), ...below(0).childNodes];
}

// -- two branches side by side -------------------------------------------------------------------------------------

/** Two branches, from where they part; each can be chosen to go on with. */
export function comparison(ends, {model, busy, choose, fork, change, close}) {
  const paths = ends.map(pathTo), common = shared(...paths);
  const columns = paths.map((path, side) => {
    const picker = element("select", {"aria-label": `Branch ${"AB"[side]}`, onchange: (event) => change(side, Number(event.target.value))},
      ...leaves().map((id) => element("option", {value: id, selected: id === ends[side]}, short(nodes.get(id), 40))));
    const pieces = path.slice(common).map((node) => element("article", {class: `message ${node.role === "model" ? "model" : "mine"}`},
      element("div", {class: "head"}, element("span", {class: "who"}, speaker(node, model))), tokensOf(node, fork)));
    const likely = path.slice(common).flatMap((node) => node.tokens).filter((token) => token.logprob !== undefined);
    const mean = likely.reduce((sum, token) => sum + token.logprob, 0) / likely.length;
    const facts = likely.length ? `${likely.length} tokens, perplexity ${Math.exp(-mean).toFixed(2)}` : "";
    return element("section", {class: "column", "aria-label": `Branch ${"AB"[side]}`},
      element("div", {class: "head"}, element("strong", {}, "AB"[side]), picker), ...pieces, element("p", {class: "quiet"}, facts),
      button(`Go on with ${"AB"[side]}`, `Close the comparison and go on with branch ${"AB"[side]}`, () => choose(ends[side]), busy));
  });
  const start = paths[0].slice(0, common);
  const same = start.length ? element("details", {}, element("summary", {}, `Both begin with ${start.length} ${start.length > 1 ? "pieces" : "piece"}`),
    element("div", {class: "text"}, start.map(textOf).join("\n"))) : "";
  return [element("div", {class: "head"}, element("strong", {}, "Two branches"), element("span", {class: "grow"}), button("Close", "Close the comparison", close, false)),
    same, element("div", {class: "columns"}, ...columns)];
}
