// Vercel's AI SDK over chat completions, responses and messages: whole, streamed, and with a tool.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, stepCountIs, streamText, tool } from "ai";
import { readFileSync } from "node:fs";
import { z } from "zod";

const [baseUrl, name] = process.argv.slice(2);
const baseURL = `${baseUrl}/v1`;
const models = {
  "openai-compatible": createOpenAICompatible({ name: "tercet", baseURL }).chatModel(name),
  "openai chat": createOpenAI({ baseURL, apiKey: "none" }).chat(name),
  "openai responses": createOpenAI({ baseURL, apiKey: "none" }).responses(name),
  anthropic: createAnthropic({ baseURL, apiKey: "none" }).languageModel(name),
};
const read_note = tool({
  description: "Read a file.",
  inputSchema: z.object({ path: z.string() }),
  execute: async () => "The colour is teal.",
});
const checked = [];
for (const [label, model] of Object.entries(models)) {
  const settings = { model, prompt: "Say hello.", temperature: 0, maxOutputTokens: 40, maxRetries: 0 };
  const { text } = await generateText(settings);
  let streamed = "";
  for await (const piece of streamText(settings).textStream) streamed += piece;
  if (!text || text !== streamed) throw new Error(`${label}: ${text} / ${streamed}`);
  const answer = await generateText({
    model, prompt: "Which colour is in /tmp/note.txt?", tools: { read_note }, stopWhen: stepCountIs(3), maxOutputTokens: 200, maxRetries: 0,
  });
  if (answer.text !== "The note says teal.") throw new Error(`${label}: ${JSON.stringify(answer.steps.map((step) => step.content))}`);
  checked.push(label);
}
const version = JSON.parse(readFileSync(new URL("node_modules/ai/package.json", import.meta.url))).version;
console.log(JSON.stringify({ client: "ai", version, checked }));
