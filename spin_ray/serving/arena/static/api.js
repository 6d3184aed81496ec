// Requests to the server, with the key of this tab. A refused key is an event of the document.

export const KEY = "spin_ray.api_key";

/** A request that failed, told in words. */
export class Refused extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export async function call(path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  if (response.status === 401) document.dispatchEvent(new Event("key-needed"));
  throw new Refused(await reasonOf(response), response.status);
}

let loads = 0;

/** Returns a function that loads and then shows; only the newest load of the page is shown, or fails. */
export function newestOf(load, show) {
  return async () => {
    const mine = ++loads;
    try {
      const loaded = await load();
      if (mine === loads) show(loaded);
    } catch (error) {
      if (mine === loads) throw error;
    }
  };
}

/** Returns the server's words of an error; a proxy may have another form. */
async function reasonOf(response) {
  const wait = response.headers.get("Retry-After");
  const again = wait ? ` (in ${wait} s)` : "";
  const said = await response.json().catch(() => ({}));
  return (said.error?.message ?? `The server answered with status ${response.status}`) + again;
}

/** Yields the events of a comparison: the comparison itself, then pieces and ends, each with its side. */
export const battle = (request, signal) => events("/v1/battles", request, signal);

/** Yields pieces and end of a named iterate's answer, in the form of a comparison's events. */
export async function* answerOf(request, side, signal) {
  for await (const { error, choices } of events("/v1/chat/completions", { ...request, stream: true }, signal)) {
    if (error) yield { side, error };
    const choice = choices?.[0];
    if (choice?.delta?.content) yield { side, text: choice.delta.content };
    if (choice?.finish_reason) yield { side, finish_reason: choice.finish_reason };
  }
}

async function* events(path, request, signal) {
  const response = await call(path, request, signal);
  let buffered = "";
  for await (const piece of decoded(response.body)) {
    const lines = (buffered + piece).split("\n");
    buffered = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
  throw new Refused("The connection broke off in the middle of the answer.");
}

async function* decoded(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      yield value;
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The connection broke off in the middle of the answer.");
  }
}
