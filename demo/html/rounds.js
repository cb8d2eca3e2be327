// The text token by token, and the rounds that wrote it. The data is described in html_report.py.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const special = new Set(data.special);
  const ORIGINS = {
    prefill: "first token, from the prefill",
    drafted: "drafted and accepted",
    corrected: "corrected by the target",
    bonus: "bonus: the target's, after a draft accepted in full",
    plain: "target alone, nothing drafted",
  };
  const INVISIBLE = /^[\p{Cc}\p{Cf}\u2028\u2029]$/u;
  let run, rounds, spans;

  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  const codeOf = (character) => `⟨U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;

  // Text with its invisible characters made visible; what is copied from the page is still the text itself.
  const show = (element, text, inline) => {
    for (const part of text.split(/( |[\p{Cc}\p{Cf}\u2028\u2029])/u)) {
      if (part === " ") element.append(make("span", "space", " "));
      else if (part === "\n") element.append(make("span", "sign", "↵"), inline ? "" : "\n");
      else if (part === "\t") element.append(make("span", "sign", "→"), inline ? "" : "\t");
      else if (INVISIBLE.test(part)) element.append(make("span", "sign", codeOf(part)));
      else if (part) element.append(part);
    }
    return element;
  };
  const wordOf = (id) => (data.vocab ? data.vocab[id] ?? `⟨${id}⟩` : String(id));
  const textOf = (written, i) => written.text[i] ?? wordOf(written.tokens[i]);
  const showToken = (element, text, id, inline) => {
    if (text === "") element.append(make("span", "sign", "⋯")); // bytes of an unfinished character
    else if (special.has(id)) element.append(make("span", "sign", text));
    else show(element, text, inline);
    if (!data.vocab && !inline) element.append(" ");
    return element;
  };

  // A round as an object; the first one, number 0, is the prefill.
  const unpack = (packed, start, number) => {
    const [emitted, times, own, proposed, kept, parents, source] = packed;
    return { number, start, emitted, times, own, proposed: proposed ?? [], kept: kept ?? [], parents, source };
  };
  const originOf = (round, i) => (i - round.start < round.kept.length ? "drafted" : round.own);

  const choose = (index) => {
    run = data.runs[index];
    rounds = [unpack([Math.min(1, run.tokens.length), 0, "prefill"], 0, 0)];
    let start = 1;
    for (const packed of run.rounds) {
      rounds.push(unpack(packed, start, rounds.length));
      start += packed[0];
    }
    find("note").textContent = run.note;
    const text = find("text");
    text.replaceChildren();
    if (run.left) text.append(make("span", "sign", `(${run.left} characters of the prompt left out) `));
    text.append(show(make("span", "prompt"), run.prompt), data.vocab ? "" : " ");
    spans = [];
    for (const round of rounds)
      for (let i = round.start; i < round.start + round.emitted && i < run.tokens.length; i++) {
        const origin = originOf(round, i);
        const span = showToken(make("span", "token " + origin), textOf(run, i), run.tokens[i]);
        span.title = `token ${i + 1} of ${run.tokens.length}, id ${run.tokens[i]}: ${ORIGINS[origin]}`;
        if (round.number) span.title += `, round ${round.number}`;
        span.dataset.round = round.number;
        spans.push(span);
        text.append(span);
      }
    compare(run.baseline);
    const slider = find("round");
    slider.max = rounds.length - 1;
    move(rounds.length - 1);
  };

  // The baseline's text, where it is another one.
  const compare = (other) => {
    find("other").hidden = !other;
    const text = find("other-text");
    text.replaceChildren();
    if (!other) return;
    text.append(show(make("span", "prompt"), run.prompt), data.vocab ? "" : " ");
    other.tokens.forEach((id, i) => {
      const span = showToken(make("span", i ? "token plain" : "token prefill"), textOf(other, i), id);
      if (i === other.differs) span.classList.add("differs");
      text.append(span);
    });
  };

  const move = (number) => {
    const round = rounds[number], end = round.start + round.emitted, slider = find("round");
    slider.value = number;
    find("previous").disabled = number === 0;
    find("next").disabled = number === rounds.length - 1;
    spans.forEach((span, i) => {
      span.classList.toggle("later", i >= end);
      span.classList.toggle("now", i >= round.start && i < end);
    });
    const text = find("text"), first = spans[round.start];
    if (first) {
      const top = first.offsetTop - text.offsetTop - text.scrollTop;
      if (top < 0 || top > text.clientHeight - 60) text.scrollTop += top - text.clientHeight / 2;
    }
    const tokens = (count) => `${count} token${count === 1 ? "" : "s"}`;
    const { proposed, kept, source } = round;
    let said = `Round ${number} of ${rounds.length - 1}: `;
    if (number === 0) said = "Prefill: the target read the prompt and wrote the first token";
    else if (!proposed.length) said += `nothing drafted, ${tokens(round.emitted)} written by the target alone`;
    else said += `${proposed.length} drafted by ${source}, ${kept.length} accepted, ${tokens(round.emitted)} written`;
    find("status").textContent = said;
    slider.setAttribute("aria-valuetext", said);
    find("times").textContent = timesOf(round);
    find("proposal").replaceChildren(...proposalOf(round));
  };

  const timesOf = ({ number, times, proposed }) => {
    if (!times) return number || !run.ttft ? "" : `time to first token ${run.ttft.toFixed(1)} ms`;
    const [draft, verify, host] = times.map((ms) => ms.toFixed(2));
    let forwards = `target ${verify} ms`;
    if (proposed.length && data.fused) forwards = `draft + verify ${(times[0] + times[1]).toFixed(2)} ms (one program)`;
    else if (proposed.length || times[0] >= 0.005) forwards = `draft ${draft} ms, verify ${verify} ms`;
    return `${forwards}, host ${host} ms`;
  };

  const step = (kind, id, verdict, text) => {
    const element = make("span", "step " + kind);
    const chip = showToken(make("span", "chip"), text ?? wordOf(id), id, true);
    chip.title = `id ${id}`;
    element.append(chip, make("span", "verdict", verdict));
    return element;
  };

  // What was proposed with what became of it, and what the target wrote itself.
  const proposalOf = (round) => {
    const { start, emitted, proposed, kept, parents } = round;
    if (!emitted && !proposed.length) return [];
    const parentOf = (i) => (parents ? parents[i] : i - 1), tip = kept.at(-1) ?? -1;
    const steps = proposed.map((id, i) => {
      const place = kept.indexOf(i);
      if (place >= emitted) return step("kept", id, "✓ accepted, not written");
      if (place >= 0) return step("kept", id, "✓ accepted", textOf(run, start + place));
      const tried = parentOf(i) < 0 || kept.includes(parentOf(i));
      return tried ? step("rejected", id, "✗ rejected") : step("unseen", id, "– after a rejected one");
    });
    const replaced = proposed.some((_, i) => !kept.includes(i) && parentOf(i) === tip);
    const verdicts = {
      corrected: `target wrote ${replaced ? "instead" : "next"} (corrected)`,
      bonus: "target added (bonus)",
      plain: "target wrote (plain)",
      prefill: "target wrote (prefill)",
    };
    const at = start + kept.length, hasOwn = emitted > kept.length && at < run.tokens.length;
    const own = hasOwn ? step("own " + round.own, run.tokens[at], verdicts[round.own], textOf(run, at)) : null;
    const title = proposed.length ? (parents ? "Proposed, as a tree" : "Proposed, in order") : "Written";
    const list = make("ul", parents ? "tree" : "chain");
    const item = (content) => {
      const element = make("li");
      element.append(content);
      return element;
    };
    if (parents) {
      const items = steps.map(item), lists = new Map([[-1, list]]);
      const below = (index) => {
        if (!lists.has(index)) lists.set(index, items[index].appendChild(make("ul")));
        return lists.get(index);
      };
      items.forEach((element, i) => below(parents[i]).append(element));
      if (own) below(tip).append(item(own));
    } else {
      list.append(...steps.map(item), ...(own ? [item(own)] : []));
    }
    const parts = [make("h3", "", title), list];
    const soft = (text) => make("p", "soft", text);
    if (parents) parts.splice(1, 0, soft("Choices for one place stand below each other, what follows is indented."));
    if (!own && round.number) parts.push(soft("The text ended here, before a token of the target's own."));
    return parts;
  };

  const select = find("prompt");
  data.runs.forEach((each, i) => select.append(new Option(each.label, i)));
  select.addEventListener("change", () => choose(Number(select.value)));
  const slider = find("round");
  slider.addEventListener("input", () => move(Number(slider.value)));
  find("previous").addEventListener("click", () => move(Math.max(Number(slider.value) - 1, 0)));
  find("next").addEventListener("click", () => move(Math.min(Number(slider.value) + 1, rounds.length - 1)));
  find("text").addEventListener("click", (event) => {
    const token = event.target.closest(".token");
    if (token && getSelection().isCollapsed) move(Number(token.dataset.round));
  });
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => (each.open = true)));
  find("explorer").hidden = false;
  choose(0);
})();
