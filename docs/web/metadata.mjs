// What an exported file says of itself. ONNX Runtime doesn't hand a file's metadata to JavaScript, so they are read
// from the file: a protocol buffer whose field 14 holds pairs of a key (1) and a value (2).
const METADATA = 14;
const NAMES = ["categories", "category_ids", "input", "score_threshold"];

/** Categories, their ids, type of the input and least score of a file of `a2fpn export`; throws for other files. */
export function readMetadata(bytes) {
  const facts = {};
  try {
    for (const [field, entry] of fields(bytes)) {
      if (field !== METADATA) continue;
      const pair = Object.fromEntries(fields(entry));
      facts[text(pair[1])] = text(pair[2]);
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // no protocol buffer, so no names are found either
  }
  if (!NAMES.every((name) => name in facts)) throw new Error("`a2fpn export` did not make this file.");
  return {
    categories: JSON.parse(facts.categories),
    categoryIds: JSON.parse(facts.category_ids),
    input: facts.input,
    scoreThreshold: Number(facts.score_threshold),
  };
}

const text = (bytes) => new TextDecoder().decode(bytes);

/** Numbers and contents of the fields that have a length; the others are passed over. */
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    // Products instead of shifts: a weight's length may need more than 32 bits.
    let value = 0;
    for (let unit = 1; ; unit *= 128) {
      if (at >= bytes.length || unit > 2 ** 63) throw new RangeError("a number does not end");
      const byte = bytes[at++];
      value += (byte % 128) * unit;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const key = varint();
    const kind = key % 8;
    if (kind === 2) {
      const length = varint();
      if (at + length > bytes.length) throw new RangeError("a field is longer than the file");
      yield [Math.floor(key / 8), bytes.subarray(at, at + length)];
      at += length;
    } else if (kind === 0) varint();
    else if (kind === 1) at += 8;
    else if (kind === 5) at += 4;
    else throw new RangeError("no field of a protocol buffer");
  }
}
