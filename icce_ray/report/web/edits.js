// The list of corrections, and saving them.

function showEdits(view) {
  const line = (text, undo) => [text, el("button", {onclick: () => { undo(); edited(); }}, "Undo")];
  const rows = [];
  for (const [cluster, name] of Object.entries(edits.names)) {
    rows.push(line(`Cluster ${cluster} is called “${name}”`, () => delete edits.names[cluster]));
  }
  for (const [cluster, into] of Object.entries(edits.merged)) {
    rows.push(line(`Cluster ${cluster} is merged into ${nameOf(resolve(into))}`, () => delete edits.merged[cluster]));
  }
  for (const cluster of edits.added) {
    const number = Object.values(edits.moved).filter((moved) => moved.cluster === cluster).length;
    rows.push(line(`${nameOf(cluster)} is new: ${count(number, "image")} split off`, () => removeAdded(cluster)));
  }
  for (const [row, {uri, cluster}] of Object.entries(edits.moved).slice(0, 500)) {
    const what = cluster === null ? "is dropped" : `moves to ${nameOf(resolve(cluster))}`;
    rows.push(line(`${uri} ${what}`, () => delete edits.moved[row]));
  }
  if (edits.earlier.length) {
    rows.push(line(`${count(edits.earlier.length, "image")} moved or dropped before`, () => (edits.earlier = [])));
  }
  const problem = el("p", {className: "problem", role: "alert"});
  page(view, "Corrections", rows.length
    ? "They are kept in this browser. Save them, and let the run take them over:"
    : "None yet. Open a cluster to name or merge it; select images to move, split off or drop them. Corrections are kept in this browser until you save them.",
    rows.length ? el("pre", {}, `icce-ray apply ${quoted(CORE.output)} corrections.json`) : null,
    el("div", {className: "controls"},
      el("button", {className: "primary", disabled: !rows.length, onclick: saveEdits}, "Save corrections.json"),
      el("label", {className: "button"}, "Load …", el("input", {type: "file", accept: ".json", hidden: true, onchange: async (event) => {
        try {
          await fromFile(JSON.parse(await event.target.files[0].text()));
        } catch (error) {
          problem.textContent = `${event.target.files[0].name} cannot be used: ${error.message}`;
        }
      }})),
      el("button", {disabled: !rows.length, onclick: () => { if (confirm("Forget all corrections?")) { Object.assign(edits, {names: {}, merged: {}, added: [], moved: {}, earlier: []}); edited(); } }}, "Forget all")),
    problem,
    rows.length ? table(["correction", ""], rows) : null);
}

const quoted = (text) => (/^[\w./:@-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

function removeAdded(cluster) {
  edits.added = edits.added.filter((other) => other !== cluster);
  delete edits.names[cluster];
  edits.earlier = edits.earlier.filter((image) => image.cluster !== cluster);
  for (const [row, moved] of Object.entries(edits.moved)) if (moved.cluster === cluster) delete edits.moved[row];
  for (const [other, into] of Object.entries(edits.merged)) {
    if (into === cluster || Number(other) === cluster) delete edits.merged[other];
  }
}

function saveEdits() {
  const text = JSON.stringify(toFile(), null, 1);
  const address = URL.createObjectURL(new Blob([text], {type: "application/json"}));
  el("a", {href: address, download: "corrections.json"}).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}
