// The chat page: what it shows, and what its buttons do.

import { modelName, reply } from "./api.js";
import { render } from "./markdown.js";
import * as store from "./store.js";

const $ = (id) => document.getElementById(id);
const OPTION_NAMES = [
  "system", "temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed", "api_key",
];

let conversations = store.loadConversations();
let current = conversations[0] ?? store.newConversation();
let options = store.loadOptions();
let running = null; // the AbortController of the reply that is being written

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "class") element.className = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

function button(text, onclick, label = text, name = "") {
  return make("button", { type: "button", onclick, "aria-label": label, class: name }, text);
}

/** Tells a text to those who use a screen reader. */
function say(text) {
  $("status").textContent = text;
}

function save(conversation) {
  if (!conversations.includes(conversation)) conversations.unshift(conversation);
  if (!store.saveConversation(conversation)) say("The browser has no room for conversations.");
}

// Conversations

function showConversations() {
  const items = conversations.map((conversation) => {
    const title = store.titleOf(conversation);
    const open = button(title, () => select(conversation), title, "open");
    if (conversation === current) open.setAttribute("aria-current", "true");
    const remove = button("✕", () => removeConversation(conversation), `Delete: ${title}`, "delete");
    return make("li", { class: conversation === current ? "current" : "" }, open, remove);
  });
  $("conversations").replaceChildren(...items);
}

function select(conversation) {
  running?.abort();
  current = conversation;
  openSidebar(false);
  show();
  $("input").focus();
}

function removeConversation(conversation) {
  conversations = conversations.filter((other) => other !== conversation);
  store.deleteConversation(conversation);
  if (conversation === current) select(conversations[0] ?? store.newConversation());
  else showConversations();
}

function openSidebar(isOpen) {
  $("sidebar").classList.toggle("open", isOpen);
  $("menu").setAttribute("aria-expanded", String(isOpen));
  if (isOpen) $("new").focus();
}

// Messages

function show() {
  showConversations();
  const shown = current.messages.map(showMessage);
  const empty = make("p", { class: "empty" }, "Say something to begin a conversation.");
  $("messages").replaceChildren(...(shown.length ? shown : [empty]));
  scrollDown();
}

function scrollDown() {
  $("messages").scrollTop = $("messages").scrollHeight;
}

function showMessage(message, index) {
  const isMine = message.role === "user";
  const body = make("div", { class: "body" });
  if (isMine) body.textContent = message.content;
  else render(body, message.content);
  const tools = make("div", { class: "tools" });
  const element = make(
    "article",
    { class: isMine ? "user" : "assistant", "aria-label": isMine ? "You" : "Reply" },
    body,
    tools,
  );
  fillTools(tools, message, index, element);
  return element;
}

function fillTools(tools, message, index, element) {
  const isMine = message.role === "user";
  const copy = button("Copy", () => navigator.clipboard?.writeText(message.content));
  const change = isMine
    ? button("Edit", () => edit(message, index, element))
    : button("Retry", () => answer(index));
  tools.replaceChildren(copy, change);
  if (message.note) tools.append(make("span", {}, message.note));
  if (message.error) tools.append(make("span", { class: "error" }, message.error));
}

/** Puts a message into a field. When it is sent again, all messages after it are dropped. */
function edit(message, index, element) {
  const field = make("textarea", { "aria-label": "Edit the message", rows: "3" });
  field.value = message.content;
  const sendAgain = () => {
    if (!field.value.trim()) return;
    current.messages[index] = { role: "user", content: field.value };
    answer(index + 1);
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") show();
    if (isEnter(event)) {
      event.preventDefault();
      sendAgain();
    }
  });
  const tools = make("div", { class: "tools" }, button("Send again", sendAgain), button("Cancel", show));
  element.replaceChildren(field, tools);
  field.focus();
}

// Replies

