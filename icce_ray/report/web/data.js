// The data of the page. A page that is opened from a disk may not fetch files, but it may load scripts: each data file
// calls receive() with its name and value. In a page that is a single file these calls stand in the page itself.

const INLINE_SHEETS = {};  // sheets of thumbnails as base64, in a page that is a single file
const TYPES = {int32: Int32Array, uint8: Uint8Array, uint16: Uint16Array, float32: Float32Array};
const COLUMNS = {};        // a typed array for each column of the images on the page
const UNKNOWN = 255;       // an unknown share; others are in 250ths

const received = new Map();
const requested = new Map();

function receive(name, value) {
  received.set(name, value);
}

/** The value of a data file. */
function load(name) {
  if (received.has(name)) return Promise.resolve(received.get(name));
  if (!requested.has(name)) {
    requested.set(name, new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = `${CORE.folder}/${name}.js`;
      script.onload = () => resolve(received.get(name));
      script.onerror = () => {
        requested.delete(name);
        reject(new Error(`${CORE.folder}/${name}.js is missing: keep that folder beside the page`));
      };
      document.head.append(script);
    }));
  }
  return requested.get(name);
}

/** An array from the base64 of its bytes. */
function unpack(text, type) {
  const characters = atob(text);
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return new TYPES[type](bytes.buffer);
}

async function loadColumns() {
  for (const [name, [type, text]] of Object.entries(await load("columns"))) COLUMNS[name] = unpack(text, type);
  COLUMNS.has_picture = unpack(CORE.images.has_picture, "uint8");
  received.delete("columns");
}

/** The clusters of each method of a combined run: -1 for noise, -2 for images that were not trained on. */
async function loadClusterings() {
  for (const [i, text] of (await load("clusterings")).entries()) COLUMNS[`clustering-${i}`] ??= unpack(text, "int32");
}

function fileOf(row) {
  return `rows-${String(Math.floor(row / CORE.images.rows_per_file)).padStart(5, "0")}`;
}

/** Id, path and most similar images of an image. */
async function details(row) {
  const file = await load(fileOf(row));
  if (typeof file.similar === "string") {
    file.similar = unpack(file.similar, "int32");
    file.cosine = unpack(file.cosine, "uint8");
  }
  const place = row % CORE.images.rows_per_file;
  const count = file.similar.length / file.ids.length;
  const similar = [];
  for (let i = place * count; i < (place + 1) * count; i++) {
    if (file.similar[i] >= 0) similar.push({row: file.similar[i], cosine: file.cosine[i] / 255});
  }
  return {id: file.ids[place], uri: file.uris[place], similar};
}

/** The images whose path holds `text`, at most `limit`. */
async function findPaths(text, limit) {
  const wanted = text.toLowerCase();
  const found = [];
  for (let first = 0; first < CORE.counts.shown; first += CORE.images.rows_per_file) {
    const {uris} = await load(fileOf(first));
    for (let place = 0; place < uris.length && found.length < limit; place++) {
      if (uris[place].toLowerCase().includes(wanted)) found.push(first + place);
    }
  }
  return found;
}
