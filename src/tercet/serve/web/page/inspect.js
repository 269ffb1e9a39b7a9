// Tokens with their probabilities: colours, the card of one token, the tokens of the prompt.
import { $, h } from "./dom.js";

// Bits of surprise at which the next colour begins: small steps for common values, large steps above.
const STEPS = [0.25, 0.75, 1.5, 2.5, 4, 6, 8, 11];

export const bits = (logprob) => Math.max(0, -logprob / Math.LN2);
/** Return the entropy at a token's position in bits, which is the expected surprise. */
const expected = (token) => (token.entropy / Math.LN2).toFixed(2);
const heat = (logprob) => STEPS.filter((step) => bits(logprob) >= step).length;

export function share(logprob) {
  const percent = 100 * Math.exp(logprob);
  if (percent >= 99.95 && percent < 100) return "> 99.9 %";
  if (percent < 0.01) return "< 0.01 %";
  return `${percent >= 10 ? percent.toFixed(1) : percent.toPrecision(2)} %`;
}

/** Return a token's text with visible signs for spaces, tabs and line breaks. */
function visible(text) {
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅";
}

const isPart = (token) => token.text.includes("\ufffd") && token.bytes;
const hexes = (token) => token.bytes.match(/../g).join(" ").toUpperCase();

/** Return the name of a token in the card. */
function label(token) {
  return isPart(token) ? `byte ${hexes(token)}` : visible(token.text);
}

function tokenElement(token, index) {
  const kinds = ["token"];
  let content = [token.text];
  if (!token.bytes) {
    kinds.push("special");
  } else if (isPart(token)) {
    kinds.push("part");
    content = [hexes(token)];
  } else if (token.text.includes("\n")) {
    content = token.text.split(/(\n)/).map((piece) => (piece === "\n" ? [h("span", { class: "mark", "aria-hidden": "true" }, "↵"), "\n"] : piece)).flat();
  }
  if (token.logprob !== undefined) kinds.push(`heat-${heat(token.logprob)}`);
  if (token.picked) kinds.push("picked");
  return h("span", { class: kinds.join(" "), "data-index": index }, content);
}

/** All tokens of an answer. The Tab key stops once; the arrow keys move between tokens, Enter opens the card. */
export class Tokens {
  constructor(tokens, choose) {
    this.tokens = [];
    this.choose = choose; // a function of (position, token id); null while the answer is being generated
    this.element = h("div", { class: "tokens", tabindex: "0", role: "group", "aria-label": "Tokens of the answer; the arrow keys move between them, Enter shows alternatives" });
    this.at = -1;
    this.element.addEventListener("click", (event) => {
      const element = event.target.closest(".token");
      if (element) this.open(Number(element.dataset.index));
    });
    this.element.addEventListener("keydown", (event) => this.key(event));
    this.add(tokens);
  }

  add(tokens) {
    this.element.append(...tokens.map((token, place) => tokenElement(token, this.tokens.length + place)));
    this.tokens.push(...tokens);
  }

  key(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step !== undefined && this.tokens.length) {
      event.preventDefault();
      event.stopPropagation();
      this.open(Math.min(Math.max(this.at + step, 0), this.tokens.length - 1));
    } else if (event.key === "Enter" && !$("token-card").hidden) {
      event.preventDefault();
      $("token-card").querySelector("button")?.focus();
    } else if (event.key === "Enter" && this.at >= 0) {
      this.open(this.at);
    }
  }

  open(index) {
    closeCard();
    this.at = index;
    const element = this.element.children[index];
    element.setAttribute("aria-expanded", "true");
    showCard(this, index, element);
  }
}

let opened = null;

export function closeCard(refocus = false) {
  if (!opened) return false;
  opened.element.removeAttribute("aria-expanded");
  if (refocus) opened.list.element.focus({ preventScroll: true });
  opened = null;
  $("token-card").hidden = true;
  return true;
}

