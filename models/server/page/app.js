// The chat page: what is asked, what is running, and who is told of it.
import { chunks, model, ServerError } from "./api.js";
import { Answer, PLAIN, SPECULATIVE } from "./answer.js";
import { requestFor } from "./request.js";
import { OFF, Settings } from "./settings.js";
import { load, save } from "./store.js";
import { oneLine } from "./text.js";
import { TurnView } from "./view.js";

const REDRAW_MS = 100; // as seldom as the terminal: the page may share its machine with the server
const RETRY_MS = 1000; // while a server loads
const find = (id) => document.getElementById(id);
const [conversation, message, error] = ["conversation", "message", "error"].map(find);
const boxes = [conversation, conversation.parentElement]; // the one that scrolls: on wide screens, on narrow ones
const settings = new Settings(find("settings"));

let turns = []; // {question, greedy, answers, expected, view}
let running = null; // the AbortController of the request under way
let card = null; // what the server says of its model

// ------------------------------------------------------------------------------------------------------------ writing
// Ask a question and have it answered; `replaced` is the last turn, if it is asked again. Whatever fails, nothing that
// was written is lost: a turn without a token is taken back, and what it replaced or its question returns.
const ask = async (question, replaced = null) => {
  if (replaced) remove(replaced);
  const expected = find("compare").checked ? 2 : 1;
  const turn = append({ question, greedy: settings.greedy, answers: [], expected });
  const name = settings.drafter === OFF ? "drafter off" : `speculative, drafter ${settings.drafter}`;
  const labels = [[SPECULATIVE, name], [PLAIN, PLAIN]].slice(0, expected);
  const requests = labels.map(([kind]) => requestFor(kind, turn, turns.slice(0, -1), card, settings));
  begin();
  for (const [i, request] of requests.entries()) {
    turn.answers.push(new Answer(...labels[i]));
    await write(turn.answers[i], request, turn);
    if (turn.answers[i].state !== "done") break;
  }
  turn.expected = turn.answers.length;
  turn.view.draw();
  const unanswered = !turn.answers[0].tokens && turn.answers[0].state !== "done";
  if (unanswered) takeBack(turn, replaced);
  end(unanswered ? null : turn);
};

const write = async (answer, request, turn) => {
  const since = performance.now();
  let due = null; // a redraw that is waiting for its time
  const draw = () => {
    due = null;
    follow(() => turn.view.draw());
  };
  draw();
  try {
    for await (const chunk of chunks(request, { key: settings.key, signal: running.signal })) {
      answer.add(chunk, performance.now() - since);
      due ??= setTimeout(draw, REDRAW_MS);
    }
    answer.state = "done";
  } catch (problem) {
    if (problem.name === "AbortError") answer.state = "stopped";
    else {
      answer.state = "failed";
      answer.error = problem instanceof ServerError ? problem.message : `this page failed: ${oneLine(problem)}`;
      fail(answer.error, problem.status);
    }
  }
  clearTimeout(due);
  draw();
};

const takeBack = (turn, replaced) => {
  remove(turn);
  if (replaced) append(replaced);
  else message.value = [turn.question, message.value].filter(Boolean).join("\n");
};

const begin = () => {
  running = new AbortController();
  error.hidden = true;
  announce("answering");
  switchButtons();
};

const end = (turn) => {
  running = null;
  switchButtons();
  keep();
  if (!turn) return;
  const said = turn.answers.map((answer) => `${answer.label}: ${[answer.end, ...answer.figures].filter(Boolean).join(", ")}`);
  announce([turn.answers[0].text, ...said, turn.view.verdict.textContent].filter(Boolean).join(". "));
};

const stop = () => running?.abort();

// ------------------------------------------------------------------------------------------------------- conversation
const append = (turn) => {
  turn.view = new TurnView(turn, () => !running && usable() && ask(turn.question, turn));
  turns.push(turn);
  conversation.append(turn.view.element);
  for (const box of boxes) box.scrollTop = box.scrollHeight;
  arrange();
  return turn;
};

const remove = (turn) => {
  turns = turns.filter((each) => each !== turn);
  turn.view.element.remove();
  arrange();
};

