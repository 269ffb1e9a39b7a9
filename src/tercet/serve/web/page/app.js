// The page: the open conversation, the server's events about it, and the user's actions.
import { get, patch, post } from "./api.js";
import { $, announce, h, notice } from "./dom.js";
import { listenToKeys, showKeys } from "./keys.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Thread } from "./thread.js";

const state = {
  models: [], // the served models
  defaults: {}, // the default token limit of an answer, by kind of conversation
  id: null, // of the open conversation; null: a new conversation that is not on the server yet
  view: null,
  draft: { kind: "chat", settings: {} }, // kind and settings of a new conversation
  running: new Map(), // answers that are being generated, by id
  events: null,
  requests: 0, // number of requested views, so that an older view never replaces a newer one
  round: 0, // number of answers that this page has begun to show
};

const act = {
  show: (message) => change({ show: message }),
  answer: (message) => run(() => post(path("/answers"), { parent: message })),
  again: (message) => run(() => post(path("/answers"), { parent: parentOf(message.id) })),
  edit: (message, content) => run(() => post(path("/edits"), { message, content }), true),
  goOn: (message, position, token) => run(() => post(path("/continuations"), token === null ? { message, position } : { message, position, token })),
  tokens: (message) => get(path(`/messages/${message}/tokens`)),
  vote: (comparison, vote) => run(() => post(path("/votes"), { comparison, vote })),
};

const thread = new Thread(act);
const sidebar = new Sidebar((id) => open(id));
const settings = new Settings((value) => changeSettings(value));

const path = (rest = "") => `/conversations/${encodeURIComponent(state.id)}${rest}`; // the id may come from a link
const kind = () => state.view?.conversation.kind ?? state.draft.kind;
const current = () => state.view?.conversation.settings ?? state.draft.settings;
const modelOf = (name) => state.models.find((model) => model.name === name) ?? state.models[0];
const remembered = (name) => localStorage.getItem(name);

function parentOf(id) {
  let before = null;
  for (const turn of state.view.turns) {
    const pair = turn.pair ? [turn.pair.left, turn.pair.right].filter(Boolean) : [turn.message];
    if (pair.some((message) => message.id === id)) return before;
    before = turn.pair ? turn.pair[turn.pair.chosen ?? "left"]?.id : turn.message.id;
  }
  return before;
}

/** Send a request that changes the conversation, and show the view it returns. ``strict`` rethrows an error. */
async function run(request, strict = false) {
  notice("");
  const number = ++state.requests;
  try {
    const view = await request();
    if (number === state.requests) put(view);
  } catch (problem) {
    notice(problem.message);
    if (state.id && number === state.requests) refresh(); // replaces the earlier view that this request superseded
    if (strict) throw problem;
  }
}

const change = (body) => run(() => patch(path(), body));

function changeSettings(value) {
  if (state.id) return change({ settings: value });
  state.draft.settings = value;
  remember(value);
  return show();
}

/** Store model and sampling for new conversations; they do not inherit the system prompt. */
function remember(value) {
  const { system, against, blind, ...stored } = value;
  localStorage.setItem("settings", JSON.stringify(stored));
}

// Opening a conversation

async function open(id, push = true) {
  settings.flush();
  state.events?.close();
  Object.assign(state, { id, view: null, events: null, running: new Map() });
  state.requests++;
  thread.clear();
  notice("");
  if (push && location.hash !== (id ? `#${id}` : "")) history.pushState(null, "", id ? `#${id}` : location.pathname);
  sidebar.select(id);
  if (id) {
    watch();
  } else {
    fresh();
    show();
    if (!matchMedia("(pointer: coarse)").matches) $("message").focus(); // a phone's keyboard would cover the page
  }
}

function fresh() {
  let stored = {};
  try {
    stored = JSON.parse(remembered("settings") ?? "{}");
  } catch {
    localStorage.removeItem("settings");
  }
  if (!state.models.some((model) => model.name === stored.model)) delete stored.model;
  const model = modelOf(stored.model);
  state.draft = { kind: model && !model.chats ? "text" : "chat", settings: stored };
}

async function refresh() {
  const [id, number] = [state.id, ++state.requests];
  try {
    const view = await get(path());
    if (id === state.id && number === state.requests) put(view);
  } catch (problem) {
    if (id !== state.id) return; // another conversation is open by now
    if (problem.status === 404) {
      open(null);
      sidebar.load();
    }
    notice(problem.status === 404 ? "This conversation no longer exists." : problem.message);
  }
}

function put(view) {
  const before = state.view?.conversation;
  state.view = view;
  const { conversation } = view;
  if (!before || before.title !== conversation.title || before.updated !== conversation.updated) sidebar.load();
  for (const id of ended.splice(0)) state.running.delete(id);
  show();
}

// Events of the conversation

const ended = []; // ids of answers that the next view contains as messages

