// Requests to the server. Bodies and responses are JSON; an error becomes an exception with the server's message.
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
  let response;
  try {
    response = await fetch(path.startsWith("/page/") ? path : ROOT + path, options);
  } catch {
    throw new Refused("The server does not respond. Check that it is running.", 0);
  }
  if (response.status === 401 && path !== "/page/login") {
    await login();
    return call(method, path, body);
  }
  const text = await response.text();
  let value = null;
  try {
    value = text ? JSON.parse(text) : null;
  } catch {
    throw new Refused(`The server's response is not valid JSON (status ${response.status}).`, response.status);
  }
  if (!response.ok) throw new Refused(value?.error?.message ?? `The server refused the request (status ${response.status}).`, response.status);
  return value;
}

export const get = (path) => call("GET", path);
export const post = (path, body = {}) => call("POST", path, body);
export const patch = (path, body) => call("PATCH", path, body);
export const remove = (path) => call("DELETE", path, {});

let pendingLogin = null;

/** Ask the user for the API key. The promise resolves when the server has accepted it. */
function login() {
  pendingLogin ??= new Promise((resolve) => {
    const key = h("input", { type: "password", id: "login-key", autocomplete: "current-password", required: true });
    const error = h("p", { class: "notice", role: "alert", hidden: true });
    const form = h("form", {}, h("h2", { id: "login-title" }, "API key"),
      h("p", {}, "This server requires a key. The key is stored in a cookie that only this server can read."),
      error,
      h("label", { class: "field" }, h("span", { class: "unseen" }, "API key"), key),
      h("p", { class: "row" }, h("span"), h("button", { class: "button first" }, "Continue")));
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      try {
        await call("POST", "/page/login", { key: key.value });
        $("login").close();
        pendingLogin = null;
        resolve();
      } catch (problem) {
        error.hidden = false;
        error.textContent = problem.message;
      }
    });
    $("login").replaceChildren(form);
    $("login").addEventListener("cancel", (event) => event.preventDefault());
    $("login").showModal();
  });
  return pendingLogin;
}
