// Keyboard shortcuts, and the dialog that lists them.
import { $, h } from "./dom.js";
import { cardKey, closeCard } from "./inspect.js";

const SINGLE = "single-keys";

/**
 * ``actions`` maps a key to [description, function]. Single keys work outside text fields, and the user can switch them
 * off. ``escape`` is called for the Escape key if no card is open.
 */
export function listenToKeys(actions, escape) {
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.isComposing || document.querySelector("dialog[open]")) return;
    if (cardKey(event)) return;
    if (event.key === "Escape") {
      if (!closeCard(true)) escape();
      return;
    }
    if (event.key.toLowerCase() === "k" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      actions["/"][1]();
      return;
    }
    if (event.altKey && (event.key === "ArrowLeft" || event.key === "ArrowRight")) {
      event.preventDefault();
      actions[event.key][1]();
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey || localStorage.getItem(SINGLE) === "off") return;
    if (event.target.closest("input:not([type=checkbox], [type=radio]), textarea, select")) return;
    const action = event.key.startsWith("Arrow") ? undefined : actions[event.key];
    if (action) {
      event.preventDefault();
      action[1]();
    }
  });
}

export function showKeys(actions) {
  const dialog = $("keys");
  const rows = [["Enter", "send the message; Shift Enter inserts a line break"], ["Esc", "close the open panel, or stop the answer"]];
  for (const [key, [description]] of Object.entries(actions)) {
    rows.push([{ ArrowLeft: "Alt ←", ArrowRight: "Alt →", "/": "/ or Ctrl K" }[key] ?? key, description]);
  }
  rows.push(["← →", "in an inspected answer: move between tokens; Enter opens the alternatives"]);
  const single = h("input", { type: "checkbox", id: "single-keys" });
  single.checked = localStorage.getItem(SINGLE) !== "off";
  single.addEventListener("change", () => localStorage.setItem(SINGLE, single.checked ? "on" : "off"));
  dialog.replaceChildren(
    h("h2", { id: "keys-title" }, "Keyboard"),
    h("dl", { class: "keys" }, rows.flatMap(([key, description]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, description)])),
    h("div", { class: "row" }, h("label", {}, single, " Single-key shortcuts"),
      h("button", { type: "button", class: "button first", onclick: () => dialog.close() }, "Close")));
  dialog.showModal();
}
