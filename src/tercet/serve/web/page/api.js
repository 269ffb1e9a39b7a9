// Requests to the server: JSON there and back, its errors as exceptions with its words.
import { $, h } from "./dom.js";

const ROOT = "/page/api";

export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function call(method, path, body) {
  const options = { method, headers: {}, credentials: "same-origin" };
  if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["content-type"] = "application/json";
  }
  let answer;
  try {
    answer = await fetch(path.startsWith("/page/") ? path : ROOT + path, options);
  } catch {
    throw new Refused("The server does not answer. Is it still running?", 0);
  }
  if (answer.status === 401 && path !== "/page/login") {
    await login();
    return call(method, path, body);
  }
  const text = await answer.text();
  let value = null;
  try {
    value = text ? JSON.parse(text) : null;
  } catch {
    throw new Refused(`The server's answer can't be read (${answer.status}).`, answer.status);
  }
  if (!answer.ok) throw new Refused(value?.error?.message ?? `The server refused (${answer.status}).`, answer.status);
  return value;
}

export const get = (path) => call("GET", path);
export const post = (path, body = {}) => call("POST", path, body);
export const patch = (path, body) => call("PATCH", path, body);
export const remove = (path) => call("DELETE", path, {});

let asking = null;

/** Ask for the API key; resolves when the server has taken it. */
function login() {
  asking ??= new Promise((resolve) => {
    const key = h("input", { type: "password", id: "login-key", autocomplete: "current-password", required: true });
    const wrong = h("p", { class: "notice", role: "alert", hidden: true });
    const form = h("form", {}, h("h2", { id: "login-title" }, "API key"),
      h("p", {}, "This server asks for a key. It is kept in a cookie that only this server can read."),
      wrong,
      h("label", { class: "field" }, h("span", { class: "unseen" }, "API key"), key),
      h("p", { class: "row" }, h("span"), h("button", { class: "button first" }, "Continue")));
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      try {
        await call("POST", "/page/login", { key: key.value });
        $("login").close();
        asking = null;
        resolve();
      } catch (problem) {
        wrong.hidden = false;
        wrong.textContent = problem.message;
      }
    });
    $("login").replaceChildren(form);
    $("login").addEventListener("cancel", (event) => event.preventDefault());
    $("login").showModal();
  });
  return asking;
}
