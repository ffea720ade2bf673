// The methods of a combined run side by side, and the images that belong to no cluster.

function showNoise(view) {
  const rows = members.get(NOISE), total = figures(NOISE).size;
  page(view, "Noise", `${count(total, "image")} without a cluster${rows.length < total ? `, ${rows.length.toLocaleString("en")} of them here: a uniform sample` : ""}. `
    + "The caption names the cluster that the classifier would give.",
    grid(rows, {caption: (row) => (COLUMNS.second[row] >= 0 ? nameOf(resolve(COLUMNS.second[row])) : "")}));
}

const METHOD_COLUMNS = [
  ["num_clusters", "clusters"], ["num_noise", "noise"], ["generalization", "generalisation"], ["silhouette_pca", "silhouette"],
  ["silhouette_umap", "silhouette (UMAP)"], ["acc", "ACC"], ["nmi", "NMI"], ["ari", "ARI"],
];

function showMethods(view) {
  const {rows, nmi} = CORE.methods;
  const columns = METHOD_COLUMNS.filter(([key]) => rows.some((row) => key in row));
  const shown = (value) => (value === null || value === undefined ? "–" : Number.isInteger(value) ? value.toLocaleString("en") : value.toFixed(3));
  page(view, "Methods", "The consensus, and of each method the clustering with its lowest loss, over the images that were trained on. "
    + "The scores before ACC need no labels. The map can be coloured by each.",
    table(["method", ...columns.map(([, text]) => text)], rows.map((row) => [row.name, ...columns.map(([key]) => shown(row[key]))])),
    el("h3", {}, "How much they agree"),
    el("p", {className: "soft"}, "Normalised mutual information between each two: 1 means the same clusters."),
    matrix(rows.map((row) => row.name), rows.map((row) => row.name), nmi, (value) => value.toFixed(2), 1));
}

/** A table of numbers whose cells are the darker, the nearer they are to `most`. */
function matrix(names, heads, values, content, most) {
  const cell = (value, i, j) => {
    const td = el("td", {}, content(value, i, j));
    if (value) td.style.background = `color-mix(in srgb, var(--accent) ${Math.round((70 * value) / most)}%, transparent)`;
    return td;
  };
  return el("div", {className: "scroll"}, el("table", {className: "matrix"},
    el("thead", {}, el("tr", {}, el("th"), ...heads.map((name) => el("th", {title: name}, name)))),
    el("tbody", {}, ...values.map((row, i) => el("tr", {}, el("th", {}, names[i]), ...row.map((value, j) => cell(value, i, j)))))));
}
