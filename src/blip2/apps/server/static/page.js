"use strict";
// The page of `blip2 serve`: plain DOM, text only ever set as text, requests to this server only.

const $ = (id) => document.getElementById(id);
const KEPT = ["image/jpeg", "image/png", "image/webp"];
const LARGEST = 1600, AS_IT_IS = 2 << 20;
const state = { photo: null, turns: [], attention: null, key: sessionStorage.getItem("blip2-key") };

// -- talking to the server -----------------------------------------------------------------------

async function request(path, body) {
  const options = { headers: state.key ? { Authorization: `Bearer ${state.key}` } : {} };
  if (body) Object.assign(options, { method: "POST", body });
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer.");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) $("key-form").hidden = false;
  const told = await answer.json().catch(() => null);
  throw new Error(told?.error?.message ?? `The server answered ${answer.status}.`);
}

const ask = async (path, fields) => {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) if (value !== null && value !== "") form.append(name, value);
  return (await request(path, form)).json();
};

// A form whose work may fail: one at a time, its button off meanwhile, what went wrong at the top.
function onSubmit(id, work) {
  $(id).addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = $(id).querySelector("button");
    const before = button.textContent;
    button.disabled = true;
    button.textContent = "…";
    say(null);
    try {
      await work();
    } catch (error) {
      say(error.message);
    } finally {
      button.disabled = false;
      button.textContent = before;
    }
  });
}

function say(message) {
  $("message").hidden = !message;
  $("message").textContent = message ?? "";
}

function item(parent, text, className) {
  const made = document.createElement("li");
  made.textContent = text;
  if (className) made.className = className;
  parent.append(made);
  return made;
}

// -- the photograph --------------------------------------------------------------------------------

// Large pictures, and what the server does not take (other types, a film behind the picture), are drawn anew here.
async function prepared(file) {
  const [a, b] = new Uint8Array(await file.slice(-2).arrayBuffer());
  const whole = file.type !== "image/jpeg" || (a === 0xff && b === 0xd9);
  if (KEPT.includes(file.type) && file.size <= AS_IT_IS && whole) return file;
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (!bitmap) throw new Error("This browser cannot read that picture: choose a JPEG, PNG or WebP.");
  const scale = Math.min(1, LARGEST / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.95));
}

async function take(file) {
  if (!file) return;
  say(null);
  try {
    state.photo = await prepared(file);
  } catch (error) {
    say(error.message);
    return;
  }
  URL.revokeObjectURL($("photo").src);
  $("photo").src = URL.createObjectURL(state.photo);
  $("photo").alt = "The photograph you chose; its caption is being written";
  $("frame").hidden = false;
  $("pick-text").textContent = "Another photograph";
  $("captions").replaceChildren();
  forget();
  hideMap();
  $("maps").hidden = true;
  for (const form of ["caption-form", "ask-form", "attend-form"]) $(form).querySelector("button").disabled = false;
  $("like").disabled = false;
  $("caption-form").requestSubmit();
}

$("file").addEventListener("change", () => take($("file").files[0]));
for (const name of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") take(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
  if (file) take(file);
});

// -- captions and questions ------------------------------------------------------------------------

onSubmit("caption-form", async () => {
  const photo = state.photo;
  const found = await ask("/caption", { image: photo, num: $("num").value });
  if (photo !== state.photo) return;
  $("captions").replaceChildren();
  for (const { text, score } of found.captions) {
    const line = item($("captions"), text);
    if (score !== null && found.captions.length > 1) {
      const part = document.createElement("span");
      part.className = "soft small";
      part.textContent = `  fits ${(100 * score).toFixed(0)} %`;
      line.append(part);
    }
  }
  $("photo").alt = found.captions[0].text || "The photograph you chose";
});

function forget() {
  state.turns = [];
  $("talk").replaceChildren();
  $("forget").hidden = true;
}

onSubmit("ask-form", async () => {
  const question = $("question").value.trim();
  if (!question) return;
  const turns = state.turns;
  const found = await ask("/ask", { image: state.photo, question, history: JSON.stringify(turns), max_tokens: 30 });
  if (turns !== state.turns) return;
  turns.push({ question, answer: found.answer });
  const line = item($("talk"), "");
  for (const [name, text] of [["question", question], ["answer", found.answer || "(no answer)"]]) {
    const part = document.createElement("div");
    part.className = name;
    part.textContent = text;
    line.append(part);
  }
  $("question").value = "";
  $("question").focus();
  $("forget").hidden = false;
});

$("forget").addEventListener("click", () => {
  forget();
  $("question").focus();
});

// -- attention ---------------------------------------------------------------------------------------

