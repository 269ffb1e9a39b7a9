// The turns of a conversation. Unchanged turns keep their elements, so that the page does not jump.
import { $, announce, block, copy, flash, h, icon, iconButton, notice } from "./dom.js";
import { Tokens, closeCard, numbers, promptElement } from "./inspect.js";

const ENDS = {
  length: "The token limit was reached.",
  stopped: "Stopped.",
  interrupted: "Interrupted: the server stopped during the answer.",
  error: "The model failed during this answer.",
};

export class Thread {
  /** ``act`` holds the functions that the buttons call; see app.js. */
  constructor(act) {
    this.act = act;
    this.nodes = new Map(); // key -> {element, sign, live}
    this.inspecting = false;
    this.details = new Map(); // id of a message -> its tokens, which never change
    this.sticking = true; // whether the view follows the end of the thread
    const thread = $("thread");
    thread.addEventListener("scroll", () => this.look(), { passive: true });
    new ResizeObserver(() => this.stay()).observe(thread);
    $("latest").addEventListener("click", () => this.toEnd());
  }

  clear() {
    this.nodes.clear();
    $("turns").replaceChildren();
    this.sticking = true;
    $("latest").hidden = true;
  }

  toEnd() {
    const thread = $("thread");
    thread.scrollTop = thread.scrollHeight;
    this.sticking = true;
    $("latest").hidden = true;
  }

  look() {
    const thread = $("thread");
    this.sticking = thread.scrollHeight - thread.scrollTop - thread.clientHeight < 60;
    $("latest").hidden = this.sticking;
  }

  /** Follow the end of the thread if the reader is there. Do not move a reader who has scrolled up. */
  stay() {
    if (this.sticking) $("thread").scrollTop = $("thread").scrollHeight;
    else this.look();
  }

  /** Show a view, with the answers that are being generated (id -> answer). */
  show(view, running) {
    this.view = view;
    this.answering = running.size > 0;
    const { conversation, turns } = view;
    this.kind = conversation.kind;
    $("app").classList.toggle("text-kind", this.kind === "text");
    const turnNodes = turns.map((turn) => (turn.pair ? this.pair(turn.pair, running) : this.message(turn.message)));
    for (const answer of running.values()) {
      if (!answer.comparison && answer.parent === conversation.leaf) turnNodes.push(this.running(answer));
    }
    const used = new Set(turnNodes.flatMap(({ keys }) => keys));
    for (const key of [...this.nodes.keys()]) if (!used.has(key)) this.nodes.delete(key);
    const list = $("turns");
    turnNodes.forEach(({ element }, index) => {
      if (list.children[index] !== element) list.insertBefore(element, list.children[index] ?? null);
    });
    while (list.children.length > turnNodes.length) list.lastElementChild.remove();
    this.stay();
  }

  node(key, sign, build) {
    const previous = this.nodes.get(key);
    if (previous && (previous.sign === sign || previous.element.querySelector(".editor"))) return previous;
    const node = { sign, ...build() };
    if (previous) previous.element.replaceWith(node.element);
    this.nodes.set(key, node);
    return node;
  }

  message(message) {
    const key = `m:${message.id}`;
    const waits = this.view.conversation.leaf === message.id && !this.answering;
    const sign = JSON.stringify([message, message.role === "assistant" && this.inspecting, waits]);
    return { keys: [key], element: this.node(key, sign, () => ({ element: this.build(message) })).element };
  }

  running(answer) {
    const key = `r:${answer.id}`;
    const sign = `${answer.round}:${this.inspecting}`;
    return { keys: [key], element: this.node(key, sign, () => this.buildRunning(answer)).element };
  }

