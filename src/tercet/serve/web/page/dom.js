// Functions that create elements and icons and show messages to the user.

/** Create an element: h("button", {class: "x", onclick: f}, "text", child). Properties whose names begin with "on" are listeners. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else element.setAttribute(name, String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const $ = (id) => document.getElementById(id);

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

export function iconButton(name, label, onclick, more = {}) {
  return h("button", { type: "button", class: "icon-button", title: label, "aria-label": label, onclick, ...more }, icon(name));
}

// The only place where text becomes HTML: blocks that the server has rendered and sanitised.
const policy = window.trustedTypes
  ? window.trustedTypes.createPolicy("tercet", { createHTML: (html) => html })
  : { createHTML: (html) => html };

/** Return the element of one block of an answer. A code block gets a button that copies it. */
export function block(html) {
  const template = document.createElement("template");
  template.innerHTML = policy.createHTML(html);
  for (const head of template.content.querySelectorAll(".code-head")) head.append(copyCode(head));
  return template.content.firstElementChild ?? document.createElement("p");
}

function copyCode(head) {
  const button = h("button", { type: "button" }, icon("copy"), "Copy");
  button.addEventListener("click", async () => {
    if (await copy(head.parentElement.querySelector("code").textContent)) flash(button, [icon("check"), "Copied"]);
  });
  return button;
}

/** Show other content in a button for 1.5 seconds. */
export function flash(button, content) {
  const before = [...button.childNodes];
  button.replaceChildren(...content);
  announce("Copied");
  setTimeout(() => button.replaceChildren(...before), 1500);
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Browsers offer the clipboard only over https and on localhost. Elsewhere execCommand still works.
    const area = h("textarea", { class: "unseen" });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

/** Announce a text to users of screen readers. */
export function announce(text) {
  $("status").textContent = "";
  $("status").textContent = text;
}

export function toast(text, action = null, seconds = 5) {
  const box = h("div", { class: "toast", role: "status" }, text);
  if (action) {
    box.append(h("button", { type: "button", onclick: () => { box.remove(); action.run(); } }, action.name));
  }
  $("toasts").replaceChildren(box);
  setTimeout(() => box.remove(), seconds * 1000);
}

export function notice(text) {
  $("notice").hidden = !text;
  $("notice").textContent = text || "";
}

/** Return a function that calls ``run`` once it has not been called for a while; ``.now()`` runs a waiting call at once. */
export function debounced(run, milliseconds) {
  let timer = 0, pending = null;
  const now = () => {
    clearTimeout(timer);
    const args = pending;
    pending = null;
    if (args) run(...args);
  };
  const later = (...args) => {
    pending = args;
    clearTimeout(timer);
    timer = setTimeout(now, milliseconds);
  };
  return Object.assign(later, { now });
}
