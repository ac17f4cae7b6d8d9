// Talking to the server: models, and one streamed request. Knows nothing of the page.

let key = "";

export function useKey(value) { key = value.trim(); }

function headers() {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function failure(response) {
  let message = `${response.status} ${response.statusText}`;
  try { message = (await response.json()).error.message; } catch { /* no JSON: the status says it */ }
  return Object.assign(new Error(message), { status: response.status });
}

export async function models() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (!response.ok) throw await failure(response);
  return (await response.json()).data;
}

/** The payloads of a stream, as they come. Throws what the server says went wrong. */
export async function* stream(path, body, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true }, return_draft_info: true };
  const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(asked), signal });
  if (!response.ok) throw await failure(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ") || event === "data: [DONE]") continue;
      const payload = JSON.parse(event.slice(6));
      if (payload.error) throw new Error(payload.error.message);
      yield payload;
    }
  }
}
