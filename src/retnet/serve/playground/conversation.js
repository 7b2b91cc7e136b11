// The text is a tree of pieces; the path from its root to the current piece is what the model is asked to continue.
// What it has read before is not read again: the server keeps states along it.

export const nodes = new Map(); // id → {id, parent, role, tokens}; a token is {text, logprob?, top?}
let nextId = 1;

nodes.set(0, {id: 0, parent: null, role: "root", tokens: []});

export const textOf = (node) => node.tokens.map((token) => token.text).join("");
export const childrenOf = (id) => [...nodes.values()].filter((node) => node.parent === id);

/** A new piece; `tokens` is a text, or tokens with their probabilities. */
export function add(parent, role, tokens) {
  const made = {id: nextId++, parent, role, tokens: typeof tokens === "string" ? [{text: tokens}] : tokens};
  nodes.set(made.id, made);
  return made;
}

export const remove = (id) => nodes.delete(id);

/** The pieces from the first to this one; the root is none of them. */
export function pathTo(id) {
  const path = [];
  for (let node = nodes.get(id); node.id !== 0; node = nodes.get(node.parent)) path.unshift(node);
  return path;
}

/** The end of the newest branch below a piece. */
export function deepest(id) {
  const children = childrenOf(id);
  return children.length ? deepest(children[children.length - 1].id) : id;
}

/** Ends of all branches, the oldest first. */
export const leaves = () => [...nodes.keys()].filter((id) => id !== 0 && !childrenOf(id).length);

/** How many pieces two paths begin with alike. */
export function shared(one, other) {
  let count = 0;
  while (count < one.length && count < other.length && one[count].id === other[count].id) count++;
  return count;
}

/** A few words of a piece. */
export const short = (node, length = 48) => textOf(node).trim().replace(/\s+/g, " ").slice(0, length) || "…";