function showCard(list, index, element) {
  const token = list.tokens[index];
  const card = $("token-card");
  const candidates = token.top.some(([id]) => id === token.id) ? token.top : [...token.top, [token.id, token.text, token.logprob]];
  const rest = 1 - candidates.reduce((sum, [, , logprob]) => sum + Math.exp(logprob), 0);
  const rows = candidates.map(([id, text, logprob]) => {
    const taken = id === token.id;
    const name = text.includes("\ufffd") ? "part of a character" : visible(text);
    const content = [h("span", { class: "bar-fill" }), h("span", { class: "bar-text" }, name), h("span", { class: "bar-share" }, share(logprob))];
    content[0].style.setProperty("--share", String(Math.exp(logprob)));
    const row = list.choose
      ? h("button", { type: "button", "data-token": id, "aria-label": `${name}, ${share(logprob)}${taken ? ", chosen" : ""}: continue from here`, onclick: () => { closeCard(); list.choose(index, id); } }, content)
      : h("div", {}, content);
    return h("li", { class: taken ? "taken" : null }, row);
  });
  card.replaceChildren(
    h("h3", {}, h("span", { class: "bar-text" }, label(token)), h("small", {}, `token ${token.id}`)),
    h("p", {}, `${bits(token.logprob).toFixed(2)} bits of surprise, ${expected(token)} expected${token.picked ? ", picked by you" : ""}`),
    h("ul", {}, rows),
    h("p", {}, [rest > 0.0005 ? `All other tokens: ${share(Math.log(rest))}. ` : "", list.choose ? "Pick a token to continue from there on a new branch." : ""]),
  );
  card.hidden = false;
  opened = { list, element };
  place(card, element);
}

function place(card, element) {
  const at = element.getClientRects()[0] ?? element.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = card;
  const left = Math.min(Math.max(at.left - 12, 12), window.innerWidth - width - 12);
  const below = at.bottom + 8 + height < window.innerHeight || at.top - height - 8 < 12;
  card.style.left = `${left}px`;
  card.style.top = `${below ? Math.min(at.bottom + 8, window.innerHeight - height - 12) : at.top - height - 8}px`;
}

/** Handle keys inside the card: the arrow keys move between the alternatives. Return whether the key was handled. */
export function cardKey(event) {
  if (!opened) return false;
  const buttons = [...$("token-card").querySelectorAll("button")];
  const at = buttons.indexOf(document.activeElement);
  if (at >= 0 && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
    event.preventDefault();
    buttons.at((at + (event.key === "ArrowDown" ? 1 : -1)) % buttons.length).focus();
    return true;
  }
  return false;
}

document.addEventListener("pointerdown", (event) => {
  if (opened && !event.target.closest(".token-card, .token")) closeCard();
});
// The card moves with its token, and closes when the token is out of sight.
document.addEventListener("scroll", (event) => {
  if (!opened || event.target.id !== "thread") return;
  const [token, thread] = [opened.element.getBoundingClientRect(), event.target.getBoundingClientRect()];
  if (token.bottom < thread.top || token.top > thread.bottom) closeCard();
  else place($("token-card"), opened.element);
}, true);

/** Return the prompt's tokens in a collapsed element. */
export function promptElement(prompt) {
  if (!prompt.length) return null;
  const known = prompt.some((token) => token.text);
  const pieces = prompt.map((token) => {
    const element = tokenElement(known ? token : { ...token, text: String(token.id) }, 0);
    element.title = `token ${token.id}`;
    return element;
  });
  return h("details", { class: "prompt" },
    h("summary", {}, `Prompt as the model reads it: ${prompt.length} token${prompt.length === 1 ? "" : "s"}`),
    h("div", { class: "tokens", tabindex: "0", role: "group", "aria-label": "The prompt, token by token" }, pieces));
}

/** Return the statistics of an answer. */
export function numbers(summary) {
  if (!summary) return null;
  const rows = [];
  const add = (name, value) => rows.push(h("div", {}, h("dt", {}, name), h("dd", {}, value)));
  const written = summary.usage?.new_tokens ?? summary.usage?.completion_tokens;
  if (summary.tokens) add(summary.tokens === 1 ? "token" : "tokens", String(summary.tokens));
  else if (written) add("tokens", String(written));
  if (written && summary.seconds) add("tokens/s", (written / summary.seconds).toFixed(1));
  if (summary.first_seconds) add("until the first token", `${summary.first_seconds.toFixed(2)} s`);
  if (summary.surprise !== undefined) add("mean surprise", `${summary.surprise.toFixed(2)} bits`);
  if (summary.entropy !== undefined) add("mean entropy", `${summary.entropy.toFixed(2)} bits`);
  return rows.length ? h("dl", { class: "numbers" }, rows) : null;
}
