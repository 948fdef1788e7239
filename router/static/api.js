// The admin API, and the line that says what is wrong with it.

const KEY = "baton-admin-key";

/** Send this key from now on, until the tab is closed. */
export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** Ask the admin API. Throws an Error with its message. */
export async function call(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...(options.headers ?? {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const answer = await fetch(`/admin/${path}`, { ...options, headers, cache: "no-store", signal: AbortSignal.timeout(8000) });
  const text = await answer.text();
  if (answer.ok) return answer.headers.get("content-type")?.startsWith("text/plain") ? text : JSON.parse(text);
  let message = `${answer.status} ${answer.statusText}`;
  try { message = JSON.parse(text).error.message; } catch { /* not from the router itself */ }
  throw Object.assign(new Error(message), { status: answer.status });
}

/** Say what is wrong, or, with "", that nothing is. */
export function complain(message) {
  const line = document.getElementById("problem");
  line.textContent = message;
  line.hidden = !message;
}