  pair(pair, running) {
    const sides = ["left", "right"].map((side) => {
      if (pair[side]) return this.message(pair[side]);
      const answer = [...running.values()].find(({ comparison }) => comparison?.id === pair.id && comparison.side === side);
      return answer ? this.running(answer) : { keys: [], element: h("p", { class: "fault" }, "This answer failed.") };
    });
    const key = `p:${pair.id}`;
    const ready = Boolean(pair.left && pair.right);
    const sign = JSON.stringify([pair.vote, pair.chosen, ready]);
    const { element, columns } = this.node(key, sign, () => this.buildPair(pair, ready));
    sides.forEach((side, index) => {
      if (columns[index].firstElementChild !== side.element) columns[index].replaceChildren(side.element);
    });
    return { keys: [key, ...sides.flatMap(({ keys }) => keys)], element };
  }

  buildPair(pair, ready) {
    const columns = ["left", "right"].map((side) => h("div", { class: pair.chosen === side && pair.vote ? "chosen" : null }));
    const choices = [["left", "First is better"], ["tie", "Equally good"], ["both_bad", "Both are bad"], ["right", "Second is better"]];
    const votes = choices.map(([vote, name]) => h("button", {
      type: "button", "aria-pressed": String(pair.vote === vote), disabled: !ready, onclick: () => this.act.vote(pair.id, vote),
    }, name));
    const element = h("section", { class: "pair", "aria-label": "Two answers" },
      h("div", { class: "columns" }, columns), h("div", { class: "votes", role: "group", "aria-label": "Which answer is better?" }, votes));
    return { element, columns };
  }

  // One message

  build(message) {
    const assistant = message.role === "assistant";
    const said = h("div", { class: assistant && this.kind === "chat" ? "said prose" : "said" });
    const article = h("article", { class: `message ${message.role}`, "aria-label": assistant ? `Answer of ${message.model ?? "a model"}` : "You", "data-id": message.id });
    if (assistant && this.kind === "chat") article.append(this.who(message.model ?? (message.summary ? "Model" : "Edited by you")));
    if (assistant && message.blocks) said.append(...message.blocks.map(block));
    else said.textContent = message.content;
    article.append(said);
    if (message.summary?.error) article.append(h("p", { class: "fault" }, message.summary.error));
    if (assistant && this.inspecting) this.inspect(message, article, said);
    article.append(this.tools(message, article));
    return article;
  }

  who(name) {
    return h("p", { class: "who" }, name);
  }

  async inspect(message, article, said) {
    if (!message.summary) return;
    if (!message.summary.tokens) {
      said.after(numbers(message.summary) ?? "", h("p", { class: "who" }, "This hosted model reports no probabilities."));
      return;
    }
    const put = ({ tokens, prompt, summary }) => {
      const list = new Tokens(tokens, (position, token) => this.act.goOn(message.id, position, token));
      const folded = promptElement(prompt);
      if (folded) said.before(folded);
      said.classList.remove("prose");
      said.replaceChildren(list.element);
      said.after(numbers(summary));
      this.stay();
    };
    const known = this.details.get(message.id);
    if (known) return put(known);
    try {
      const details = await this.act.tokens(message.id);
      this.details.set(message.id, details);
      if (article.isConnected) put(details);
    } catch (problem) {
      notice(problem.message);
    }
  }

  tools(message, article) {
    const { act } = this;
    const assistant = message.role === "assistant";
    const items = [];
    if (message.siblings.length > 1) items.push(this.branch(message));
    const copying = iconButton("copy", "Copy", async () => {
      if (await copy(message.content)) flash(copying, [icon("check")]);
    });
    items.push(copying, iconButton("edit", "Edit", () => this.edit(message, article), { "data-do": "edit" }));
    if (assistant) {
      items.push(iconButton("again", "Another answer", () => act.again(message), { "data-do": "again" }));
      if (message.summary?.tokens && ["length", "stopped", "interrupted", "error"].includes(message.finish)) {
        items.push(h("span", { class: "note" }, ENDS[message.finish]),
          h("button", { type: "button", class: "text-button", onclick: () => act.goOn(message.id, message.summary.tokens, null) }, icon("go-on"), "Continue"));
      } else if (ENDS[message.finish]) {
        items.push(h("span", { class: "note" }, ENDS[message.finish]));
      }
    } else if (this.view.conversation.leaf === message.id && !this.answering) {
      items.push(iconButton("again", "Answer this message", () => act.answer(message.id), { "data-do": "again" }));
    }
    return h("div", { class: message.siblings.length > 1 ? "tools branched" : "tools" }, items);
  }