/** Asks for a reply, which becomes the message at an index. Drops all messages from there on. */
async function answer(index) {
  running?.abort();
  const conversation = current;
  const controller = (running = new AbortController());
  const message = { role: "assistant", content: "" };
  conversation.messages.splice(index, Infinity, message);
  save(conversation);
  show();
  setRunning(true);
  const element = $("messages").lastElementChild;
  element.classList.add("waiting");
  element.setAttribute("aria-busy", "true");
  say("The reply is being written.");
  try {
    await write(message, conversation.messages.slice(0, index), element, controller.signal);
    say(`Reply: ${message.content}`);
  } catch (error) {
    if (!controller.signal.aborted) message.error = `${error.message ?? error}`;
    else message.note = "stopped";
    say(message.error ?? "Stopped.");
  }
  save(conversation);
  if (running === controller) {
    running = null;
    setRunning(false);
  }
  if (current === conversation) {
    const follows = isAtEnd();
    element.replaceWith(showMessage(message, index));
    if (follows) scrollDown();
  }
}

async function write(message, messages, element, signal) {
  const body = element.querySelector(".body");
  let first = 0, last = 0, reason = "", isPlanned = false;
  const draw = () => {
    isPlanned = false;
    const follows = isAtEnd();
    render(body, message.content);
    if (follows) scrollDown();
  };
  for await (const part of reply(messages, options, signal)) {
    if (part.text) {
      last = performance.now();
      first ||= last;
      message.content += part.text;
      if (!isPlanned) isPlanned = Boolean(requestAnimationFrame(draw));
    }
    reason = part.reason ?? reason;
    if (part.usage) message.note = describe(part.usage, (last - first) / 1000, reason);
  }
}

function describe(usage, seconds, reason) {
  const count = usage.completion_tokens;
  const speed = seconds > 0 ? `, ${((count - 1) / seconds).toFixed(1)} tokens/s` : "";
  const end = { length: ", cut at the limit", content_filter: ", withheld as harmful" }[reason] ?? "";
  return `${count} tokens${speed}${end}`;
}

function isAtEnd() {
  const box = $("messages");
  return box.scrollHeight - box.scrollTop - box.clientHeight < 80;
}

function setRunning(isRunning) {
  const hadFocus = [$("send"), $("stop")].includes(document.activeElement);
  $("send").hidden = isRunning;
  $("stop").hidden = !isRunning;
  if (hadFocus) (isRunning ? $("stop") : $("send")).focus();
}

// Input

function isEnter(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}

function fitInput() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight + 2}px`;
}

function send() {
  const text = $("input").value;
  if (!text.trim() || running) return;
  $("input").value = "";
  fitInput();
  current.messages.push({ role: "user", content: text });
  answer(current.messages.length);
}

async function showModel() {
  try {
    $("title").textContent = document.title = await modelName(options);
  } catch (error) {
    $("title").textContent = error.message;
  }
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("input").addEventListener("input", fitInput);
$("input").addEventListener("keydown", (event) => {
  if (isEnter(event)) {
    event.preventDefault();
    send();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => select(store.newConversation()));
$("menu").addEventListener("click", () => openSidebar(!$("sidebar").classList.contains("open")));
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("options").open) return;
  running?.abort();
  openSidebar(false);
});
$("messages").addEventListener("click", () => openSidebar(false));
$("open-options").addEventListener("click", () => {
  for (const name of OPTION_NAMES) $(name).value = options[name] ?? "";
  $("options").showModal();
});
$("options").addEventListener("close", () => {
  options = Object.fromEntries(OPTION_NAMES.map((name) => [name, $(name).value]));
  store.saveOptions(options);
  showModel();
});
addEventListener("pagehide", () => running && save(current)); // with the reply so far
addEventListener("storage", () => {
  // Another tab has stored something. The conversation that is open here stays as this tab has it.
  const others = store.loadConversations();
  conversations = others.map((other) => (other.id === current.id ? current : other));
  showConversations();
});

show();
showModel();
$("input").focus();
