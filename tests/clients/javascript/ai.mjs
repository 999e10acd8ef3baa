// Vercel's ai: an answer, the same streamed, and one about an image. Arguments: base URL, model, data URL.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const [baseURL, name, url] = process.argv.slice(2);
const model = createOpenAICompatible({ name: "ghostvis", baseURL, apiKey: "none" })(name);
const greedy = { model, temperature: 0, maxOutputTokens: 40 };
const image = [
  { type: "image", image: url },
  { type: "text", text: "What is in this picture?" },
];

const { text } = await generateText({ ...greedy, prompt: "Who are you?" });
let streamed = "";
for await (const piece of streamText({ ...greedy, prompt: "Who are you?" }).textStream) {
  streamed += piece;
}
const seen = await generateText({ ...greedy, messages: [{ role: "user", content: image }] });
console.log(JSON.stringify({ text, streamed, seen: seen.text }));
