// Calls the server's API.

const NUMBERS = ["temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed"];

function headers(options) {
  const key = options.api_key ? { authorization: `Bearer ${options.api_key}` } : {};
  return { "content-type": "application/json", ...key };
}

async function problem(response) {
  try {
    return new Error((await response.json()).error.message);
  } catch {
    return new Error(`The server answered ${response.status}.`);
  }
}

export async function modelName(options) {
  const response = await fetch("v1/models", { headers: headers(options) });
  if (!response.ok) throw await problem(response);
  return (await response.json()).data[0].id;
}

/** Asks for a reply. Yields {text}, {reason} (why the reply ended) and {usage} as they come. */
export async function* reply(messages, options, signal) {
  const system = options.system ? [{ role: "system", content: options.system }] : [];
  const body = {
    messages: [...system, ...messages.map(({ role, content }) => ({ role, content }))],
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const name of NUMBERS) {
    if (options[name] !== undefined && options[name] !== "") body[name] = Number(options[name]);
  }
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: headers(options),
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw await problem(response);
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices[0];
    if (choice?.delta.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) yield { reason: choice.finish_reason };
    if (event.usage) yield { usage: event.usage };
  }
}

/** Yields the JSON objects of a stream of server-sent events. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The connection broke off.");
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      if (part.startsWith("data: ")) yield JSON.parse(part.slice(6)); // other parts are comments
    }
  }
}
