// The panel of settings: system prompt and sampling. An empty field means the model's default.
import { $, debounced, h } from "./dom.js";

const NUMBERS = [
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.1, placeholder: "0.7" }, "0 always takes the likeliest token; higher is more adventurous."],
  ["max_tokens", "Most tokens", { min: 1, step: 1, placeholder: "" }, "An answer ends here at the latest."],
  ["top_p", "Top p", { min: 0.01, max: 1, step: 0.01, placeholder: "1" }, "Draw from the likeliest tokens that make up this share."],
  ["top_k", "Top k", { min: 0, step: 1, placeholder: "off" }, "Draw from so many of the likeliest tokens."],
  ["min_p", "Min p", { min: 0, max: 1, step: 0.01, placeholder: "off" }, "Drop tokens less likely than this share of the best."],
  ["repetition_penalty", "Repetition penalty", { min: 0.1, step: 0.05, placeholder: "1" }, "Above 1: what was said becomes less likely."],
  ["presence_penalty", "Presence penalty", { min: -2, max: 2, step: 0.1, placeholder: "0" }, "Above 0: rather new words."],
  ["frequency_penalty", "Frequency penalty", { min: -2, max: 2, step: 0.1, placeholder: "0" }, "Above 0: the more often said, the less likely."],
  ["seed", "Seed", { min: 0, step: 1, placeholder: "random" }, "The same seed gives the same answer."],
];

export class Settings {
  /** ``changed(settings)`` is called a moment after something was changed. */
  constructor(changed) {
    this.inputs = new Map();
    this.rest = {};
    const tell = debounced(() => changed(this.value()), 300);
    this.flush = tell.now; // what was just typed belongs to the conversation that is open
    const form = $("settings-form");
    const system = h("textarea", { id: "set-system", rows: 4, placeholder: "Who should the model be?" });
    this.inputs.set("system", system);
    form.append(h("label", { class: "field", id: "field-system" }, h("span", { class: "name" }, "System prompt"), system,
      h("small", {}, "Goes before the conversation, for the answers to come.")));
    for (const [name, label, limits, help] of NUMBERS) {
      const input = h("input", { type: "number", id: `set-${name}`, inputmode: "decimal", ...limits });
      this.inputs.set(name, input);
      form.append(h("label", { class: "field" }, h("span", { class: "name" }, label, input), h("small", {}, help)));
    }
    const stop = h("textarea", { id: "set-stop", rows: 2 });
    this.inputs.set("stop", stop);
    form.append(h("label", { class: "field" }, h("span", { class: "name" }, "Stop at"), stop, h("small", {}, "One text a line; the answer ends before it.")));
    const blind = h("input", { type: "checkbox", id: "set-blind" });
    this.inputs.set("blind", blind);
    form.append(h("label", { class: "field check", id: "field-blind" }, blind, h("span", { class: "name" }, "Compare blindly"),
      h("small", {}, "Names are hidden, and sides drawn, until you have voted.")));
    form.addEventListener("input", tell);
    form.addEventListener("submit", (event) => event.preventDefault());
    $("close-settings").addEventListener("click", () => this.toggle(false));
    $("settings-toggle").addEventListener("click", () => this.toggle());
  }

  toggle(open = $("settings").hidden) {
    $("settings").hidden = !open;
    $("settings-toggle").setAttribute("aria-expanded", String(open));
    (open ? this.inputs.get("system") : $("settings-toggle")).focus();
  }

  /** Show settings; what has the focus is left as it is being typed. */
  show(settings, kind, defaults) {
    this.rest = { model: settings.model, against: settings.against };
    for (const [name, input] of this.inputs) {
      if (input === document.activeElement) continue;
      const value = settings[name];
      if (name === "blind") input.checked = Boolean(value);
      else if (name === "stop") input.value = (value ?? []).join("\n");
      else input.value = value ?? "";
    }
    this.inputs.get("max_tokens").placeholder = String(defaults[kind] ?? "");
    $("field-system").hidden = kind === "text";
    $("field-blind").hidden = !settings.against;
  }

  value() {
    const found = { ...this.rest };
    for (const [name, input] of this.inputs) {
      if (name === "blind") found.blind = input.checked;
      else if (name === "stop") found.stop = input.value.split("\n").filter(Boolean);
      else if (name === "system") found.system = input.value;
      else if (input.value !== "" && Number.isFinite(input.valueAsNumber)) found[name] = input.valueAsNumber;
    }
    return Object.fromEntries(Object.entries(found).filter(([, value]) => value !== undefined && value !== "" && value !== false));
  }
}
