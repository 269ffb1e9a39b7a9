// The settings panel: system prompt and sampling. An empty field means the model's default.
import { $, debounced, h } from "./dom.js";

const NUMBERS = [
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.1 }, "0 always selects the most probable token; higher values vary more."],
  ["max_tokens", "Token limit", { min: 1, step: 1, placeholder: "" }, "Largest number of tokens in an answer."],
  ["top_p", "Top p", { min: 0.01, max: 1, step: 0.01 }, "Sample from the most probable tokens whose probabilities add up to this value."],
  ["top_k", "Top k", { min: 0, step: 1 }, "Sample from this number of the most probable tokens."],
  ["min_p", "Min p", { min: 0, max: 1, step: 0.01 }, "Exclude tokens below this fraction of the highest probability."],
  ["repetition_penalty", "Repetition penalty", { min: 0.1, step: 0.05 }, "Values above 1 make tokens that occurred before less probable."],
  ["presence_penalty", "Presence penalty", { min: -2, max: 2, step: 0.1, placeholder: "0" }, "Values above 0 favour tokens that have not occurred yet."],
  ["frequency_penalty", "Frequency penalty", { min: -2, max: 2, step: 0.1, placeholder: "0" }, "Values above 0 make tokens less probable the more often they occurred."],
  ["seed", "Seed", { min: 0, step: 1, placeholder: "random" }, "The same seed gives the same answer."],
];

// The model's values for these stand in their empty fields.
const SAMPLED = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty"];

export class Settings {
  /** ``changed(settings)`` is called 300 ms after the last change. */
  constructor(changed) {
    this.inputs = new Map();
    this.rest = {};
    const report = debounced(() => changed(this.value()), 300);
    this.flush = report.now; // pending changes belong to the conversation that is open now
    const form = $("settings-form");
    const system = h("textarea", { id: "set-system", rows: 4, placeholder: "Instructions for the model" });
    this.inputs.set("system", system);
    form.append(h("label", { class: "field", id: "field-system" }, h("span", { class: "name" }, "System prompt"), system,
      h("small", {}, "Precedes the conversation; applies to future answers.")));
    for (const [name, label, limits, help] of NUMBERS) {
      const input = h("input", { type: "number", id: `set-${name}`, inputmode: "decimal", ...limits });
      this.inputs.set(name, input);
      form.append(h("label", { class: "field" }, h("span", { class: "name" }, label, input), h("small", {}, help)));
    }
    const stop = h("textarea", { id: "set-stop", rows: 2 });
    this.inputs.set("stop", stop);
    form.append(h("label", { class: "field" }, h("span", { class: "name" }, "Stop texts"), stop, h("small", {}, "One text per line; the answer ends before the first of them.")));
    const blind = h("input", { type: "checkbox", id: "set-blind" });
    this.inputs.set("blind", blind);
    form.append(h("label", { class: "field check", id: "field-blind" }, blind, h("span", { class: "name" }, "Blind comparison"),
      h("small", {}, "Hides the models' names and shuffles the sides until you vote.")));
    form.addEventListener("input", report);
    form.addEventListener("submit", (event) => event.preventDefault());
    $("close-settings").addEventListener("click", () => this.toggle(false));
    $("settings-toggle").addEventListener("click", () => this.toggle());
  }

  toggle(open = $("settings").hidden) {
    $("settings").hidden = !open;
    $("settings-toggle").setAttribute("aria-expanded", String(open));
    (open ? this.inputs.get("system") : $("settings-toggle")).focus();
  }

  /** Show the settings. The focused field keeps what the user is typing. */
  show(settings, kind, defaults, sampling) {
    this.rest = { model: settings.model, against: settings.against };
    for (const [name, input] of this.inputs) {
      if (input === document.activeElement) continue;
      const value = settings[name];
      if (name === "blind") input.checked = Boolean(value);
      else if (name === "stop") input.value = (value ?? []).join("\n");
      else input.value = value ?? "";
    }
    this.inputs.get("max_tokens").placeholder = String(defaults[kind] ?? "");
    for (const name of SAMPLED) {
      const value = sampling?.[name]; // a server that is passed on to has defaults of its own
      this.inputs.get(name).placeholder = value === undefined ? "" : value === 0 && name !== "temperature" ? "off" : String(value);
    }
    $("field-system").hidden = kind === "text";
    $("field-blind").hidden = !settings.against;
  }

  value() {
    const settings = { ...this.rest };
    for (const [name, input] of this.inputs) {
      if (name === "blind") settings.blind = input.checked;
      else if (name === "stop") settings.stop = input.value.split("\n").filter(Boolean);
      else if (name === "system") settings.system = input.value;
      else if (input.value !== "" && Number.isFinite(input.valueAsNumber)) settings[name] = input.valueAsNumber;
    }
    return Object.fromEntries(Object.entries(settings).filter(([, value]) => value !== undefined && value !== "" && value !== false));
  }
}
