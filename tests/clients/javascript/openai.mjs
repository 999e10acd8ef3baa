// openai: an answer, the same streamed, and one about an image. Arguments: base URL, model, data URL.
import OpenAI from "openai";

const [baseURL, model, url] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none" });
const greedy = { model, temperature: 0, max_tokens: 40 };
const messages = [{ role: "user", content: "Who are you?" }];
const image = [
  { type: "image_url", image_url: { url } },
  { type: "text", text: "What is in this picture?" },
];

const answer = await client.chat.completions.create({ ...greedy, messages });
let streamed = "";
for await (const piece of await client.chat.completions.create({ ...greedy, messages, stream: true })) {
  streamed += piece.choices[0]?.delta?.content ?? "";
}
const seen = await client.chat.completions.create({ ...greedy, messages: [{ role: "user", content: image }] });
const text = answer.choices[0].message.content;
console.log(JSON.stringify({ text, streamed, seen: seen.choices[0].message.content }));