  branch(message) {
    const { siblings } = message;
    const at = siblings.indexOf(message.id);
    const go = (step) => () => this.act.show(siblings[at + step]);
    return h("span", { class: "branch", role: "group", "aria-label": `Branch ${at + 1} of ${siblings.length}` },
      iconButton("left", "Previous branch", go(-1), { disabled: at === 0, "data-do": "left" }),
      h("span", {}, `${at + 1}/${siblings.length}`),
      iconButton("right", "Next branch", go(1), { disabled: at === siblings.length - 1, "data-do": "right" }));
  }

  edit(message, article) {
    if (article.querySelector(".editor")) return;
    closeCard();
    const hidden = [...article.children];
    const area = h("textarea", { "aria-label": "Edited message" });
    area.value = message.content;
    const close = () => {
      editor.remove();
      hidden.forEach((child) => { child.hidden = false; });
    };
    const save = async () => {
      if (!area.value.trim()) return;
      editor.remove(); // a message with an editor would not be replaced
      try {
        await this.act.edit(message.id, area.value);
      } catch {
        article.append(editor);
        return;
      }
      close();
    };
    const editor = h("form", { class: "editor" }, area,
      h("div", { class: "row" }, h("button", { type: "button", class: "button", onclick: close }, "Cancel"),
        h("button", { class: "button first" }, message.role === "user" ? "Send" : "Save")));
    editor.addEventListener("submit", (event) => { event.preventDefault(); save(); });
    editor.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.stopPropagation(); close(); article.querySelector("[data-do=edit]")?.focus(); }
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing && (message.role === "user" || event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        save();
      }
    });
    hidden.forEach((child) => { child.hidden = true; });
    article.append(editor);
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }

  // An answer that is being generated

  buildRunning(answer) {
    const prose = this.kind === "chat" && !(this.inspecting && answer.tokens.length);
    const said = h("div", { class: prose ? "said prose" : "said", "aria-busy": "true" });
    const name = answer.comparison?.hidden ? "Model" : answer.model;
    const article = h("article", { class: "message assistant running", "aria-label": `Answer of ${name}, in progress`, "data-answer": answer.id });
    if (this.kind === "chat") article.append(this.who(name));
    const tools = h("div", { class: "tools" });
    article.append(said, tools);
    const live = { said, tokens: null };
    if (this.inspecting) {
      live.tokens = new Tokens(answer.tokens, null);
      if (answer.tokens.length) said.append(live.tokens.element);
    }
    if (!this.inspecting || !answer.tokens.length) {
      if (answer.blocks) said.append(...answer.blocks.map(block));
      else said.textContent = answer.text;
    }
    said.classList.toggle("waiting", !said.childNodes.length);
    return { element: article, live };
  }

  /** Append a streamed piece to its answer. */
  piece(answer, event) {
    const live = this.nodes.get(`r:${answer.id}`)?.live;
    if (!live) return;
    const { said } = live;
    if (live.tokens && answer.tokens.length) {
      if (!live.tokens.element.isConnected) {
        said.classList.remove("prose");
        said.replaceChildren(live.tokens.element);
      }
      live.tokens.add(event.tokens);
    } else if (event.blocks) {
      while (said.children.length > event.keep) said.lastElementChild.remove();
      said.append(...event.blocks.map(block));
    } else {
      said.append(event.text);
    }
    said.classList.toggle("waiting", !said.childNodes.length);
    this.stay();
  }

  setInspecting(on) {
    this.inspecting = on;
    closeCard();
    announce(on ? "Inspect is on: every token is shown with its probability" : "Inspect is off");
  }
}
