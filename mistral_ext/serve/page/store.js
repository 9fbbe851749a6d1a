// Conversations and options, kept in the browser.

const CONVERSATIONS = "mistral_ext.conversations";
const OPTIONS = "mistral_ext.options";
const KEY = "mistral_ext.api_key";

function read(storage, name, otherwise) {
  try {
    return JSON.parse(storage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise; // not allowed, or not ours
  }
}

/** Whether it was kept: a browser may forbid it, or have no room. */
function write(storage, name, value) {
  try {
    storage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

/** [{id, messages: [{role, content, note}]}], the newest first. */
export function loadConversations() {
  const found = read(localStorage, CONVERSATIONS, []);
  return Array.isArray(found) ? found.filter((c) => c?.id && Array.isArray(c.messages)) : [];
}

/**
 * Keeps one conversation, and leaves the others to the tabs that have them.
 * Returns whether there was room.
 */
export function saveConversation(conversation) {
  if (!conversation.messages.length) return true;
  const others = loadConversations();
  const index = others.findIndex((other) => other.id === conversation.id);
  if (index < 0) others.unshift(conversation);
  else others[index] = conversation;
  return write(localStorage, CONVERSATIONS, others);
}

export function deleteConversation(conversation) {
  const others = loadConversations().filter((other) => other.id !== conversation.id);
  write(localStorage, CONVERSATIONS, others);
}

export function loadOptions() {
  return { ...read(localStorage, OPTIONS, {}), api_key: read(sessionStorage, KEY, "") };
}

/** The key lasts as long as the tab. */
export function saveOptions({ api_key: key, ...others }) {
  write(sessionStorage, KEY, key ?? "");
  write(localStorage, OPTIONS, others);
}

export function newConversation() {
  const random = crypto.getRandomValues(new Uint32Array(2));
  return { id: `${random[0]}-${random[1]}`, messages: [] };
}

export function titleOf(conversation) {
  const first = conversation.messages.find((message) => message.role === "user");
  return first ? first.content.trim().slice(0, 60) : "New conversation";
}
