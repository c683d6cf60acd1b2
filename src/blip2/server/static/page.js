"use strict";
// The page of `blip2 serve`: plain DOM, text only ever set as text, requests to this server only.

const $ = (id) => document.getElementById(id);
const KEPT = ["image/jpeg", "image/png", "image/webp"];
const LARGEST = 1600, AS_IT_IS = 2 << 20;
const narrow = matchMedia("(max-width: 760px)"); // as in page.css
const state = { image: null, turns: new Map(), attention: new Map(), models: [], key: sessionStorage.getItem("blip2-key") };

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
  const error = await answer.json().catch(() => null);
  throw new Error(error?.error?.message ?? `The server answered ${answer.status}.`);
}

const ask = async (path, fields) => {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) if (value !== null && value !== "") form.append(name, value);
  return (await request(path, form)).json();
};

// The models that answer, of those that can: the chosen one, or all side by side.
function chosen(can = () => true) {
  const wanted = $("chosen").value;
  return state.models.filter((model) => can(model.blip2) && (!wanted || wanted === model.id)).map((model) => model.id);
}

// One answer per model, by name; the requests are made at the same time.
async function askEach(names, path, fields) {
  if (!names.length) throw new Error("This model cannot do that: choose another.");
  const answers = await Promise.all(names.map((model) => ask(path, { ...fields(model), model })));
  return new Map(names.map((name, n) => [name, answers[n]]));
}

function heading(parent, name) {
  const made = document.createElement("h3");
  made.textContent = name;
  parent.append(made);
}

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

// -- the image -------------------------------------------------------------------------------------

// Large images, and what the server does not take (other types, a film behind the image), are encoded again here.
async function prepared(file) {
  const [a, b] = new Uint8Array(await file.slice(-2).arrayBuffer());
  const complete = file.type !== "image/jpeg" || (a === 0xff && b === 0xd9);
  if (KEPT.includes(file.type) && file.size <= AS_IT_IS && complete) return file;
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (!bitmap) throw new Error("This browser cannot read that image: choose a JPEG, PNG or WebP.");
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
    state.image = await prepared(file);
  } catch (error) {
    say(error.message);
    return;
  }
  URL.revokeObjectURL($("image").src);
  $("image").src = URL.createObjectURL(state.image);
  $("image").alt = "The image you chose; its caption is being written";
  $("frame").hidden = false;
  $("pick-text").textContent = "Another image";
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
  const image = state.image, wanted = $("chosen").value;
  const answers = await askEach(chosen(), "/caption", () => ({ image, num: $("num").value }));
  if (image !== state.image || wanted !== $("chosen").value) return;
  $("captions").replaceChildren();
  for (const [name, answer] of answers) {
    const list = answers.size > 1 ? item($("captions"), "") : $("captions");
    if (answers.size > 1) heading(list, name);
    for (const { text, score, similarity } of answer.captions) {
      const line = answers.size > 1 ? list.appendChild(document.createElement("div")) : item(list, "");
      line.textContent = text;
      if (similarity !== null && answer.captions.length > 1) {
        const part = document.createElement("span");
        part.className = "soft small";
        part.textContent = score === null ? `  similarity ${similarity.toFixed(2)}` : `  fits ${(100 * score).toFixed(0)} %`;
        line.append(part);
      }
    }
  }
  const [first] = answers.values();
  $("image").alt = first.captions[0].text || "The image you chose";
});

function forget() {
  state.turns = new Map();
  $("talk").replaceChildren();
  $("forget").hidden = true;
}

