// Ollama's JavaScript client: answers whole and streamed, an aborted stream, formats, tools, vectors, the catalog.
import { readFileSync } from "node:fs";
import { Ollama } from "ollama";

const [host, model] = process.argv.slice(2);
const client = new Ollama({ host });
const messages = [{ role: "user", content: "What is the capital of Norway?" }];
const options = { temperature: 0, num_predict: 24 };
const check = (truth, what) => { if (!truth) throw new Error(JSON.stringify(what)); };

const whole = await client.chat({ model, messages, options });
let streamed = "", last;
for await (last of await client.chat({ model, messages, options, stream: true })) streamed += last.message.content;
check(whole.message.content && streamed === whole.message.content && last.done && last.eval_count, [whole, streamed]);

let parts = 0;
const endless = await client.generate({ model, prompt: "Count to a thousand.", stream: true, options: { num_predict: -1 } });
try {
  for await (const part of endless) if (++parts === 3) endless.abort();
} catch (problem) {
  check(problem.name === "AbortError", String(problem));
}
check(parts >= 3 && parts < 200, parts);

const format = { type: "object", properties: { capital: { enum: ["Oslo", "Rome"] } }, required: ["capital"] };
const answer = await client.chat({ model, messages, options, format });
check(["Oslo", "Rome"].includes(JSON.parse(answer.message.content).capital), answer);

const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const tools = [{ type: "function", function: { name: "weather", description: "The weather.", parameters } }];
check((await client.chat({ model, messages, options, tools })).done, "tools");

const { embeddings } = await client.embed({ model, input: ["one", "two"] });
check(embeddings.length === 2, embeddings);
const { models } = await client.list();
check(models[0].name === `${model}:latest` && (await client.ps()).models[0].name === models[0].name, models);
check((await client.show({ model })).details.family, "show");
check((await client.version()).version, "version");
const problem = await client.chat({ model: "nothing", messages }).catch((error) => error);
check(problem.status_code === 404 && /not found/.test(problem.message), String(problem));

const { version } = JSON.parse(readFileSync(new URL("node_modules/ollama/package.json", import.meta.url)));
const checked = ["chat", "streamed", "aborted", "format", "tools", "embed", "list", "ps", "show", "version", "errors"];
console.log(JSON.stringify({ client: "ollama-js", version, checked }));
