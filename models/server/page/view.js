// A turn of the conversation on the page: the question, one answer or two side by side, and how they compare.
import { compare, divergence, PLAIN, SPECULATIVE } from "./answer.js";
import { make, ORIGINS, show } from "./text.js";

const NEAR_TIE =
  "In bf16 a row is rounded otherwise when other rows are computed with it, so that a near-tie can fall the other way: " +
  "a server with --row-invariant rules that out.";

// One answer; `draw` adds what has come since it was last called.
class AnswerView {
  constructor(answer) {
    this.answer = answer;
    this.drawn = 0;
    this.element = make("section", `answer ${answer.kind}`);
    this.element.setAttribute("aria-label", `answer, ${answer.label}`);
    this.body = make("div", "text");
    this.body.dir = "auto";
    this.end = make("p", "end");
    this.figures = make("ul", "figures");
    this.element.append(make("h3", "", answer.label), this.body, this.end, this.figures);
    this.draw();
  }

  draw() {
    const { answer, body } = this, fresh = document.createDocumentFragment();
    for (const [text, origin] of answer.pieces.slice(this.drawn)) {
      const token = show(make("span", `token ${origin}`.trim()), text);
      if (ORIGINS[origin]) token.title = ORIGINS[origin];
      fresh.append(token);
    }
    this.drawn = answer.pieces.length;
    body.append(fresh);
    body.classList.toggle("writing", answer.running);
    body.setAttribute("aria-busy", answer.running);
    this.end.textContent = [answer.end, ...answer.notes].filter(Boolean).join(" · ");
    this.end.hidden = !this.end.textContent;
    this.figures.replaceChildren(...answer.figures.map((figure) => make("li", "", figure)));
  }

  mark(index) {
    this.body.getElementsByClassName("token")[index]?.classList.add("differs");
  }
}

// turn: {question, greedy, answers, expected}; expected: how many answers there will be. again: what its button does.
export class TurnView {
  constructor(turn, again) {
    this.turn = turn;
    this.views = [];
    this.element = make("article", "turn");
    this.answers = make("div", "answers");
    this.verdict = make("p", "verdict");
    this.again = make("button", "again", "Again");
    this.again.type = "button";
    this.again.title = "the same question, with the settings of now";
    this.again.addEventListener("click", again);
    const under = make("div", "under");
    this.why = make("p", "soft");
    under.append(this.verdict, this.again, this.why);
    const question = show(make("p", "question"), turn.question);
    question.dir = "auto";
    this.element.append(make("h2", "unseen", "You"), question, make("h2", "unseen", "Answer"), this.answers, under);
    this.draw();
  }

  draw() {
    const { answers, expected } = this.turn;
    this.answers.classList.toggle("two", expected > 1);
    for (const answer of answers.slice(this.views.length)) {
      this.views.push(new AnswerView(answer));
      this.answers.append(this.views.at(-1).element);
    }
    this.views.forEach((view) => view.draw());
    this.drawVerdict();
  }

  drawVerdict() {
    const [speculative, plain] = [SPECULATIVE, PLAIN].map((kind) => this.turn.answers.find((a) => a.kind === kind));
    const parts = [];
    if (speculative && plain) {
      const { done, speedup, same } = compare(speculative, plain, this.turn.greedy);
      const soFar = done ? "" : " so far";
      if (speedup !== null) parts.push(`speed-up ${speedup.toFixed(2)}x${soFar}`);
      if (same !== null) parts.push((same ? "same text" : "other text") + soFar);
      this.why.textContent = same === false ? NEAR_TIE : "";
      if (!this.turn.greedy) parts.push("sampled: texts are not compared");
      this.verdict.classList.toggle("good", speedup >= 1);
      if (done && same === false) this.views[this.turn.answers.indexOf(plain)].mark(divergence(plain, speculative));
    }
    this.verdict.textContent = parts.join(", ");
  }
}
