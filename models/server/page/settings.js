// The form of settings: what a request is made of besides its messages. An empty field leaves the choice to the server.

const NUMBERS = ["temperature", "top_p", "top_k", "seed", "max_tokens"];
export const AUTO = "auto", OFF = "off";

export class Settings {
  constructor(form) {
    this.form = form;
    this.fields = form.elements;
  }

  // Whether every field can be used; if not, the browser points at the first that cannot.
  check() {
    return this.form.reportValidity();
  }

  get valid() {
    return this.form.checkValidity();
  }

  // Show what the server has: its drafters, and what it does where a request leaves the choice to it. A chosen drafter
  // that it does not have becomes "auto".
  offer({ drafters = [], default: usual, num_draft_tokens: length = AUTO } = {}) {
    const select = this.fields.drafter, chosen = select.value;
    const names = [AUTO, ...drafters, OFF];
    select.replaceChildren(...names.map((name) => new Option(name === AUTO && usual ? `auto: ${usual}` : name, name)));
    select.value = names.includes(chosen) ? chosen : AUTO;
    this.fields.num_draft_tokens.placeholder = length;
  }

  get drafter() {
    return this.fields.drafter.value || AUTO;
  }

  get greedy() {
    return this.fields.temperature.value !== "" && Number(this.fields.temperature.value) === 0;
  }

  get system() {
    return this.fields.system.value.trim() ? this.fields.system.value : "";
  }

  get key() {
    return this.fields.key.value.trim();
  }

  // The fields of a request about sampling and length.
  sampling() {
    const filled = NUMBERS.filter((name) => this.fields[name].value !== "");
    return Object.fromEntries(filled.map((name) => [name, Number(this.fields[name].value)]));
  }

  // The fields of a request about who drafts how much.
  drafting() {
    const length = this.fields.num_draft_tokens.value;
    if (length === "") return { drafter: this.drafter };
    return { drafter: this.drafter, num_draft_tokens: length === AUTO ? AUTO : Number(length) };
  }

  // All fields by name, to be kept; and back. Names that there are not are passed over.
  saved() {
    const value = (field) => (field.type === "checkbox" ? field.checked : field.value);
    return Object.fromEntries([...this.fields].filter((field) => field.name).map((field) => [field.name, value(field)]));
  }

  restore(kept) {
    // The server has not said yet which drafters there are.
    if (typeof kept.drafter === "string") this.fields.drafter.replaceChildren(new Option(kept.drafter));
    for (const field of this.fields) {
      if (!(field.name in kept)) continue;
      if (field.type === "checkbox") field.checked = Boolean(kept[field.name]);
      else field.value = String(kept[field.name]);
    }
  }
}
