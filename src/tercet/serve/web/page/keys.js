// Keyboard shortcuts and the list of them.
import { $, h } from "./dom.js";
import { cardKey, closeCard } from "./inspect.js";

const SINGLE = "single-keys";

/** ``does``: key -> [what it does, function]. Single keys count outside of text fields, and can be turned off. */
export function listenToKeys(does, escape) {
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.isComposing || document.querySelector("dialog[open]")) return;
    if (cardKey(event)) return;
    if (event.key === "Escape") {
      if (!closeCard(true)) escape();
      return;
    }
    if (event.key.toLowerCase() === "k" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      does["/"][1]();
      return;
    }
    if (event.altKey && (event.key === "ArrowLeft" || event.key === "ArrowRight")) {
      event.preventDefault();
      does[event.key][1]();
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey || localStorage.getItem(SINGLE) === "off") return;
    if (event.target.closest("input:not([type=checkbox], [type=radio]), textarea, select")) return;
    const action = event.key.startsWith("Arrow") ? undefined : does[event.key];
    if (action) {
      event.preventDefault();
      action[1]();
    }
  });
}

export function showKeys(does) {
  const dialog = $("keys");
  const rows = [["Enter", "send; Shift Enter begins a new line"], ["Esc", "stop the answer, close what is open"]];
  for (const [key, [what]] of Object.entries(does)) {
    rows.push([{ ArrowLeft: "Alt ←", ArrowRight: "Alt →", "/": "/ or Ctrl K" }[key] ?? key, what]);
  }
  rows.push(["← →", "inside an inspected answer: walk through its tokens, Enter opens the alternatives"]);
  const single = h("input", { type: "checkbox", id: "single-keys" });
  single.checked = localStorage.getItem(SINGLE) !== "off";
  single.addEventListener("change", () => localStorage.setItem(SINGLE, single.checked ? "on" : "off"));
  dialog.replaceChildren(
    h("h2", { id: "keys-title" }, "Keyboard"),
    h("dl", { class: "keys" }, rows.flatMap(([key, what]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, what)])),
    h("div", { class: "row" }, h("label", {}, single, " Shortcuts of a single key"),
      h("button", { type: "button", class: "button first", onclick: () => dialog.close() }, "Close")));
  dialog.showModal();
}
