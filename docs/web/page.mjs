// The page: pictures in; masks, counts and files out. `make web` puts the model and the runtime beside it.
import { area, encode, paste, tint } from "./masks.mjs";

const element = (id) => document.getElementById(id);
const [status, threshold, canvas] = ["status", "threshold", "canvas"].map(element);
const SHOWN = 0.5; // objects that score less are not shown at first
let facts; // what the model's file says of itself
let shown; // the last picture with all objects found in it

await takeOver();
const worker = new Worker("worker.mjs", { type: "module" });
const waiting = new Map();
worker.onmessage = ({ data }) => {
  waiting.get(data.id)(data);
  waiting.delete(data.id);
};
worker.onerror = () => say(element("model"), "The runtime did not load; `make web` puts it beside the page.", true);

addEventListener("dragover", (event) => hover(event, true));
addEventListener("dragleave", (event) => hover(event, false));
addEventListener("drop", (event) => {
  hover(event, false);
  take(event.dataTransfer.files[0]);
});
element("file").addEventListener("change", (event) => take(event.target.files[0]));
threshold.addEventListener("input", draw);
element("png").addEventListener("click", () => canvas.toBlob((blob) => save(blob, "png")));
element("coco").addEventListener("click", () => save(new Blob([JSON.stringify(coco())]), "json"));
await Promise.all([loadModel(), listPictures()]);
document.body.dataset.ready = ""; // all that the page needs without a network is here

/** Let the service worker answer for this page, so that all it loads is kept; without one the page works online. */
async function takeOver() {
  if (!navigator.serviceWorker) return;
  try {
    await navigator.serviceWorker.register("sw.js");
    await navigator.serviceWorker.ready;
  } catch {
    return; // a browser that keeps nothing, such as in a private window
  }
  // What was loaded before the service worker came is neither kept nor isolated. Once: some frames are never isolated.
  if ((!navigator.serviceWorker.controller || !crossOriginIsolated) && !sessionStorage.getItem("reloaded")) {
    sessionStorage.setItem("reloaded", "yes");
    addEventListener("pageshow", ({ persisted }) => persisted && location.reload()); // if the browser brings it back
    location.reload();
    await new Promise(() => {});
  }
}

function ask(message, moved) {
  return new Promise((resolve, reject) => {
    const id = crypto.randomUUID();
    waiting.set(id, (answer) => (answer.error ? reject(new Error(answer.error)) : resolve(answer)));
    worker.postMessage({ id, ...message }, moved);
  });
}

async function loadModel() {
  try {
    const response = await fetch("model.onnx");
    if (!response.ok) throw new Error("There is no model beside this page; `make web` makes it. You can drop one.");
    const total = Number(response.headers.get("Content-Length"));
    const parts = [];
    let loaded = 0;
    for await (const part of chunks(response.body)) {
      parts.push(part);
      loaded += part.length;
      if (total) element("progress").value = Math.min(loaded / total, 1);
    }
    await open("model.onnx", await new Blob(parts).arrayBuffer());
  } catch (error) {
    say(element("model"), error.message, true);
  }
  element("progress").hidden = true;
}

async function* chunks(stream) {
  const reader = stream.getReader();
  for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read()) yield value;
}

async function open(name, file) {
  ({ facts } = await ask({ file }, [file]));
  // Whole hundredths, since a slider's values are steps from its least.
  threshold.min = Math.floor(100 * facts.scoreThreshold) / 100;
  threshold.value = Math.max(SHOWN, threshold.min);
  shown = undefined;
  element("result").hidden = true;
  const kinds = facts.categories.length > 3 ? `${facts.categories.length} categories` : facts.categories.join(", ");
  say(element("model"), `Model: ${name} finds ${kinds}.`);
}

