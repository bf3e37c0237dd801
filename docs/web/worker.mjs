// Runs the model beside the page, which stays responsive.
import * as ort from "./ort.wasm.min.mjs";
import { readMetadata } from "./metadata.mjs";

let session;
let facts;

// One after the other: a picture that comes before the model waits for it.
let last = Promise.resolve();
onmessage = ({ data }) => {
  last = last.then(() => (data.file ? load(data) : detect(data))).catch((error) => {
    postMessage({ id: data.id, error: error instanceof Error ? error.message : String(error) });
  });
};

async function load({ id, file }) {
  const bytes = new Uint8Array(file);
  const read = readMetadata(bytes);
  const opened = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  await session?.release();
  [session, facts] = [opened, read];
  postMessage({ id, facts });
}

async function detect({ id, rgba, width, height }) {
  if (!session) throw new Error("There is no model to run.");
  const begin = performance.now();
  const size = width * height;
  const float = facts.input === "float32";
  const pixels = float ? new Float32Array(3 * size) : new Uint8Array(3 * size);
  for (let i = 0; i < size; i++) {
    for (let channel = 0; channel < 3; channel++) {
      const value = rgba[4 * i + channel];
      pixels[channel * size + i] = float ? value / 255 : value;
    }
  }
  const images = new ort.Tensor(facts.input, pixels, [1, 3, height, width]);
  const { boxes, scores, labels, masks } = await session.run({ images });
  const found = {
    boxes: boxes.data,
    scores: scores.data,
    labels: Array.from(labels.data, Number),
    masks: masks?.data,
    side: masks ? masks.dims[1] : 0,
  };
  postMessage({ id, found, seconds: (performance.now() - begin) / 1000 });
}