function watch() {
  const events = new EventSource(`/page/api${path("/events")}`);
  state.events = events;
  events.addEventListener("message", (message) => {
    if (state.events === events) receive(JSON.parse(message.data));
  });
  events.addEventListener("error", () => {
    if (state.events !== events) return;
    announce("Connection lost");
    if (events.readyState === EventSource.CLOSED) {
      setTimeout(() => {
        if (state.events === events) refresh().then(() => state.id && state.events === events && watch());
      }, 1500);
    }
  });
}

function receive(event) {
  const answer = state.running.get(event.id);
  if (event.type === "here") {
    state.running = new Map(event.answers.map((answer) => [answer.id, begun(answer)]));
    refresh();
  } else if (event.type === "started") {
    state.running.set(event.answer.id, begun(event.answer));
    announce("The model is answering");
    if (state.view) show();
  } else if (event.type === "piece" && answer) {
    answer.tokens.push(...event.tokens);
    if (event.blocks) answer.blocks = [...answer.blocks.slice(0, event.keep), ...event.blocks];
    else answer.text += event.text;
    thread.piece(answer, event);
  } else if (event.type === "ended") {
    if (event.error) notice(event.error);
    announce(event.error ? "The answer failed" : "The answer is complete");
    ended.push(event.id);
    refresh();
  } else if (event.type === "changed") {
    refresh();
  }
}

const begun = (answer) => ({ ...answer, round: ++state.round });

// Showing the conversation

function show() {
  const { view } = state;
  const title = view?.conversation.title || "New conversation";
  $("title").textContent = title;
  document.title = view ? `${title} · Tercet` : "Tercet";
  $("start").hidden = Boolean(view?.turns.length || state.running.size || (state.id && !view));
  $("export-menu").hidden = !view;
  if (view) {
    $("export-markdown").href = `/page/api${path("/export?form=markdown")}`;
    $("export-json").href = `/page/api${path("/export?form=json")}`;
    thread.show(view, state.running);
  }
  showModels();
  const name = current().model || state.default;
  settings.show(current(), kind(), state.defaults, state.models.find((model) => model.name === name)?.sampling);
  $("legend").hidden = !thread.inspecting || !view?.turns.length;
  $("stop").hidden = !state.running.size;
  $("send").hidden = Boolean(state.running.size);
  $("turns").setAttribute("aria-busy", String(Boolean(state.running.size)));
  const text = kind() === "text";
  $("message").placeholder = !text ? "Write a message" : view?.turns.length ? "Add to the text, or continue it" : "Write the beginning of a text";
  $("send").setAttribute("aria-label", text ? "Continue the text" : "Send");
  showStart();
  canSend();
}

function showStart() {
  if ($("start").hidden) return;
  const model = modelOf(current().model);
  const base = Boolean(model && !model.chats);
  const text = kind() === "text";
  for (const input of $("start").querySelectorAll("input")) {
    input.checked = input.value === kind();
    input.disabled = input.value === "chat" ? base : !model?.local;
  }
  $("start-title").textContent = text ? "Begin a text" : "Start a conversation";
  const context = model?.context ? ` Its context is ${model.context.toLocaleString()} tokens.` : "";
  $("start-note").textContent = base
    ? `${model.name} is a base model: it continues texts and is not trained for conversations. Write the beginning of a text.${context}`
    : text ? `${model?.name} continues your text.${context}`
    : `${model?.name} will answer.${context}`;
}

function showModels() {
  const { model, against } = current();
  const chosen = model ?? state.models[0]?.name;
  fill($("model"), state.models, chosen);
  fill($("against"), state.models, against);
  $("against-group").hidden = !against;
  $("app").classList.toggle("comparing", Boolean(against));
  $("compare").setAttribute("aria-pressed", String(Boolean(against)));
  $("compare").disabled = kind() === "text" && !state.models.some((model) => model.local);
}

function fill(select, models, chosen) {
  const names = models.map((model) => model.name);
  // The model of an older conversation may not be served now. Its name is shown, so that the user can choose another.
  const missing = chosen && !names.includes(chosen) ? [chosen] : [];
  const options = [...names, ...missing].join("\n");
  if (select.dataset.models !== options) {
    select.dataset.models = options;
    select.replaceChildren(
      ...models.map((model) => h("option", { value: model.name }, model.chats ? model.name : `${model.name} (base)`)),
      ...missing.map((name) => h("option", { value: name, disabled: true }, `${name} (not served)`)));
  }
  select.value = chosen ?? "";
}

// The user's actions

function canSend() {
  const leaf = state.view?.conversation.leaf;
  $("send").disabled = !$("message").value.trim() && !(kind() === "text" && leaf);
}

