// What the server is asked for: one turn of a conversation, with drafts or without.
import { PLAIN } from "./answer.js";
import { OFF } from "./settings.js";

// Path and body of the request for `turn`, which follows the turns in `before`. card: what the server says of its
// model. A model without a chat template goes on with the text: questions and answers so far, one after the other.
export const requestFor = (kind, turn, before, card, settings) => {
  const body = {
    ...(card && { model: card.id }),
    ...settings.sampling(),
    stream: true,
    stream_options: { include_usage: true },
    speculation: { ...(kind === PLAIN ? { drafter: OFF } : settings.drafting()), origins: true },
  };
  if (card?.chat === false) {
    const text = before.map(({ question, answers }) => question + answers[0].text).join("");
    return ["v1/completions", { ...body, prompt: text + turn.question }];
  }
  const messages = settings.system ? [{ role: "system", content: settings.system }] : [];
  for (const { question, answers } of before)
    messages.push({ role: "user", content: question }, { role: "assistant", content: answers[0].text });
  return ["v1/chat/completions", { ...body, messages: [...messages, { role: "user", content: turn.question }] }];
};
