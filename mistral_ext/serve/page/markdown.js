// Turns Markdown into elements. Text of a model becomes text nodes, not HTML, so it cannot run.

/** Replaces the children of an element by those that a Markdown text describes. */
export function render(element, text) {
  element.replaceChildren(...blocks(text.split("\n")));
}

function make(name, ...children) {
  const element = document.createElement(name);
  element.append(...children);
  return element;
}

const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)+\|?\s*$/;

// Quotes and lists inside each other are shown as text from this depth on. A model that repeats ">"
// would else exhaust the stack of the browser.
const DEEPEST = 16;

function blocks(lines, depth = 0) {
  const made = [];
  for (let i = 0; i < lines.length; ) {
    const [block, next] = blockAt(lines, i, depth);
    if (block) made.push(block);
    i = next;
  }
  return made;
}

/** Returns the block that begins at line i (null: the line is empty), and the next line's index. */
function blockAt(lines, i, depth) {
  const line = lines[i];
  if (!line.trim()) return [null, i + 1];
  if (FENCE.test(line)) return codeAt(lines, i);
  const heading = HEADING.exec(line);
  if (heading) {
    // The page itself uses h1 and h2, so headings of a text begin with h3.
    return [make(`h${Math.min(heading[1].length + 2, 6)}`, ...inline(heading[2])), i + 1];
  }
  if (RULE.test(line)) return [make("hr"), i + 1];
  if (QUOTE.test(line) && depth < DEEPEST) {
    const end = runEnd(lines, i, (l) => QUOTE.test(l));
    const inner = lines.slice(i, end).map((l) => l.replace(QUOTE, ""));
    return [make("blockquote", ...blocks(inner, depth + 1)), end];
  }
  if (ITEM.test(line) && depth < DEEPEST) return listAt(lines, i, depth);
  if (line.includes("|") && TABLE_RULE.test(lines[i + 1] ?? "")) return tableAt(lines, i);
  const end = runEnd(lines, i + 1, (l) => l.trim() && !beginsBlock(l));
  return [make("p", ...inline(lines.slice(i, end).join("\n"))), end];
}

function beginsBlock(line) {
  return [FENCE, HEADING, RULE, QUOTE, ITEM].some((pattern) => pattern.test(line));
}

function runEnd(lines, i, belongs) {
  while (i < lines.length && belongs(lines[i])) i++;
  return i;
}

function codeAt(lines, i) {
  const [, fence, language] = FENCE.exec(lines[i]);
  const isEnd = (line) => line.trim().startsWith(fence) && !line.trim().replaceAll(fence[0], "");
  const end = runEnd(lines, i + 1, (line) => !isEnd(line));
  const code = lines.slice(i + 1, end).join("\n");
  const copy = make("button", "Copy");
  copy.type = "button";
  copy.setAttribute("aria-label", language ? `Copy the ${language} code` : "Copy the code");
  copy.addEventListener("click", () => navigator.clipboard?.writeText(code));
  const block = make("div", make("pre", make("code", code)), copy);
  block.className = "block";
  return [block, end + 1];
}

function listAt(lines, i, depth) {
  const [, indent, mark] = ITEM.exec(lines[i]);
  const isOrdered = /\d/.test(mark);
  const list = make(isOrdered ? "ol" : "ul");
  if (isOrdered) list.start = parseInt(mark, 10);
  while (i < lines.length) {
    const item = ITEM.exec(lines[i]);
    if (!item || item[1].length > indent.length + 1 || /\d/.test(item[2]) !== isOrdered) break;
    const deeper = (l) => !l.trim() || /^\s/.test(l) && leading(l) > indent.length;
    let end = runEnd(lines, i + 1, deeper);
    while (!lines[end - 1].trim()) end--;
    const inner = lines.slice(i + 1, end).map((l) => l.slice(Math.min(leading(l), indent.length + 2)));
    list.append(make("li", ...inline(item[3]), ...blocks(inner, depth + 1)));
    i = runEnd(lines, end, (l) => !l.trim());
    if (i > end && !ITEM.test(lines[i] ?? "")) break;
  }
  return [list, i];
}

function leading(line) {
  return line.length - line.trimStart().length;
}

function tableAt(lines, i) {
  const end = runEnd(lines, i + 2, (line) => line.includes("|"));
  const row = (line, cell) =>
    make("tr", ...cells(line).map((text) => make(cell, ...inline(text))));
  const body = lines.slice(i + 2, end).map((line) => row(line, "td"));
  return [make("table", make("thead", row(lines[i], "th")), make("tbody", ...body)), end];
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
}

const INLINE = new RegExp(
  [
    /(?<ticks>`+)(?<code>.+?)\k<ticks>(?!`)/,
    /\[(?<label>[^\]]+)\]\((?<address>https?:\/\/[^\s)]+)\)/,
    /(?<bare>https?:\/\/[^\s<>()"']*[^\s<>()"'.,;:!?])/,
    /(?<strong>\*\*|__)(?=\S)(?<bold>.+?)(?<=\S)\k<strong>/,
    /(?<!\w)(?<em>[*_])(?=\S)(?<slanted>[^*_]+?)(?<=\S)\k<em>(?!\w)/,
    /~~(?<gone>.+?)~~/,
    /\\(?<escaped>[!-/:-@[-`{-~])/,
  ].map((pattern) => pattern.source).join("|"),
  "su",
);

function inline(text) {
  const made = [];
  for (let found; (found = INLINE.exec(text)); text = text.slice(found.index + found[0].length)) {
    if (found.index) made.push(text.slice(0, found.index));
    made.push(span(found.groups));
  }
  return text ? [...made, text] : made;
}

function span({ code, label, address, bare, bold, slanted, gone, escaped }) {
  if (code) return make("code", code.replace(/^ (.*) $/s, "$1"));
  if (address) return link(address, inline(label));
  if (bare) return link(bare, [bare]);
  if (bold) return make("strong", ...inline(bold));
  if (slanted) return make("em", ...inline(slanted));
  if (gone) return make("del", ...inline(gone));
  return escaped;
}

function link(address, children) {
  const element = make("a", ...children);
  element.href = address; // safe, because INLINE lets only http: and https: through
  element.rel = "noopener noreferrer nofollow";
  element.target = "_blank";
  return element;
}