async function send() {
  const content = $("message").value;
  if ($("send").disabled || state.running.size) return;
  const started = state.id === null;
  $("send").disabled = true;
  try {
    if (started) {
      const view = await post("/conversations", { kind: state.draft.kind, settings: state.draft.settings });
      state.id = view.conversation.id;
      state.view = view;
      history.replaceState(null, "", `#${state.id}`);
      sidebar.select(state.id);
      watch();
    }
    $("message").value = "";
    fit();
    thread.sticking = true;
    await run(() => post(path("/messages"), { content, parent: state.view?.conversation.leaf ?? null }), true);
    thread.toEnd();
  } catch (problem) {
    notice(problem.message);
    if (!$("message").value) $("message").value = content;
    fit();
  }
  canSend();
}

/** Size the text field by its content in browsers that do not do so themselves. */
function fit() {
  const field = $("message");
  if (CSS.supports("field-sizing", "content")) return;
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

const stop = () => state.running.size && run(() => post(path("/stop")));

function compare() {
  const { against, blind, ...rest } = current();
  if (against) return changeSettings(rest);
  const first = modelOf(rest.model)?.name;
  const suitable = state.models.filter((model) => (kind() === "text" ? model.local : model.chats));
  const second = suitable.find((model) => model.name !== first) ?? suitable[0];
  if (!second) return notice("No second model can answer this conversation.");
  return changeSettings({ ...rest, model: first, against: second.name });
}

function inspect() {
  const on = !thread.inspecting;
  thread.setInspecting(on);
  localStorage.setItem("inspect", on ? "on" : "off");
  $("inspect").setAttribute("aria-pressed", String(on));
  show();
}

/** Press a button of the last message that has this button. */
function press(name, role = "") {
  const buttons = [...document.querySelectorAll(`.turns ${role} [data-do="${name}"]:not(:disabled)`)];
  buttons.at(-1)?.click();
}

function theme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
}

const KEYS = {
  "/": ["search the conversations", () => { sidebar.drawer(true); $("search").focus(); }],
  n: ["new conversation", () => open(null)],
  m: ["write a message", () => $("message").focus()],
  i: ["inspect", () => inspect()],
  c: ["compare two models", () => compare()],
  s: ["settings", () => settings.toggle()],
  e: ["edit your last message", () => press("edit", ".user")],
  r: ["generate another answer", () => press("again")],
  ArrowLeft: ["previous branch of the last message with branches", () => press("left")],
  ArrowRight: ["next branch", () => press("right")],
  t: ["switch between light and dark", () => theme()],
  "?": ["show this list", () => showKeys(KEYS)],
};

function escape() {
  if (!$("settings").hidden) settings.toggle(false);
  else if ($("sidebar").classList.contains("open")) sidebar.drawer(false);
  else stop();
}

function listen() {
  // Following the link would change the hash, which names the conversation.
  document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); $("message").focus(); });
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("message").addEventListener("input", () => { fit(); canSend(); });
  $("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  $("stop").addEventListener("click", stop);
  $("new").addEventListener("click", () => { sidebar.drawer(false); open(null); });
  $("inspect").addEventListener("click", inspect);
  $("compare").addEventListener("click", compare);
  $("theme").addEventListener("click", theme);
  $("help").addEventListener("click", () => showKeys(KEYS));
  $("model").addEventListener("change", () => {
    const value = { ...current(), model: $("model").value };
    if (!state.id) {
      if (!modelOf(value.model).chats) state.draft.kind = "text";
      else if (!modelOf(value.model).local) state.draft.kind = "chat";
    }
    remember(value);
    changeSettings(value);
  });
  $("against").addEventListener("change", () => changeSettings({ ...current(), against: $("against").value }));
  $("start").addEventListener("change", (event) => { state.draft.kind = event.target.value; setKind(); });
  $("export-menu").addEventListener("click", (event) => { if (event.target.closest("a")) $("export-menu").open = false; });
  document.addEventListener("pointerdown", (event) => { if (!event.target.closest("#export-menu")) $("export-menu").open = false; });
  window.addEventListener("popstate", () => open(location.hash.slice(1) || null, false));
  document.addEventListener("visibilitychange", () => {
    // A hidden tab needs no connection; browsers allow only a few connections to one server.
    if (document.hidden) { state.events?.close(); state.events = null; } else if (state.id && !state.events) watch();
  });
  listenToKeys(KEYS, escape);
}

function setKind() {
  if (state.id) change({ kind: state.draft.kind });
  else show();
}

async function begin() {
  listen();
  if (remembered("inspect") === "on") { thread.inspecting = true; $("inspect").setAttribute("aria-pressed", "true"); }
  try {
    const { models, max_tokens: defaults, default: first } = await get("/models");
    Object.assign(state, { models, defaults, default: first });
  } catch (problem) {
    notice(problem.message);
    return;
  }
  await sidebar.load();
  await open(location.hash.slice(1) || null, false);
}

begin();