onSubmit("attend-form", async () => {
  const found = (state.attention = await ask("/attend", { image: state.photo, text: $("text").value }));
  const choices = [["queries", "One query, one layer"]];
  if (found.itm_map) choices.unshift(["itm_map", "What makes text and photograph belong together (ITM)"]);
  if (found.itc_map) choices.push(["itc_map", "What the similarity depends on (ITC)"]);
  (found.words ?? []).forEach((word, n) => choices.push([`word-${n}`, `While writing “${word.trim()}”`]));
  fill("which", choices);
  fill("layer", found.layers.map((layer, n) => [n, layer]));
  $("layer").value = found.layers.length - 1;
  $("query").max = found.queries[0].length - 1;
  $("query").value = found.winner ?? 0;
  const told = [];
  if (found.itm !== null) told.push(`Belong together: ${(100 * found.itm).toFixed(0)} %.`);
  if (found.winner !== null) told.push(`Query ${found.winner} is nearest to the text.`);
  if (found.caption) told.push(`Caption: ${found.caption}`);
  $("scores").textContent = told.join(" ");
  $("maps").hidden = false;
  showMap();
});

function fill(id, choices) {
  $(id).replaceChildren(...choices.map(([value, text]) => new Option(text, value)));
}

function showMap() {
  const found = state.attention, which = $("which").value;
  $("query-fields").hidden = which !== "queries";
  $("query-number").textContent = $("query").value;
  let map = found[which];
  if (which === "queries") map = found.queries[$("layer").value][$("query").value];
  if (which.startsWith("word-")) map = found.word_maps[which.slice(5)];
  draw(map, found.resize);
}

// The map over the part of the photograph that the model saw: all of it, or its centre.
function draw(map, resize) {
  const photo = $("photo"), canvas = $("heat"), [rows, columns] = [map.length, map[0].length];
  const flat = map.flat().map((value) => Math.max(0, value)), most = Math.max(...flat) || 1;
  const small = document.createElement("canvas");
  [small.width, small.height] = [columns, rows];
  const pixels = new ImageData(columns, rows);
  flat.forEach((value, n) => pixels.data.set(colour(value / most), 4 * n));
  small.getContext("2d").putImageData(pixels, 0, 0);
  [canvas.width, canvas.height] = [photo.naturalWidth, photo.naturalHeight];
  const side = Math.min(canvas.width, canvas.height), context = canvas.getContext("2d");
  const [wide, high] = resize === "crop" ? [side, side] : [canvas.width, canvas.height];
  context.imageSmoothingQuality = "high";
  context.drawImage(small, (canvas.width - wide) / 2, (canvas.height - high) / 2, wide, high);
  canvas.hidden = false;
}

// Dark blue over red to yellow; little attention darkens the photograph.
function colour(value) {
  const stops = [[10, 14, 50], [120, 25, 110], [230, 80, 50], [255, 235, 90]];
  const at = Math.min(2.999, 3 * value), n = Math.floor(at), part = at - n;
  return [...[0, 1, 2].map((k) => stops[n][k] + part * (stops[n + 1][k] - stops[n][k])), 165 - 40 * value];
}

function hideMap() {
  $("heat").hidden = true;
}

for (const id of ["which", "layer", "query"]) $(id).addEventListener("input", showMap);
$("no-map").addEventListener("click", hideMap);

// -- search --------------------------------------------------------------------------------------------

onSubmit("search-form", async () => {
  const text = $("wanted").value.trim(), image = $("like").checked ? state.photo : null;
  if (!text && !image) throw new Error("Say what to look for, or search by the photograph.");
  const found = await ask("/search", { text, image, k: 24, rerank: $("rerank").checked ? 16 : 0 });
  $("found").textContent = `${found.hits.length} of ${found.images} images, best first`;
  for (const old of $("hits").querySelectorAll("img")) URL.revokeObjectURL(old.src);
  $("hits").replaceChildren(...found.hits.map(hitFigure));
});

function hitFigure(hit) {
  const line = document.createElement("li"), figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  caption.textContent = hit.captions[0] ?? hit.name;
  if (hit.thumbnail) {
    const picture = document.createElement("img");
    picture.alt = hit.captions[0] ?? `Found photograph ${hit.name}`;
    request(hit.thumbnail)
      .then((answer) => answer.blob())
      .then((blob) => (picture.src = URL.createObjectURL(blob)))
      .catch(() => (caption.textContent += " (cannot be shown)"));
    figure.append(picture);
  } else {
    const none = document.createElement("div");
    none.className = "none";
    none.textContent = hit.state;
    figure.append(none);
  }
  figure.append(caption);
  line.append(figure);
  return line;
}

// -- start ---------------------------------------------------------------------------------------------

onSubmit("key-form", async () => {
  state.key = $("key").value;
  await start();
  sessionStorage.setItem("blip2-key", state.key);
  $("key-form").hidden = true;
});

async function start() {
  const { data } = await (await request("/v1/models")).json();
  const { id, blip2: can } = data[0];
  $("model").textContent = id;
  document.title = `${id} - blip2`;
  $("ask-section").hidden = !can.ask;
  $("attend-section").hidden = !can.attend;
  $("text-field").hidden = !can.match;
  $("search-section").hidden = can.indexed_images === null;
  $("indexed").textContent = can.indexed_images === null ? "" : `in ${can.indexed_images} images`;
}

start().catch((error) => say(error.message));