async function listPictures() {
  const response = await fetch("pictures.txt");
  if (!response.ok) return;
  const loaded = [];
  for (const name of (await response.text()).split("\n").filter(Boolean)) {
    const button = document.createElement("button");
    const image = new Image();
    [image.src, image.alt] = [`pictures/${name}`, name];
    loaded.push(image.decode());
    button.append(image);
    button.addEventListener("click", async () => take(new File([await (await fetch(image.src)).blob()], name)));
    element("pictures").append(button);
  }
  await Promise.all(loaded);
}

function hover(event, over) {
  event.preventDefault();
  element("drop").classList.toggle("over", over);
}

/** Show what is found in a picture, or use a file as the model. */
async function take(file) {
  if (!file) return;
  say(status, `Looking at ${file.name}.`);
  try {
    if (file.name.endsWith(".onnx")) {
      await open(file.name, await file.arrayBuffer());
      say(status, "");
      return;
    }
    if (!facts) throw new Error("The model is not here yet; try again once it is.");
    const picture = await read(file);
    const { found, seconds } = await ask({ rgba: picture.data, width: picture.width, height: picture.height });
    shown = { name: file.name, picture, seconds, objects: objectsOf(found, picture) };
    draw();
  } catch (error) {
    say(status, `${file.name}: ${error.message}`, true);
  }
}

async function read(file) {
  let bitmap;
  try {
    // As the model was trained: values as they are stored, upright.
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    throw new Error("this browser can't read it as a picture.");
  }
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height);
}

function objectsOf({ boxes, scores, labels, masks, side }, { width, height }) {
  return Array.from(scores, (score, n) => {
    const box = Array.from(boxes.subarray(4 * n, 4 * n + 4));
    const own = masks?.subarray(n * side * side, (n + 1) * side * side);
    return { box, score, label: labels[n], mask: paste(own, side, box, width, height), hasMask: Boolean(own) };
  });
}

const chosen = () => shown.objects.filter((object) => object.score >= Number(threshold.value));

function draw() {
  element("score").value = Number(threshold.value).toFixed(2);
  if (!shown) return;
  const { picture, seconds } = shown;
  const objects = chosen();
  const data = new Uint8ClampedArray(picture.data);
  // The surest last, on top. Neighbors in this order get unlike colors: steps of the golden angle.
  for (let n = objects.length; n-- > 0; ) tint(data, picture.width, objects[n].mask, color(n * 137.5));
  [canvas.width, canvas.height] = [picture.width, picture.height];
  canvas.style.width = `${Math.max(picture.width, 640)}px`;
  canvas.getContext("2d").putImageData(new ImageData(data, picture.width), 0, 0);
  element("result").hidden = false;
  say(status, `${count(objects)} in ${shown.name}, found in ${seconds.toFixed(1)} s`);
}

function count(objects) {
  const [only] = facts.categories;
  const kind = facts.categories.length === 1 ? ` (${only})` : "";
  return `${objects.length} object${objects.length === 1 ? "" : "s"}${kind}`;
}

/** Red, green and blue of a hue in degrees, bright on dark and on light pictures. */
function color(hue) {
  return [0, 8, 4].map((shift) => {
    const k = (shift + hue / 30) % 12;
    return Math.round(255 * (0.55 - 0.45 * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  });
}

function coco() {
  const { width, height } = shown.picture;
  const annotations = chosen().map(({ box: [x0, y0, x1, y1], score, label, mask, hasMask }, n) => ({
    id: n + 1,
    image_id: 1,
    category_id: facts.categoryIds[label],
    bbox: [x0, y0, x1 - x0, y1 - y0],
    score,
    ...(hasMask && { segmentation: encode(mask, width, height) }),
    area: hasMask ? area(mask) : (x1 - x0) * (y1 - y0),
    iscrowd: 0,
  }));
  return {
    images: [{ id: 1, file_name: shown.name, height, width }],
    categories: facts.categories.map((name, label) => ({ id: facts.categoryIds[label], name })),
    annotations,
  };
}

function save(blob, end) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${shown.name.replace(/\.[^.]*$/, "")}_objects.${end}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function say(where, text, error = false) {
  where.textContent = text;
  where.classList.toggle("error", error);
}
