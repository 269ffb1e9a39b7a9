// Claude Code reads a file and answers from it, without access to any other server.
import { spawnSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const [baseUrl, model] = process.argv.slice(2);
const home = mkdtempSync(join(tmpdir(), "claude-code-"));
writeFileSync(join(home, "note.txt"), "The colour is teal.\n");
const env = {
  PATH: process.env.PATH,
  HOME: home,
  ANTHROPIC_BASE_URL: baseUrl,
  ANTHROPIC_API_KEY: "none",
  CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC: "1",
};
const command = join(import.meta.dirname, "node_modules/.bin/claude");
const question = `Which colour is in ${home}/note.txt?`;
const run = (...options) =>
  spawnSync(command, ["-p", question, "--model", model, ...options], { cwd: home, env, encoding: "utf8", timeout: 120000 });
try {
  const version = spawnSync(command, ["--version"], { env, encoding: "utf8" }).stdout.split(" ")[0];
  const whole = run("--output-format", "json");
  const result = JSON.parse(whole.stdout);
  if (result.is_error || result.num_turns !== 2 || result.result !== "The note says teal.") throw new Error(whole.stdout);
  const events = run("--output-format", "stream-json", "--verbose").stdout.trim().split("\n").map((line) => JSON.parse(line));
  const used = events.flatMap((event) => event.message?.content ?? []).filter((block) => block.type === "tool_use");
  if (used.map((block) => block.name).join() !== "Read") throw new Error(JSON.stringify(events));
  console.log(JSON.stringify({ client: "claude-code", version, checked: ["a file is read", "stream-json"] }));
} finally {
  rmSync(home, { recursive: true, force: true });
}
