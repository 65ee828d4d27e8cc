
"use strict";
const $ = (id) => document.getElementById(id);
if (location.hash.startsWith("#token=")) {  // from the address that the server printed; not left in it
  sessionStorage.setItem("token", decodeURIComponent(location.hash.slice("#token=".length)));
  history.replaceState(null, "", location.pathname);
}

function headers() {
  const token = $("token").value.trim();
  return {"Content-Type": "application/json", ...(token ? {"Authorization": "Bearer " + token} : {})};
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, {headers: headers(), ...options});
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server cannot be reached; is it still running?");
  }
  if (response.ok) return response;
  if (response.status === 401) {
    $("token_field").hidden = false;
    const details = $("token_field").closest("details");
    if (details) details.open = true;
    $("token").focus();
  }
  const body = await response.json().catch(() => null);
  const {message, code} = body ? body.error : {message: "The server answered with status " + response.status + "."};
  throw Object.assign(new Error(message), {code});
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

// Text with code, emphasis and lists as nodes. What a model writes is never read as HTML.
const INLINE = /\\([\\`*_])|(`+)(?!`)(.*?[^`])\2(?!`)|\*\*(?=[^\s*])(.*?[^\s*])\*\*|(?<![\w*])\*(?=[^\s*])(.*?[^\s*])\*(?![\w*])|(?<![\w_])_(?=[^\s_])(.*?[^\s_])_(?![\w_])/gs;
function inline(node, text) {
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    const [whole, escaped, , code, bold, starred, underlined] = match;
    node.append(text.slice(end, match.index));
    end = match.index + whole.length;
    if (escaped) node.append(escaped);
    else if (code) node.append(element("code", "", code));
    else node.append(inline(element(bold ? "strong" : "em", "", ""), bold || starred || underlined));
  }
  node.append(text.slice(end));
  return node;
}

function formatted(text) {
  const blocks = [], lists = [];  // lists: those that are open, with their indents, the outermost first
  let lines = [], fence = null, item = null;
  const block = (made) => { made.dir = "auto"; blocks.push(made); return made; };
  const close = () => {  // the paragraph or the item that the lines are of
    if (item) inline(item, lines.join("\n"));
    else if (lines.length) inline(block(element("p", "", "")), lines.join("\n"));
    lines = [];
    item = null;
  };
  for (const line of text.split("\n")) {
    if (fence) {
      if (line.trim().startsWith(fence.mark) && !line.trim().replaceAll(fence.mark[0], "")) fence = null;
      else fence.code.append(line + "\n");
      continue;
    }
    const mark = line.match(/^\s*(```+|~~~+)[^`]*$/);
    const bullet = line.match(/^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/);
    const heading = line.match(/^#{1,6}\s+(.*)$/);
    if (mark || heading || !line.trim()) {
      close();
      if (mark || heading) lists.length = 0;
      if (heading) inline(block(element("h4", "", "")), heading[1]);
      if (!mark) continue;
      const pre = block(element("pre", "", ""));
      pre.dir = "ltr";
      pre.tabIndex = 0;  // may be wider than the page
      fence = {mark: mark[1], code: element("code", "", "")};
      pre.append(fence.code);
    } else if (bullet) {
      close();
      const indent = bullet[1].length, kind = bullet[2] ? "ol" : "ul";
      while (lists.length > 1 && lists.at(-1).indent > indent) lists.pop();
      let list = lists.at(-1);
      if (!list || indent > list.indent + 1 || list.made.localName !== kind) {
        const inside = list && indent > list.indent + 1;
        if (!inside) lists.pop();
        list = {indent, made: element(kind, "", "")};
        if (bullet[2]) list.made.start = bullet[2];
        if (lists.length) lists.at(-1).made.lastChild.append(list.made);
        else block(list.made);
        lists.push(list);
      }
      item = list.made.appendChild(element("li", "", ""));
      lines = [bullet[3]];
    } else {
      if (!item && !/^\s/.test(line)) lists.length = 0;
      lines.push(item ? line.trim() : line);
    }
  }
  close();
  return blocks;
}
