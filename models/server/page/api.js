// The server, as this page uses it: what it offers, and one answer as a stream of chunks. Addresses are relative to
// the page, so that it also works below a path of another server.
import { oneLine } from "./text.js";

// Something the server refused, or a connection that failed: `message` is one line for people.
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(oneLine(message));
    this.status = status;
  }
}

const UNREACHABLE = "the server does not answer: is it still running?";

const call = async (path, { key, ...options } = {}) => {
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), { ...options, headers, cache: "no-store" });
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError(UNREACHABLE);
  }
  if (!response.ok) throw await refusal(response);
  return response;
};

// What a response that is not 2xx says, in one line.
const refusal = async (response) => {
  const { status } = response;
  let said = "";
  try {
    const body = await response.json();
    said = body.error?.message ?? "";
  } catch {
    // no JSON: the status has to do
  }
  said ||= `the server answered ${status} ${response.statusText}`;
  const wait = response.headers.get("Retry-After");
  if (wait && [429, 503].includes(status) && !said.includes("try again")) said += ` (try again in ${wait} s)`;
  return new ServerError(said, status);
};

// The first model that the server lists.
export const model = async (key) => {
  const list = await (await call("v1/models", { key })).json();
  const first = list.data?.[0];
  if (!first) throw new ServerError("the server lists no model");
  return first;
};

// The chunks of the answer to a request, as they come. Raises ServerError, or AbortError once `signal` says so.
export async function* chunks([path, body], { key, signal }) {
  const response = await call(path, { key, signal, method: "POST", body: JSON.stringify(body) });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    let chunk;
    try {
      chunk = JSON.parse(data);
    } catch {
      throw new ServerError(`the server sent no JSON: ${data}`);
    }
    if (chunk.error) throw new ServerError(chunk.error.message ?? "the server failed");
    yield chunk;
  }
  throw new ServerError("the connection ended before the answer did");
}

// The data of each server-sent event of a body; comments, such as pings, are left out.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", half = false; // whether the last character was a \r, which a \n may follow
  const data = [];
  try {
    for (;;) {
      const { done, value } = await read(reader);
      if (done) return;
      if (!value) continue;
      const lines = (rest + (half ? value.replace(/^\n/, "") : value)).split(/\r\n|\n|\r/);
      rest = lines.pop();
      half = value.endsWith("\r");
      for (const line of lines)
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && data.length) yield data.splice(0).join("\n");
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

const read = async (reader) => {
  try {
    return await reader.read();
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError("the connection broke before the answer ended");
  }
};
