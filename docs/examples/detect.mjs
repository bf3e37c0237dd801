// An exported detector in Node, with nothing of this package: npm install onnxruntime-node pngjs
// node detect.mjs model.onnx image.png
import { readFileSync } from "node:fs";
import ort from "onnxruntime-node";
import { PNG } from "pngjs";

const [file, picture] = process.argv.slice(2);
const { width, height, data } = PNG.sync.read(readFileSync(picture)); // four bytes per pixel, row by row
const pixels = new Uint8Array(3 * height * width); // the input is uint8, RGB, channel by channel
for (let i = 0; i < height * width; i++) {
  for (let channel = 0; channel < 3; channel++) pixels[channel * height * width + i] = data[4 * i + channel];
}
const session = await ort.InferenceSession.create(file);
const images = new ort.Tensor("uint8", pixels, [1, 3, height, width]);
const { boxes, scores, labels, masks } = await session.run({ images });

// Masks are side x side probabilities, stretched over their boxes: a pixel center at x lies at column
// (x - x0) / (x1 - x0) * side - 0.5, and between columns the value is interpolated.
const side = masks ? masks.dims[1] : 0;
for (let n = 0; n < scores.data.length && scores.data[n] >= 0.5; n++) {
  const box = Array.from(boxes.data.slice(4 * n, 4 * n + 4), (edge) => edge.toFixed(1));
  let filled = 0;
  for (let i = 0; i < side * side; i++) if (masks.data[n * side * side + i] > 0.5) filled++;
  const part = side ? `, ${Math.round((100 * filled) / (side * side))} % of the box` : "";
  console.log(`label ${labels.data[n]}, score ${scores.data[n].toFixed(3)}, box ${box.join(" ")}${part}`);
}