const arrange = () => {
  find("empty").hidden = turns.length > 0;
  switchButtons();
};

const switchButtons = () => {
  find("send").hidden = Boolean(running);
  find("stop").hidden = !running;
  find("new").disabled = Boolean(running) || !turns.length;
  // Only the last turn can be asked again: what follows an earlier one was an answer to it.
  for (const turn of turns) turn.view.again.hidden = Boolean(running) || turn !== turns.at(-1);
};

// Change something and stay at the end of the conversation, for a reader who is there.
const follow = (change) => {
  const atEnd = boxes.map((box) => box.scrollHeight - box.scrollTop - box.clientHeight < 60);
  change();
  boxes.forEach((box, i) => atEnd[i] && (box.scrollTop = box.scrollHeight));
};

const announce = (text) => (find("announcement").textContent = text);

const fail = (text, status = 0) => {
  error.textContent = text;
  error.hidden = false;
  if (status === 401) {
    open(true);
    settings.fields.key.focus();
  }
};

// ----------------------------------------------------------------------------------------------------------- keeping
const keep = () => {
  const waiting = turns.filter(({ answers }) => !answers[0]?.tokens).map(({ question }) => question);
  const kept = {
    message: [...waiting, message.value].filter(Boolean).join("\n"),
    compare: find("compare").checked,
    settings: settings.saved(),
    turns: turns
      .filter(({ answers }) => answers[0]?.tokens)
      .map(({ question, greedy, answers }) => ({ question, greedy, answers: answers.map((answer) => answer.saved()) })),
  };
  if (!save(kept)) fail("the conversation is too long for this tab's storage: a reload would lose what is new");
};

const restore = () => {
  const kept = load();
  if (!kept) return;
  try {
    const read = kept.turns.map(({ question, greedy, answers }) => ({
      question: String(question),
      greedy: Boolean(greedy),
      answers: answers.map((answer) => Answer.from(answer)),
      expected: answers.length,
    }));
    settings.restore(kept.settings);
    message.value = String(kept.message);
    find("compare").checked = Boolean(kept.compare);
    read.forEach(append);
  } catch {
    turns.forEach(remove); // kept by another version of this page
  }
};

// ------------------------------------------------------------------------------------------------------------ server
const greet = async () => {
  const said = find("server");
  try {
    card = await model(settings.key);
    const chats = card.chat !== false;
    said.textContent = chats ? card.id : `${card.id}: without a chat template, it goes on with your text`;
    settings.fields.system.disabled = !chats;
    settings.offer(card.speculation);
  } catch (problem) {
    said.textContent = oneLine(problem.message);
    if (problem.status === 401) fail(problem.message, 401);
    else setTimeout(greet, RETRY_MS);
  }
};

// ------------------------------------------------------------------------------------------------------------- events
const open = (wanted) => {
  find("settings").hidden = !wanted;
  find("toggle").setAttribute("aria-expanded", wanted);
};

// Whether all settings can be used; if not, the first that cannot is shown.
const usable = () => {
  if (!settings.valid) open(true);
  return settings.check();
};

const send = () => {
  const question = message.value;
  if (running || !question.trim() || !usable()) return;
  message.value = "";
  message.focus();
  ask(question);
};

find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
message.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (running) stop();
  else if (find("settings").contains(document.activeElement)) {
    open(false);
    find("toggle").focus();
  }
});
find("stop").addEventListener("click", () => {
  stop();
  message.focus();
});
find("new").addEventListener("click", () => {
  [...turns].forEach(remove);
  error.hidden = true;
  keep();
  message.focus();
});
find("toggle").addEventListener("click", () => {
  open(find("settings").hidden);
  if (!find("settings").hidden) settings.fields.system.focus();
});
find("settings").addEventListener("submit", (event) => event.preventDefault());
const colour = () => document.body.classList.toggle("coloured", settings.fields.colours.checked);
settings.fields.colours.addEventListener("change", colour);
settings.fields.key.addEventListener("change", greet);
addEventListener("beforeunload", stop); // before the browser breaks the connection, which would look like a failure
addEventListener("pagehide", keep);

restore();
colour();
arrange();
greet();
