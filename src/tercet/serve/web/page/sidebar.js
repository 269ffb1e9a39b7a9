// The list of conversations: search, rename, delete, undo.
import { get, patch, post, remove } from "./api.js";
import { $, announce, debounced, h, iconButton, notice, toast } from "./dom.js";

const DAY = 86400;

/** Return the heading of the day: "Today", "Yesterday", "This week", or month and year. */
function day(seconds) {
  const midnight = new Date();
  midnight.setHours(0, 0, 0, 0);
  const days = Math.ceil((midnight.getTime() / 1000 - seconds) / DAY);
  if (days <= 0) return "Today";
  if (days === 1) return "Yesterday";
  if (days <= 7) return "This week";
  return new Date(seconds * 1000).toLocaleDateString(undefined, { month: "long", year: "numeric" });
}

export class Sidebar {
  /** ``open(id)`` shows a conversation; null means a new one. */
  constructor(open) {
    this.open = open;
    this.current = null;
    this.rows = [];
    $("search").addEventListener("input", debounced(() => this.load(), 150));
    $("search").addEventListener("keydown", (event) => {
      if (event.key === "Escape") { $("search").value = ""; this.load(); $("message").focus(); }
      if (event.key === "ArrowDown") { event.preventDefault(); this.links()[0]?.focus(); }
    });
    $("conversations").addEventListener("keydown", (event) => this.key(event));
    $("open-sidebar").addEventListener("click", () => this.drawer(true));
    $("close-sidebar").addEventListener("click", () => this.drawer(false));
    $("main").addEventListener("pointerdown", (event) => {
      if ($("sidebar").classList.contains("open") && !event.target.closest("#open-sidebar")) this.drawer(false);
    });
  }

  links() {
    return [...$("conversations").querySelectorAll("a")];
  }

  drawer(open) {
    if ($("sidebar").classList.contains("open") === open) return;
    $("sidebar").classList.toggle("open", open);
    $("open-sidebar").setAttribute("aria-expanded", String(open));
    (open ? $("search") : $("open-sidebar")).focus();
  }

  async load() {
    try {
      const words = $("search").value.trim();
      const { conversations } = await get(`/conversations?search=${encodeURIComponent(words)}`);
      if (words !== $("search").value.trim()) return;
      this.rows = conversations;
      this.show();
      if (words) announce(`${conversations.length} found`);
    } catch (problem) {
      notice(problem.message);
    }
  }

  select(id) {
    this.current = id;
    for (const entry of $("conversations").querySelectorAll(".entry")) {
      entry.setAttribute("aria-current", String(entry.dataset.id === id));
    }
  }

  show() {
    if ($("conversations").querySelector("input")) return; // a title is being typed
    const focused = document.activeElement?.closest?.("#conversations .entry")?.dataset.id;
    const words = $("search").value.trim();
    const groups = new Map();
    for (const row of this.rows) {
      const name = words ? "Search results" : day(row.updated);
      groups.set(name, [...(groups.get(name) ?? []), row]);
    }
    const content = [...groups].flatMap(([name, rows]) => [h("h2", {}, name), h("ul", {}, rows.map((row) => this.entry(row)))]);
    if (!this.rows.length) content.push(h("p", { class: "nothing" }, words ? "No matches." : "No conversations yet."));
    $("conversations").replaceChildren(...content);
    if (focused) $("conversations").querySelector(`[data-id="${CSS.escape(focused)}"] a`)?.focus();
  }

  entry(row) {
    const title = row.title || "Untitled";
    const link = h("a", { href: `#${row.id}`, title }, title, row.passage ? h("small", {}, row.passage) : null);
    link.addEventListener("click", (event) => {
      if (event.metaKey || event.ctrlKey || event.shiftKey) return;
      event.preventDefault();
      this.drawer(false);
      this.open(row.id);
    });
    const element = h("li", { class: "entry", "data-id": row.id, "aria-current": String(row.id === this.current) }, link,
      h("span", { class: "actions" },
        iconButton("edit", `Rename ${title}`, () => this.rename(row, element), { "data-do": "rename" }),
        iconButton("delete", `Delete ${title}`, () => this.remove(row), { "data-do": "delete" })));
    return element;
  }

  rename(row, element) {
    const input = h("input", { type: "text", "aria-label": "Title", maxlength: 200 });
    input.value = row.title;
    let over = false;
    const end = async (save) => {
      if (over) return;
      over = true;
      input.remove();
      if (save && input.value.trim() && input.value !== row.title) {
        try {
          await patch(`/conversations/${row.id}`, { title: input.value });
        } catch (problem) {
          notice(problem.message);
        }
      }
      await this.load();
      $("conversations").querySelector(`[data-id="${row.id}"] a`)?.focus();
    };
    input.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Enter") end(true);
      if (event.key === "Escape") end(false);
    });
    input.addEventListener("blur", () => end(true));
    element.replaceChildren(input);
    input.select();
    input.focus();
  }

  async remove(row) {
    try {
      await remove(`/conversations/${row.id}`);
    } catch (problem) {
      notice(problem.message);
      return;
    }
    if (row.id === this.current) this.open(null); // before its event stream reports the deletion
    await this.load();
    toast("Conversation deleted", {
      name: "Undo",
      run: async () => {
        try {
          await post(`/conversations/${row.id}/restore`);
          await this.load();
          this.open(row.id);
        } catch (problem) {
          notice(problem.message);
        }
      },
    }, 10);
  }

  key(event) {
    const links = this.links();
    const at = links.indexOf(document.activeElement);
    if (at < 0) return;
    const row = this.rows.find(({ id }) => id === links[at].closest(".entry").dataset.id);
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (event.key === "ArrowUp" && at === 0) $("search").focus();
      else links[at + (event.key === "ArrowDown" ? 1 : -1)]?.focus();
    } else if (event.key === "F2") {
      this.rename(row, links[at].closest(".entry"));
    } else if (event.key === "Delete") {
      this.remove(row);
    }
  }
}
