// Masks: from probabilities inside boxes to pixels of the picture, as run lengths, and as color.

/**
 * The pixels of an object. A pixel center at x lies at column (x - x0) / (x1 - x0) * side - 0.5 of the probabilities,
 * with linear interpolation between columns and the outermost column beyond them; rows likewise.
 * Without probabilities the whole box belongs to the object.
 */
export function paste(probabilities, side, [x0, y0, x1, y1], width, height) {
  const columns = samples(x0, x1, width, side);
  const rows = samples(y0, y1, height, side);
  const pixels = new Uint8Array(columns.length * rows.length);
  rows.forEach((row, y) => {
    columns.forEach((column, x) => {
      if (!probabilities) {
        pixels[y * columns.length + x] = 1;
        return;
      }
      const at = (r, c) => probabilities[r * side + c];
      const top = mix(at(row.low, column.low), at(row.low, column.high), column.part);
      const bottom = mix(at(row.high, column.low), at(row.high, column.high), column.part);
      pixels[y * columns.length + x] = mix(top, bottom, row.part) > 0.5 ? 1 : 0;
    });
  });
  return { left: first(x0), top: first(y0), width: columns.length, height: rows.length, pixels };
}

const mix = (a, b, part) => a + (b - a) * part;
const first = (start) => Math.max(Math.ceil(start - 0.5), 0);

function samples(start, stop, limit, side) {
  const found = [];
  for (let pixel = first(start); pixel < Math.min(Math.ceil(stop - 0.5), limit); pixel++) {
    const exact = ((pixel + 0.5 - start) / (stop - start)) * side - 0.5;
    const position = Math.min(Math.max(exact, 0), side - 1);
    const low = Math.floor(position);
    found.push({ low, high: Math.min(low + 1, side - 1), part: position - low });
  }
  return found;
}

/** Number of pixels of a mask. */
export const area = (mask) => mask.pixels.reduce((sum, pixel) => sum + pixel, 0);

/** COCO's compressed run lengths of a mask: down the columns of the whole picture, each told by the one two before. */
export function encode(mask, width, height) {
  const runs = [];
  let value = 0;
  let start = 0;
  const turn = (to, at) => {
    if (to === value) return;
    runs.push(at - start);
    [value, start] = [to, at];
  };
  for (let x = 0; x < mask.width; x++) {
    const top = (mask.left + x) * height + mask.top;
    for (let y = 0; y < mask.height; y++) turn(mask.pixels[y * mask.width + x], top + y);
    if (mask.height < height) turn(0, top + mask.height);
  }
  turn(0, (mask.left + mask.width) * height);
  if (width * height > start) runs.push(width * height - start);
  let counts = "";
  runs.forEach((run, i) => {
    let rest = i > 2 ? run - runs[i - 2] : run;
    for (let more = true; more; ) {
      // Five bits a letter, least first; 32 says that another follows.
      const bits = rest & 31;
      rest >>= 5;
      more = bits & 16 ? rest !== -1 : rest !== 0;
      counts += String.fromCharCode(48 + bits + (more ? 32 : 0));
    }
  });
  return { size: [height, width], counts };
}

/** Color a mask's pixels in RGBA `data` of a picture: its outline fully, its inside by half. */
export function tint(data, width, mask, [red, green, blue]) {
  const inside = (x, y) => x >= 0 && y >= 0 && x < mask.width && y < mask.height && mask.pixels[y * mask.width + x];
  for (let y = 0; y < mask.height; y++) {
    for (let x = 0; x < mask.width; x++) {
      if (!inside(x, y)) continue;
      const inner = inside(x - 1, y) && inside(x + 1, y) && inside(x, y - 1) && inside(x, y + 1);
      const part = inner ? 0.4 : 1;
      const at = 4 * ((mask.top + y) * width + mask.left + x);
      [red, green, blue].forEach((color, channel) => (data[at + channel] = mix(data[at + channel], color, part)));
    }
  }
}
