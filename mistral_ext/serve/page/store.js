// Stores conversations and options in the browser.

const CONVERSATIONS = "mistral_ext.conversations";
const OPTIONS = "mistral_ext.options";
const KEY = "mistral_ext.api_key";

function read(storage, name, otherwise) {
  try {
    return JSON.parse(storage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise; // the browser forbids storage, or the value is not JSON
  }
}

/** Stores a value. Returns false if the browser forbids that, or has no room. */
function write(storage, name, value) {
  try {
    storage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

/** Returns [{id, messages: [{role, content, note}]}], the newest conversation first. */
export function loadConversations() {
  const found = read(localStorage, CONVERSATIONS, []);
  return Array.isArray(found) ? found.filter((c) => c?.id && Array.isArray(c.messages)) : [];
}

/**
 * Stores one conversation. Other conversations stay as they are stored, because another tab
 * may have changed them. Returns false if the conversation could not be stored.
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

/** Stores the options. The API key is kept only as long as the tab is open. */
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
