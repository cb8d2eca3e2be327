// Text into the page, always as text: nothing here, or anywhere on this page, makes markup of it.

// Where a token came from, in the words of the reports.
export const ORIGINS = {
  prefill: "first token, from the prefill",
  drafted: "drafted and accepted",
  corrected: "corrected by the target",
  bonus: "bonus: the target's, after a draft accepted in full",
  plain: "target alone, nothing drafted",
};

// Characters that are not seen but change how others are read: controls, and those that turn the direction of text.
// Joiners stay as they are: emoji and some scripts need them.
const DECEIVING = /([\p{Cc}\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069])/u;

export const make = (tag, name = "", text = "") => {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text) element.textContent = text;
  return element;
};

// Put text into an element, with a sign in place of each deceiving character.
export const show = (element, text) => {
  text.split(DECEIVING).forEach((part, i) => {
    if (i % 2 === 0 || part === "\n" || part === "\t") return part && element.append(part);
    const code = part.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    element.append(make("span", "sign", `⟨U+${code}⟩`));
  });
  return element;
};

// A text of any length as one line of at most so many characters.
export const oneLine = (text, most = 300) => {
  const line = String(text).replace(/\s+/g, " ").trim();
  return line.length > most ? `${line.slice(0, most - 1)}…` : line;
};

export const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