onSubmit("ask-form", async () => {
  const question = $("question").value.trim();
  if (!question) return;
  const turns = state.turns;
  const before = (name) => JSON.stringify(turns.get(name) ?? []);
  const fields = (name) => ({ image: state.image, question, history: before(name), max_tokens: 30 });
  const answers = await askEach(chosen((can) => can.ask), "/ask", fields);
  if (turns !== state.turns) return;
  const line = item($("talk"), "");
  const say = (className, text) => {
    const part = document.createElement("div");
    part.className = className;
    part.textContent = text;
    line.append(part);
  };
  say("question", question);
  for (const [name, { answer }] of answers) {
    turns.set(name, [...(turns.get(name) ?? []), { question, answer }]);
    if (answers.size > 1) heading(line, name);
    say("answer", answer || "(no answer)");
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
  const text = $("text").value, able = (can) => can.attend && (can.match || !text.trim());
  const image = state.image;
  const answers = await askEach(chosen(able), "/attend", () => ({ image, text }));
  if (image !== state.image) return;
  state.attention = answers;
  const all = [...answers.values()], [first] = all;
  const choices = [];
  if (first.itm_map) choices.push(["itm_map", "What the match depends on (ITM)"]);
  if (first.itc_map) choices.push(["itc_map", "What the similarity depends on (ITC)"]);
  choices.push(["queries", "One query, one layer"]);
  const words = all.length === 1 ? first.words ?? [] : []; // models write different ones
  words.forEach((word, n) => choices.push([`word-${n}`, `While writing “${word.trim()}”`]));
  fill("which", choices);
  const layers = Math.min(...all.map((each) => each.layers.length));
  fill("layer", first.layers.slice(0, layers).map((layer, n) => [n, layer]));
  $("layer").value = layers - 1;
  $("query").max = Math.min(...all.map((each) => each.queries[0].length)) - 1;
  $("query").value = first.winner ?? 0;
  $("scores").textContent = [...answers].map(([name, answer]) => scoreLine(name, answer, answers.size > 1)).join("\n");
  $("maps").hidden = false;
  showMap();
});

function scoreLine(name, answer, named) {
  const parts = named ? [`${name}:`] : [];
  if (answer.itm !== null) parts.push(`Belong together: ${(100 * answer.itm).toFixed(0)} %.`);
  if (answer.winner !== null) parts.push(`Query ${answer.winner} is nearest to the text.`);
  if (answer.caption) parts.push(`Caption: ${answer.caption}`);
  return parts.join(" ");
}

function fill(id, choices) {
  $(id).replaceChildren(...choices.map(([value, text]) => new Option(text, value)));
}

function chosenMap(answer) {
  const which = $("which").value;
  if (which === "queries") return answer.queries[$("layer").value][$("query").value];
  return which.startsWith("word-") ? answer.word_maps[which.slice(5)] : answer[which];
}

// On the image; on copies of it, side by side, for several models, and where the image is out of sight.
function showMap() {
  $("query-fields").hidden = $("which").value !== "queries";
  $("query-number").textContent = $("query").value;
  const [first] = state.attention.values(), apart = state.attention.size > 1 || narrow.matches;
  $("side").hidden = !apart;
  $("heatmap").hidden = apart;
  if (!apart) draw($("heatmap"), chosenMap(first), first.resize);
  else $("side").replaceChildren(...[...state.attention].map(([name, each]) => mapFigure(name, each)));
}

function mapFigure(name, answer) {
  const figure = document.createElement("figure"), frame = document.createElement("div");
  const copy = document.createElement("img"), canvas = document.createElement("canvas");
  const caption = document.createElement("figcaption");
  frame.className = "frame";
  copy.src = $("image").src;
  copy.alt = `Map of ${name} over the image`;
  caption.textContent = name;
  draw(canvas, chosenMap(answer), answer.resize);
  frame.append(copy, canvas);
  figure.append(frame);
  if (state.attention.size > 1) figure.append(caption);
  return figure;
}

// The map over the part of the image that the model saw: all of it, or its centre.
function draw(canvas, map, resize) {
  const image = $("image"), [rows, columns] = [map.length, map[0].length];
  const flat = map.flat().map((value) => Math.max(0, value)), most = Math.max(...flat) || 1;
  const small = document.createElement("canvas");
  [small.width, small.height] = [columns, rows];
  const pixels = new ImageData(columns, rows);
  flat.forEach((value, n) => pixels.data.set(colour(value / most), 4 * n));
  small.getContext("2d").putImageData(pixels, 0, 0);
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const side = Math.min(canvas.width, canvas.height), context = canvas.getContext("2d");
  const [wide, high] = resize === "crop" ? [side, side] : [canvas.width, canvas.height];
  context.imageSmoothingQuality = "high";
  context.drawImage(small, (canvas.width - wide) / 2, (canvas.height - high) / 2, wide, high);
}

// Dark blue over red to yellow; little attention darkens the image.
function colour(value) {
  const stops = [[10, 14, 50], [120, 25, 110], [230, 80, 50], [255, 235, 90]];
  const at = Math.min(2.999, 3 * value), n = Math.floor(at), part = at - n;
  return [...[0, 1, 2].map((k) => stops[n][k] + part * (stops[n + 1][k] - stops[n][k])), 165 - 40 * value];
}

function hideMap() {
  $("heatmap").hidden = $("side").hidden = true;
}

for (const id of ["which", "layer", "query"]) $(id).addEventListener("input", showMap);
narrow.addEventListener("change", () => {
  if (!$("heatmap").hidden || !$("side").hidden) showMap();
});
$("no-map").addEventListener("click", hideMap);

// -- search --------------------------------------------------------------------------------------------

onSubmit("search-form", async () => {
  const text = $("wanted").value.trim(), image = $("like").checked ? state.image : null;
  if (!text && !image) throw new Error("Say what to look for, or search by the image.");
  const result = await ask("/search", { text, image, k: 24, rerank: $("rerank").checked ? 16 : 0 });
  $("count").textContent = `${result.hits.length} of ${result.images} images, best first`;
  for (const old of $("hits").querySelectorAll("img")) URL.revokeObjectURL(old.src);
  $("hits").replaceChildren(...result.hits.map(hitFigure));
});

function hitFigure(hit) {
  const line = document.createElement("li"), figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  caption.textContent = hit.captions[0] ?? hit.name;
  if (hit.thumbnail) {
    const thumbnail = document.createElement("img");
    thumbnail.alt = hit.captions[0] ?? `Image ${hit.name}`;
    request(hit.thumbnail)
      .then((answer) => answer.blob())
      .then((blob) => (thumbnail.src = URL.createObjectURL(blob)))
      .catch(() => (caption.textContent += " (cannot be shown)"));
    figure.append(thumbnail);
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

$("chosen").addEventListener("change", () => {
  forget();
  hideMap();
  $("maps").hidden = true;
  if (state.image) $("caption-form").requestSubmit();
});

// -- start ---------------------------------------------------------------------------------------------

onSubmit("key-form", async () => {
  state.key = $("key").value;
  await start();
  sessionStorage.setItem("blip2-key", state.key);
  $("key-form").hidden = true;
});

async function start() {
  const { data } = await (await request("/v1/models")).json();
  state.models = data;
  const names = data.map((model) => model.id), any = (what) => data.some((model) => model.blip2[what]);
  $("model").textContent = names.join(", ");
  document.title = `${names.join(", ")} - blip2`;
  $("models").hidden = data.length === 1;
  fill("chosen", data.length === 1 ? [["", names[0]]] : [["", "All, side by side"], ...names.map((name) => [name, name])]);
  $("ask-section").hidden = !any("ask");
  $("attend-section").hidden = !any("attend");
  $("text-field").hidden = !any("match");
  $("again").hidden = !any("judge");
  const indexed = data.map((model) => model.blip2.indexed_images).find((count) => count !== null);
  $("search-section").hidden = indexed === undefined;
  $("indexed").textContent = indexed === undefined ? "" : `in ${indexed} images`;
}

start().catch((error) => say(error.message));
