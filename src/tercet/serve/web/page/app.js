// The page: which conversation is open, what happens in it, what the user does.
import { get, patch, post } from "./api.js";
import { $, announce, h, notice } from "./dom.js";
import { listenToKeys, showKeys } from "./keys.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Thread } from "./thread.js";

const state = {
  models: [], // as the server has them
  defaults: {}, // most tokens by kind
  id: null, // of the open conversation; null: a new one that the server doesn't know yet
  view: null,
  draft: { kind: "chat", settings: {} }, // of a new conversation
  running: new Map(), // answers on their way, by id
  events: null,
  asked: 0, // views asked for, so that an old one never replaces a newer
  round: 0,
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

const path = (rest = "") => `/conversations/${encodeURIComponent(state.id)}${rest}`; // it may be what a link says
const kind = () => state.view?.conversation.kind ?? state.draft.kind;
const current = () => state.view?.conversation.settings ?? state.draft.settings;
const modelOf = (name) => state.models.find((one) => one.name === name) ?? state.models[0];
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

/** Do what changes the conversation; its view is the answer. ``strict``: the caller wants to know of failure. */
async function run(request, strict = false) {
  notice("");
  const asked = ++state.asked;
  try {
    const view = await request();
    if (asked === state.asked) put(view);
  } catch (problem) {
    notice(problem.message);
    if (state.id && asked === state.asked) refresh(); // in place of the view that this one overtook
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

/** New conversations begin with the last used model and sampling, without the system prompt. */
function remember(value) {
  const { system, against, blind, ...kept } = value;
  localStorage.setItem("settings", JSON.stringify(kept));
}

// Which conversation

async function open(id, push = true) {
  settings.flush();
  state.events?.close();
  Object.assign(state, { id, view: null, events: null, running: new Map() });
  state.asked++;
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
  let kept = {};
  try {
    kept = JSON.parse(remembered("settings") ?? "{}");
  } catch {
    localStorage.removeItem("settings");
  }
  if (!state.models.some((one) => one.name === kept.model)) delete kept.model;
  const model = modelOf(kept.model);
  state.draft = { kind: model && !model.chats ? "text" : "chat", settings: kept };
}

async function refresh() {
  const [id, asked] = [state.id, ++state.asked];
  try {
    const view = await get(path());
    if (id === state.id && asked === state.asked) put(view);
  } catch (problem) {
    if (id !== state.id) return; // another one is open by now
    if (problem.status === 404) {
      open(null);
      sidebar.load();
    }
    notice(problem.status === 404 ? "This conversation is not there any more." : problem.message);
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

// What happens in it

const ended = []; // answers that are messages in the next view

function watch() {
  const events = new EventSource(`/page/api${path("/events")}`);
  state.events = events;
  events.addEventListener("message", (message) => {
    if (state.events === events) happened(JSON.parse(message.data));
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

function happened(event) {
  const answer = state.running.get(event.id);
  if (event.type === "here") {
    state.running = new Map(event.answers.map((one) => [one.id, begun(one)]));
    refresh();
  } else if (event.type === "started") {
    state.running.set(event.answer.id, begun(event.answer));
    announce("The answer begins");
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

// What is shown

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
  settings.show(current(), kind(), state.defaults);
  $("legend").hidden = !thread.inspecting || !view?.turns.length;
  $("stop").hidden = !state.running.size;
  $("send").hidden = Boolean(state.running.size);
  $("turns").setAttribute("aria-busy", String(Boolean(state.running.size)));
  const text = kind() === "text";
  $("message").placeholder = !text ? "Write a message" : view?.turns.length ? "Add to the text, or just continue" : "Begin a text";
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
  $("start-title").textContent = text ? "Begin a text" : "What is on your mind?";
  const room = model?.context ? ` It reads up to ${model.context.toLocaleString()} tokens.` : "";
  $("start-note").textContent = base
    ? `${model.name} is a base model: it has learned to continue texts, not to converse. Write a beginning and see how it goes on.${room}`
    : text ? `${model?.name} writes on from wherever your text ends.${room}`
    : `You talk to ${model?.name}.${room}`;
}

function showModels() {
  const { model, against } = current();
  const chosen = model ?? state.models[0]?.name;
  fill($("model"), state.models, chosen);
  fill($("against"), state.models, against);
  $("against-group").hidden = !against;
  $("app").classList.toggle("comparing", Boolean(against));
  $("compare").setAttribute("aria-pressed", String(Boolean(against)));
  $("compare").disabled = kind() === "text" && state.models.filter((one) => one.local).length === 0;
}

function fill(select, models, chosen) {
  const names = models.map((one) => one.name);
  // A conversation may be older than the server: its model is shown as it is, for another to be chosen.
  const gone = chosen && !names.includes(chosen) ? [chosen] : [];
  const wanted = [...names, ...gone].join("\n");
  if (select.dataset.models !== wanted) {
    select.dataset.models = wanted;
    select.replaceChildren(
      ...models.map((one) => h("option", { value: one.name }, one.chats ? one.name : `${one.name} (base)`)),
      ...gone.map((name) => h("option", { value: name, disabled: true }, `${name} (not served)`)));
  }
  select.value = chosen ?? "";
}

// What the user does

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

/** Browsers that don't size a text field by its content get told. */
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
  const fits = state.models.filter((one) => (kind() === "text" ? one.local : one.chats));
  const second = fits.find((one) => one.name !== first) ?? fits[0];
  if (!second) return notice("There is no second model that could answer here.");
  return changeSettings({ ...rest, model: first, against: second.name });
}

function inspect() {
  const on = !thread.inspecting;
  thread.setInspecting(on);
  localStorage.setItem("inspect", on ? "on" : "off");
  $("inspect").setAttribute("aria-pressed", String(on));
  show();
}

/** Press a button of the last message that has it. */
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
  r: ["another answer", () => press("again")],
  ArrowLeft: ["previous branch of the last message that has several", () => press("left")],
  ArrowRight: ["next branch", () => press("right")],
  t: ["light or dark", () => theme()],
  "?": ["this list", () => showKeys(KEYS)],
};

function escape() {
  if (!$("settings").hidden) settings.toggle(false);
  else if ($("sidebar").classList.contains("open")) sidebar.drawer(false);
  else stop();
}

function listen() {
  // Followed as a link it would name another conversation.
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
    // A hidden tab needs no connection; browsers allow only a few to one server.
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
    const found = await get("/models");
    state.models = found.models;
    state.defaults = found.max_tokens;
  } catch (problem) {
    notice(problem.message);
    return;
  }
  await sidebar.load();
  await open(location.hash.slice(1) || null, false);
}

begin();
