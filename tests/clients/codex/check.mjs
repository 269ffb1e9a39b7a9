// Codex runs a command that reads a file, and answers from it.
import { spawnSync } from "node:child_process";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const [baseUrl, model] = process.argv.slice(2);
const home = mkdtempSync(join(tmpdir(), "codex-"));
writeFileSync(join(home, "note.txt"), "The colour is teal.\n");
mkdirSync(join(home, ".codex"));
writeFileSync(
  join(home, ".codex/config.toml"),
  `model = "${model}"\nmodel_provider = "local"\n[model_providers.local]\nname = "local"\n` +
    `base_url = "${baseUrl}/v1"\nwire_api = "responses"\nenv_key = "LOCAL_KEY"\n`,
);
const env = { PATH: process.env.PATH, HOME: home, LOCAL_KEY: "none" };
const command = join(import.meta.dirname, "node_modules/.bin/codex");
const options = { cwd: home, env, encoding: "utf8", timeout: 120000, input: "" };
try {
  const version = spawnSync(command, ["--version"], options).stdout.trim().split(" ").at(-1);
  const question = `Which colour is in ${home}/note.txt?`;
  const run = spawnSync(command, ["exec", "--skip-git-repo-check", "--json", question], options);
  const items = run.stdout.trim().split("\n").map((line) => JSON.parse(line).item).filter(Boolean);
  const ran = items.find((item) => item.type === "command_execution" && item.status === "completed");
  const said = items.filter((item) => item.type === "agent_message").at(-1);
  if (ran?.aggregated_output !== "The colour is teal.\n" || said?.text !== "The note says teal.") throw new Error(run.stdout + run.stderr);
  console.log(JSON.stringify({ client: "codex", version, checked: ["a command is run"] }));
} finally {
  rmSync(home, { recursive: true, force: true });
}
