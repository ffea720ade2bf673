// Corrections, kept in the browser until they are saved as corrections.json, and the clusters as they are with them.
//
// Clusters keep their numbers: a merged cluster is empty afterwards, and clusters that are split off get the next
// numbers. So the order of corrections doesn't matter, and each can be taken back alone.

const STORAGE_KEY = `icce-ray ${CORE.page}`;
const BASE = new Map(CORE.clusters.map((cluster) => [cluster.cluster, cluster]));
const NOISE = -1;   // images without a cluster: those that the method left out, and those that were dropped

const edits = {
  names: {},    // name by cluster
  merged: {},   // cluster that a cluster was merged into
  added: [],    // clusters that were split off
  moved: {},    // {uri, id, cluster} by row; the cluster is null for an image that was dropped
  earlier: [],  // {uri, image_id, cluster}: images that were moved or dropped before, and are so on this page
};
let now;             // cluster of each image on the page with the corrections
let members;         // rows of each cluster and of the noise with the corrections, by number

function loadEdits() {
  if (CORE.applied) Object.assign(edits, clusterEdits(CORE.applied), {earlier: CORE.applied.images});
  try {
    Object.assign(edits, JSON.parse(localStorage.getItem(STORAGE_KEY) || "{}"));
  } catch { /* a browser without storage, or another program's entry */ }
  apply();
}

/** Take over a change of `edits`: keep it and show it. */
function edited() {
  try {
    localStorage.setItem(STORAGE_KEY, JSON.stringify(edits));
  } catch { /* full or forbidden: the corrections last until the page is closed */ }
  apply();
  document.dispatchEvent(new Event("edited"));
}

/** The cluster that `cluster` is part of after merges. */
function resolve(cluster) {
  const seen = new Set();
  while (edits.merged[cluster] !== undefined && !seen.has(cluster)) {
    seen.add(cluster);
    cluster = edits.merged[cluster];
  }
  return cluster;
}

function apply() {
  now = Int32Array.from(COLUMNS.cluster, (cluster) => cluster);
  for (const [row, {cluster}] of Object.entries(edits.moved)) now[row] = cluster ?? NOISE;
  members = new Map([NOISE, ...clusterNumbers()].map((cluster) => [cluster, []]));
  now.forEach((cluster, row) => {
    now[row] = resolve(cluster);
    members.get(now[row])?.push(row);
  });
}

/** The clusters that are left, largest first; those that were split off come last. */
function clusterNumbers() {
  const all = [...CORE.clusters.filter((cluster) => cluster.size).map((cluster) => cluster.cluster), ...edits.added];
  return [...new Set(all)].filter((cluster) => edits.merged[cluster] === undefined);
}

function numEdits() {
  return [edits.names, edits.merged, edits.moved].reduce((sum, part) => sum + Object.keys(part).length, 0)
    + edits.added.length + edits.earlier.length;
}

function nameOf(cluster) {
  if (cluster === NOISE) return "Noise";
  return edits.names[cluster] || `Cluster ${cluster}`;
}

/** Figures of a cluster with the corrections. Means are over the images it had before. */
function figures(cluster) {
  let size = cluster === NOISE ? CORE.counts.noise : 0, outliers = 0, votes = 0, probability = 0, weight = 0;
  for (const base of CORE.clusters) {
    if (resolve(base.cluster) !== cluster) continue;
    size += base.size;
    outliers += base.num_outliers;
    votes += (base.agreement ?? 0) * base.size;
    probability += (base.consensus_probability ?? 0) * base.size;
    weight += base.size;
  }
  for (const [row, moved] of Object.entries(edits.moved)) {
    if (resolve(COLUMNS.cluster[row]) === cluster) size--;
    if (resolve(moved.cluster ?? NOISE) === cluster) size++;
  }
  const mean = (sum) => (weight ? sum / weight : null);
  return {size, outliers, agreement: mean(votes), probability: mean(probability)};
}

function rename(cluster, name) {
  if (name.trim()) edits.names[cluster] = name.trim().slice(0, 200);
  else delete edits.names[cluster];
  edited();
}

function merge(cluster, into) {
  if (resolve(into) === cluster) return;
  edits.merged[cluster] = resolve(into);
  edited();
}

/** Move images to a cluster; null drops them. */
async function move(rows, cluster) {
  const moves = await Promise.all(rows.map(async (row) => [row, await details(row)]));
  for (const [row, {id, uri}] of moves) {
    if ((cluster ?? NOISE) === COLUMNS.cluster[row]) delete edits.moved[row];
    else edits.moved[row] = {uri, id, cluster};
  }
  edited();
}

/** A new cluster of some images. Returns its number. */
async function splitOff(rows) {
  const cluster = Math.max(CORE.made_for.num_clusters - 1, ...edits.added) + 1;
  edits.added.push(cluster);
  await move(rows, cluster);
  return cluster;
}

/** What corrections.json holds; `icce-ray apply` reads it. */
function toFile() {
  const clusters = new Map();
  const entry = (cluster) => {
    if (!clusters.has(cluster)) clusters.set(cluster, {cluster: Number(cluster)});
    return clusters.get(cluster);
  };
  for (const cluster of edits.added) entry(cluster).is_new = true;
  for (const [cluster, name] of Object.entries(edits.names)) entry(Number(cluster)).name = name;
  for (const cluster of Object.keys(edits.merged)) entry(Number(cluster)).merge_into = resolve(Number(cluster));
  const byUri = new Map(edits.earlier.map((image) => [image.uri, image]));
  for (const {uri, id, cluster} of Object.values(edits.moved)) byUri.set(uri, {uri, image_id: id, cluster});
  const images = [...byUri.values()].map(({uri, image_id: id, cluster}) => ({
    uri, image_id: id, cluster: cluster === null ? null : resolve(cluster),
  }));
  images.sort((a, b) => a.image_id - b.image_id);
  return {
    format: 1,
    made_for: CORE.made_for,
    clusters: [...clusters.values()].sort((a, b) => a.cluster - b.cluster),
    images,
  };
}

/** Names, merges and new clusters of a file, as the page keeps them. */
function clusterEdits(file) {
  const found = {names: {}, merged: {}, added: []};
  for (const {cluster, name, merge_into: into, is_new: isNew} of file.clusters) {
    if (isNew) found.added.push(cluster);
    if (name) found.names[cluster] = String(name);
    if (into !== undefined && into !== null) found.merged[cluster] = into;
  }
  return found;
}

/** Replace the corrections by those of a file. Throws if it belongs to another clustering. */
async function fromFile(file) {
  if (file?.format !== 1) throw new Error("this is not a corrections.json of this version");
  if (file.made_for?.consensus !== CORE.made_for.consensus) throw new Error("it was made for another clustering");
  const next = {...clusterEdits(file), moved: {}};
  const byUri = new Map(file.images.map((image) => [image.uri, image]));
  for (let first = 0; first < CORE.counts.shown; first += CORE.images.rows_per_file) {
    const {uris} = await load(fileOf(first));
    uris.forEach((uri, place) => {
      const image = byUri.get(uri);
      if (!image) return;
      next.moved[first + place] = {uri, id: image.image_id, cluster: image.cluster};
      byUri.delete(uri);
    });
  }
  next.earlier = [...byUri.values()];
  Object.assign(edits, next);
  edited();
}
