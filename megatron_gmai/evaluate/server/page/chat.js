// The conversation as OpenAI's messages; images are data URLs of what the page shows.
const messages = [];
// Images of the next question: {file, url, range, low, high}.
const waiting = [];
const $ = (id) => document.getElementById(id);
let model = "";
let talk = new AbortController(); // of this conversation's answers; each one has its own
let busy = 0; // previews and answers under way; a question without its images must not be sent

async function whileBusy(work) {
  busy += 1;
  $("send").disabled = true;
  try {
    await work();
  } finally {
    busy -= 1;
    $("send").disabled = busy > 0;
  }
}

function headers(type) {
  const key = sessionStorage.getItem("key");
  return { "Content-Type": type, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

// Asks for the key once when the server wants one.
async function ask(path, options) {
  const answer = await fetch(path, options());
  if (answer.status !== 401) return answer;
  $("ask").showModal();
  await new Promise((done) => $("ask").addEventListener("close", done, { once: true }));
  sessionStorage.setItem("key", $("key").value);
  return fetch(path, options());
}

async function checked(answer) {
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  throw new Error(told?.error?.message ?? `the server says ${answer.status}`);
}

async function preview(image) {
  const moved = !image.moved ? "" : `?low=${image.low}&high=${image.high}`;
  const type = "application/octet-stream";
  const answer = await checked(
    await ask(`/preview${moved}`, () => ({ method: "POST", headers: headers(type), body: image.file })),
  );
  const told = await answer.json();
  image.url = told.image;
  image.range = told.range;
  [image.low, image.high] = told.window ?? [];
}

async function add(files) {
  await whileBusy(async () => {
    for (const file of files) {
      const image = { file };
      try {
        await preview(image);
        waiting.push(image);
      } catch (error) {
        problem(`${file.name ?? "image"}: ${error.message}`);
      }
    }
    showWaiting();
  });
}

function slider(image, end, picture) {
  const label = document.createElement("label");
  const input = document.createElement("input");
  const [low, high] = image.range;
  Object.assign(input, { type: "range", min: low, max: high, step: (high - low) / 200 });
  input.value = image[end];
  input.addEventListener("change", async () => {
    image[end] = Number(input.value);
    image.moved = true;
    try {
      await whileBusy(() => preview(image));
      picture.src = image.url;
      problem("");
    } catch (error) {
      problem(error.message);
    }
  });
  label.append(end, input);
  return label;
}

function showWaiting() {
  $("images").replaceChildren(
    ...waiting.map((image, place) => {
      const figure = document.createElement("figure");
      const picture = document.createElement("img");
      picture.src = image.url;
      picture.alt = `image ${place + 1} of the next question`;
      const remove = document.createElement("button");
      Object.assign(remove, { type: "button", textContent: "Remove" });
      remove.addEventListener("click", () => {
        waiting.splice(place, 1);
        showWaiting();
      });
      // Images of 16 bits: the window starts as in training and can be moved.
      const window = image.range ? ["low", "high"].map((end) => slider(image, end, picture)) : [];
      figure.append(picture, ...window, remove);
      return figure;
    }),
  );
}

function turn(role, text, urls = []) {
  const element = document.createElement("div");
  element.className = `turn ${role}`;
  for (const [place, url] of urls.entries()) {
    const picture = document.createElement("img");
    Object.assign(picture, { src: url, alt: `image ${place + 1}` });
    element.append(picture);
  }
  const words = document.createTextNode(text);
  const paragraph = document.createElement("div");
  paragraph.append(words);
  element.append(paragraph);
  $("talk").append(element);
  showEnd();
  return { element, words };
}

// The form stays at the bottom and would hide an element that is scrolled to.
function showEnd() {
  window.scrollTo(0, document.body.scrollHeight);
}

function problem(text) {
  $("problem").textContent = text;
}

// Server-sent events: one JSON object after "data: " on each line.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const lines = text.split("\n");
    text = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function send() {
  const text = $("text").value.trim();
  if (!text || $("send").disabled) return;
  await whileBusy(() => askModel(text));
  $("text").focus();
}

async function askModel(text) {
  const own = talk;
  const images = waiting.splice(0);
  const urls = images.map((image) => image.url);
  const parts = urls.map((url) => ({ type: "image_url", image_url: { url } }));
  messages.push({ role: "user", content: [...parts, { type: "text", text }] });
  const asked = turn("user", text, urls);
  $("text").value = "";
  $("examples").hidden = true;
  problem("");
  showWaiting();
  const { element, words } = turn("assistant", "");
  element.classList.add("waiting");
  const body = JSON.stringify({ model, messages, stream: true, temperature: 0, max_tokens: 512 });
  const { signal } = own;
  const options = () => ({ method: "POST", headers: headers("application/json"), body, signal });
  try {
    const answer = await checked(await ask("/v1/chat/completions", options));
    for await (const event of events(answer)) {
      if (event.error) throw new Error(event.error.message);
      words.data += event.choices[0]?.delta?.content ?? "";
      showEnd();
    }
    words.data ||= "(no answer)";
    if (own === talk) messages.push({ role: "assistant", content: words.data });
  } catch (error) {
    if (own !== talk) return;
    // The question goes back to where it can be changed and sent again.
    problem(error.message);
    messages.pop();
    asked.element.remove();
    element.remove();
    $("text").value ||= text;
    waiting.unshift(...images);
    showWaiting();
  }
  element.classList.remove("waiting");
}

async function showExamples() {
  const names = await (await checked(await ask("/examples", () => ({ headers: headers("text/plain") })))).json();
  for (const name of names) {
    const path = `/examples/${encodeURIComponent(name)}`;
    const file = await (await checked(await ask(path, () => ({ headers: headers("text/plain") })))).blob();
    const image = { file };
    await preview(image);
    const button = document.createElement("button");
    Object.assign(button, { type: "button", title: name });
    const picture = document.createElement("img");
    Object.assign(picture, { src: image.url, alt: `example ${name}` });
    button.append(picture);
    button.addEventListener("click", () => add([file]));
    $("examples").append(button);
  }
  $("examples").hidden = names.length === 0;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
$("files").addEventListener("change", async (event) => {
  await add(event.target.files);
  event.target.value = "";
});
document.addEventListener("paste", (event) => add(event.clipboardData.files));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  add(event.dataTransfer.files);
});
$("again").addEventListener("click", () => {
  talk.abort();
  talk = new AbortController();
  messages.length = 0;
  problem("");
  $("talk").replaceChildren();
  $("examples").hidden = $("examples").children.length === 0;
});

fetch("/health")
  .then((answer) => answer.json())
  .then((told) => {
    model = told.model;
    $("model").textContent = model;
    return showExamples();
  })
  .catch((error) => problem(error.message));
