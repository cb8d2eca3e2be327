// One answer while it is written and after: its tokens, its counts, its times, and what they are in words.
import { oneLine, plural } from "./text.js";

export const SPECULATIVE = "speculative", PLAIN = "plain";

// How an answer ended, where that has to be said.
const ENDS = { length: "ended at max tokens", context: "no position is left in the context" };

// What has to be said of a drafter, by its state at the end.
const notesOn = ({ state, failure }) => {
  if (state === "failed") return [oneLine(`the drafter failed, so that the rest is plain: ${failure}`)];
  return state === "switched-off" ? ["drafting was switched off, as it did not pay"] : [];
};

// Tokens that end a round: the target's own.
const OWN = new Set(["corrected", "bonus", "plain"]);

export class Answer {
  // kind: SPECULATIVE or PLAIN. state: "waiting", "writing", "done", "stopped" or "failed".
  constructor(kind, label) {
    this.kind = kind;
    this.label = label;
    this.state = "waiting";
    this.error = "";
    this.finish = "";
    this.notes = []; // what the server said about its drafting
    this.pieces = []; // [text, origin], one for each token
    this.arrivals = []; // [tokens so far, ms], one for each chunk; ms since the answer was asked for
    this.timings = {}; // the server's own counts and times, as of its last chunk that had some
    this.rate = 0; // acceptance, by the server at the end: over the rounds that no limit cut, of trees by level
  }

  // An answer as `saved` kept it; one that was being written ends there. Raises TypeError for anything else.
  static from(kept) {
    const answer = Object.assign(new Answer(String(kept.kind), String(kept.label)), kept, { arrivals: [] });
    answer.pieces = kept.pieces.map(([text, origin]) => [String(text), String(origin)]);
    answer.notes = kept.notes.map(String);
    if (answer.running) answer.state = "stopped";
    return answer;
  }

  saved() {
    const { kind, label, state, error, finish, notes, pieces, timings, rate } = this;
    return { kind, label, state, error, finish, notes, pieces, timings, rate };
  }

  get running() {
    return this.state === "waiting" || this.state === "writing";
  }

  get text() {
    return this.pieces.map(([text]) => text).join("");
  }

  // Take a chunk that came `ms` after the answer was asked for.
  add(chunk, ms) {
    if (chunk.timings) this.timings = chunk.timings;
    if (chunk.speculation) {
      this.notes = notesOn(chunk.speculation);
      this.rate = chunk.speculation.acceptance_rate;
    }
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const content = choice.delta?.content ?? choice.text ?? "", origins = choice.origins ?? [];
    const known = origins.map(({ text, origin }) => [text, origin]);
    // The text is what the content says; where the origins do not add up to it, their colours are left out.
    const agree = known.map(([text]) => text).join("") === content;
    const added = agree ? known : [[content, ""], ...known.slice(1).map(([, origin]) => ["", origin])];
    if (added.length) {
      this.pieces.push(...added);
      this.arrivals.push([this.pieces.length, ms]);
      this.state = "writing";
    }
    if (choice.finish_reason) this.finish = choice.finish_reason;
  }

  // ------------------------------------------------------------------------------------------------------ numbers
  get tokens() {
    return this.pieces.length;
  }

  get rounds() {
    return this.timings.rounds ?? this.pieces.filter(([, origin]) => OWN.has(origin)).length;
  }

  get plainRounds() {
    return this.pieces.filter(([, origin]) => origin === "plain").length;
  }

  // Accepted / drafted tokens, null where nothing was drafted.
  get acceptance() {
    const { draft_n: drafted, draft_n_accepted: accepted } = this.timings;
    return drafted ? this.rate || accepted / drafted : null;
  }

  // Tokens after the first a second: the server's own once the answer is complete, before that as they arrive.
  get pace() {
    if (this.state === "done" && this.timings.predicted_per_second) return this.timings.predicted_per_second;
    const first = this.arrivals[0], last = this.arrivals.at(-1);
    if (!first || last[1] <= first[1]) return null;
    return (1000 * (last[0] - first[0])) / (last[1] - first[1]);
  }

  // Milliseconds from the first arrival until `count` tokens were there; null where they never were.
  msFor(count) {
    const first = this.arrivals[0], reached = this.arrivals.find(([tokens]) => tokens >= count);
    return reached ? reached[1] - first[1] : null;
  }

  // -------------------------------------------------------------------------------------------------------- words
  // What is worth saying, the most important first.
  get figures() {
    if (!this.tokens) return [this.state === "waiting" ? "reading the prompt ..." : ""].filter(Boolean);
    const parts = [this.pace === null ? "" : `${this.pace.toFixed(1)} tok/s`];
    if (this.acceptance !== null) parts.push(`${Math.round(100 * this.acceptance)}% accepted`);
    const rounds = plural(this.rounds, "round"), each = (this.tokens - 1) / this.rounds;
    parts.push(this.kind === SPECULATIVE && this.rounds ? `${rounds} of ${each.toFixed(1)} tokens` : rounds);
    parts.push(plural(this.tokens, "token"));
    if (this.kind === SPECULATIVE && this.plainRounds) parts.push(plural(this.plainRounds, "plain round"));
    return parts.filter(Boolean);
  }

  // How it ended, where that is not as it should; "" elsewhere.
  get end() {
    if (this.state === "failed") return oneLine(this.error);
    if (this.state === "stopped") return "stopped";
    return ENDS[this.finish] ?? "";
  }
}

// How two answers to the same request compare, as far as they are: speed-up (null: not known yet), and whether their
// texts are the same (null: not compared, as sampled texts differ anyway).
export const compare = (speculative, plain, greedy) => {
  const done = speculative.state === "done" && plain.state === "done";
  let speedup = null;
  if (done && speculative.pace && plain.pace) speedup = speculative.pace / plain.pace;
  else if (!done && plain.arrivals.length) {
    // While it runs: the time each took for as many tokens as both have.
    const count = Math.min(speculative.tokens, plain.tokens);
    const [quick, slow] = [speculative.msFor(count), plain.msFor(count)];
    if (quick && slow) speedup = slow / quick;
  }
  const [a, b] = [speculative.text, plain.text];
  const same = !greedy || !plain.tokens ? null : done ? a === b : a.startsWith(b) || b.startsWith(a);
  return { done, speedup, same };
};

// Index of the first token at which a text leaves another one; -1 where it does not.
export const divergence = (answer, other) => {
  const text = other.text;
  let at = 0;
  for (const [i, [piece]] of answer.pieces.entries()) {
    if (!text.startsWith(piece, at)) return i;
    at += piece.length;
  }
  return -1;
};
