// One image, large, with all that is known about it.

let viewed = {row: 0, rows: []};

function openViewer(row, rows) {
  viewed = {row, rows};
  document.getElementById("hover").hidden = true;
  showViewed();
  const dialog = document.getElementById("viewer");
  if (!dialog.open) dialog.showModal();
}

function step(by) {
  const place = viewed.rows.indexOf(viewed.row) + by;
  if (place < 0 || place >= viewed.rows.length) return;
  viewed.row = viewed.rows[place];
  showViewed();
}

/** The original as an address that a browser opens, if it is a file on this machine or on the web. */
function originalUrl(uri) {
  if (/^https?:\/\//.test(uri)) return uri;
  const path = uri.startsWith("file://") ? uri.slice(7) : uri;
  if (!path.startsWith("/") || /\.(tar|parquet|pq)#/i.test(path)) return null;
  return `file://${path.split("/").map(encodeURIComponent).join("/")}`;
}

const SHOWN_BY_BROWSERS = /\.(jpe?g|png|webp|gif|bmp|avif)$/i;

/** The original where a browser can show it, over the thumbnail. */
function largePicture(row, uri) {
  const holder = el("div", {className: "large"});
  if (COLUMNS.has_picture[row]) paint(holder, row);
  const address = originalUrl(uri);
  if (address && SHOWN_BY_BROWSERS.test(uri)) {
    const image = el("img", {alt: baseName(uri), src: address});
    image.addEventListener("error", () => image.remove());
    image.addEventListener("load", () => (holder.style.backgroundImage = "none"));
    holder.append(image);
  } else if (!COLUMNS.has_picture[row]) {
    holder.append(el("p", {className: "soft"}, "No picture: this row of features names no image."));
  }
  return holder;
}

async function showViewed() {
  const {row, rows} = viewed;
  const dialog = document.getElementById("viewer");
  const {id, uri, similar} = await details(row);
  if (row !== viewed.row) return;
  const place = rows.indexOf(row);
  const fact = (name, ...value) => [el("dt", {}, name), el("dd", {}, ...value)];
  const address = originalUrl(uri);
  const label = COLUMNS.label && COLUMNS.label[row] >= 0 ? CORE.images.labels[COLUMNS.label[row]] : null;
  const cluster = now[row];
  const agreement = share(COLUMNS.agreement[row]);
  const second = COLUMNS.second[row] >= 0 ? resolve(COLUMNS.second[row]) : null;
  const group = COLUMNS.group[row] >= 0 ? CORE.duplicates[COLUMNS.group[row]].filter((other) => other !== row) : [];
  const strip = (heading, others, caption) => others.length
    ? el("section", {}, el("h3", {}, heading),
      el("div", {className: "strip"}, ...others.map((other) => tile(other, others, {caption: caption(other)}))))
    : null;
  const cosines = new Map(similar.map((one) => [one.row, one.cosine]));
  dialog.replaceChildren(
    el("div", {className: "dialog-bar"},
      el("button", {className: "quiet", onclick: () => step(-1), disabled: place <= 0, ariaLabel: "Previous image"}, "‹"),
      el("button", {className: "quiet", onclick: () => step(1), disabled: place >= rows.length - 1, ariaLabel: "Next image"}, "›"),
      el("span", {className: "soft grow"}, rows.length > 1 ? `${(place + 1).toLocaleString("en")} of ${rows.length.toLocaleString("en")}` : ""),
      el("button", {className: "quiet", onclick: () => dialog.close(), ariaLabel: "Close"}, "✕")),
    el("div", {className: "viewer-body"},
      largePicture(row, uri),
      el("div", {className: "facts"},
        el("h2", {}, baseName(uri)),
        el("p", {className: "path"}, address ? el("a", {href: address, target: "_blank", rel: "noopener"}, uri) : uri),
        el("dl", {},
          ...fact("cluster", clusterLink(cluster)),
          ...(cluster !== COLUMNS.cluster[row] ? fact("was in", clusterLink(COLUMNS.cluster[row])) : []),
          ...fact("second choice", second === null ? "–" : clusterLink(second)),
          ...fact("agreement", agreement === null ? "not voted on" : `${percent(agreement)} of the clusterings`),
          ...fact("consensus probability", percent(share(COLUMNS.probability[row]))),
          ...fact("distance", `${COLUMNS.distance[row].toFixed(2)}${COLUMNS.outlier[row] ? ", an outlier" : ""}`),
          ...(label === null ? [] : fact("true label", label)),
          ...fact("id", String(id))),
        el("div", {className: "actions"},
          moveMenu([row]),
          el("button", {onclick: () => move([row], null)}, "Drop"),
          similar.length ? el("button", {onclick: () => go(`similar/${row}`)}, "Similar images") : null))),
    strip("Most similar", similar.map((one) => one.row), (other) => cosines.get(other).toFixed(2)) ?? "",
    strip("Near-duplicates", group, () => "") ?? "");
}

function clusterLink(cluster) {
  return el("a", {href: cluster === NOISE ? "#noise" : `#cluster/${cluster}`, onclick: () => document.getElementById("viewer").close()},
    dot(cluster), " ", nameOf(cluster));
}

document.getElementById("viewer").addEventListener("keydown", (event) => {
  if (event.target.matches("select, input")) return;
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});
document.getElementById("viewer").addEventListener("click", (event) => {
  if (event.target.id === "viewer") event.target.close();  // a click beside it
});
