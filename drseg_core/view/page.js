// SPDX-License-Identifier: Apache-2.0
// A viewer of our own: a deep-zoom library would have to be fetched at every build, and numbers in tiles need most of this.
"use strict";
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const canvas = at("map"), pen = canvas.getContext("2d");
  const TILE = data.tile, NOTHING = 255, LEVELS = 250, KEPT = 240;
  const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
  const view = { x: data.width / 2, y: data.height / 2, zoom: 1, opacity: 0.6, swipe: 0, chosen: 0 };
  const hidden = new Set(), shown = new Set(["image", "classes"]), tiles = new Map();
  let picked = null, waiting = 1, asked = false;

  // small things

  function busy(change) {
    waiting += change;
    document.body.dataset.busy = String(waiting);
  }

  function element(tag, text, parent) {
    const made = document.createElement(tag);
    // text and never markup: names come from people
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  }

  function ramp(share) {
    const place = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1);
    const low = Math.min(Math.floor(place), RAMP.length - 2);
    return RAMP[low].map((value, i) => Math.round(value + (RAMP[low + 1][i] - value) * (place - low)));
  }

  const extent = (values) => (values.length ? [Math.min(...values), Math.max(...values)] : [0, 0]);
  const short = (value) => (value === 0 ? "0" : Math.abs(value) < 0.001 ? value.toExponential(2) : value.toPrecision(4));

  // tiles

  // undefined for a class that has none, such as that of a threshold
  const rasterOf = (layer) => layer.scales[layer.by_class ? view.chosen : 0];
  const titleOf = (layer) => (layer.by_class ? `${layer.title}, ${data.names[view.chosen]}` : layer.title);
  const NONE = data.threshold === null ? "none" : `none, as it is for scores below ${data.threshold}`;

  function colorOf(layer, value) {
    if (value === NOTHING) return [0, 0, 0, 0];
    if (layer.kind === "values") return [...ramp(value / LEVELS), 255];
    return hidden.has(value) ? [0, 0, 0, 0] : [...data.colors[value], 255];
  }

  function paint(layer, tile) {
    const table = Array.from({ length: 256 }, (_, value) =>
      layer.kind === "classes" && value >= data.names.length ? [0, 0, 0, 0] : colorOf(layer, value));
    const pixels = tile.pen.createImageData(tile.canvas.width, tile.canvas.height);
    tile.raw.forEach((value, i) => pixels.data.set(table[value], 4 * i));
    tile.pen.putImageData(pixels, 0, 0);
  }

  async function decode(layer, tile, address) {
    busy(1);
    const image = new Image();
    image.src = address;
    await image.decode();
    tile.canvas = document.createElement("canvas");
    tile.canvas.width = image.width;
    tile.canvas.height = image.height;
    tile.pen = tile.canvas.getContext("2d", { willReadFrequently: layer.kind !== "picture" });
    tile.pen.drawImage(image, 0, 0);
    if (layer.kind !== "picture") {
      const pixels = tile.pen.getImageData(0, 0, image.width, image.height).data;
      const exact = address.startsWith("data:image/png");
      tile.raw = new Uint8Array(image.width * image.height);
      for (let i = 0; i < tile.raw.length; i++) {
        // what was packed with losses may come out a little too high
        const value = exact ? pixels[4 * i] : Math.min(pixels[4 * i], LEVELS);
        tile.raw[i] = pixels[4 * i + 3] ? value : NOTHING;
      }
      paint(layer, tile);
    }
    tile.ready = true;
    busy(-1);
    redraw();
  }

  // a tile that is being decoded or is there; null where nothing is
  function tileOf(layer, depth, row, column) {
    const raster = rasterOf(layer), level = raster[depth];
    const address = level.tiles[row * level.columns + column];
    if (!address) return null;
    const key = [layer.key, layer.scales.indexOf(raster), depth, row, column].join("/");
    const found = tiles.get(key) || { layer, ready: false };
    if (!tiles.delete(key)) found.done = decode(layer, found, address);
    // the last is the one used last
    tiles.set(key, found);
    return found;
  }

  function forget() {
    for (const [key, tile] of tiles) {
      if (tiles.size <= KEPT) return;
      if (tile.ready) tiles.delete(key);
    }
  }

  function repaint(layer) {
    for (const tile of tiles.values()) if (tile.layer === layer && tile.ready) paint(layer, tile);
    redraw();
  }

  // drawing

  function redraw() {
    if (!asked) requestAnimationFrame(draw);
    asked = true;
  }

  const ratio = () => window.devicePixelRatio || 1;
  const screenX = (x) => ((x - view.x) * view.zoom + canvas.clientWidth / 2) * ratio();
  const screenY = (y) => ((y - view.y) * view.zoom + canvas.clientHeight / 2) * ratio();
  const sceneX = (x) => (x - canvas.clientWidth / 2) / view.zoom + view.x;
  const sceneY = (y) => (y - canvas.clientHeight / 2) / view.zoom + view.y;

  function drawLayer(layer) {
    const levels = rasterOf(layer);
    if (!levels) return;
    let depth = levels.length - 1;
    while (depth > 0 && levels[depth].scale * view.zoom * ratio() > 1) depth--;
    const level = levels[depth], span = TILE * level.scale;
    pen.imageSmoothingEnabled = layer.kind === "picture" && level.scale * view.zoom * ratio() < 1;
    const first = (value) => Math.max(Math.floor(value / span), 0);
    const top = first(sceneY(0)), bottom = Math.min(Math.floor(sceneY(canvas.clientHeight) / span), level.rows - 1);
    const left = first(sceneX(0)), right = Math.min(Math.floor(sceneX(canvas.clientWidth) / span), level.columns - 1);
    for (let row = top; row <= bottom; row++) {
      for (let column = left; column <= right; column++) drawTile(layer, levels, depth, row, column);
    }
  }

  function drawTile(layer, levels, depth, row, column) {
    if (!levels[depth].tiles[row * levels[depth].columns + column]) return;
    for (let above = depth; above < levels.length; above++) {
      // while a tile is decoded, what it covers of a coarser one
      const times = 2 ** (above - depth), part = TILE / times;
      const tile = tileOf(layer, above, Math.floor(row / times), Math.floor(column / times));
      if (!tile || !tile.ready) continue;
      const x = (column % times) * part, y = (row % times) * part;
      const width = Math.min(part, tile.canvas.width - x), height = Math.min(part, tile.canvas.height - y);
      const span = TILE * levels[depth].scale, scale = levels[above].scale;
      // whole pixels of the screen, so that no seam shows
      const [a, b] = [screenX(column * span), screenX(column * span + width * scale)].map(Math.round);
      const [c, d] = [screenY(row * span), screenY(row * span + height * scale)].map(Math.round);
      if (width > 0 && height > 0) pen.drawImage(tile.canvas, x, y, width, height, a, c, b - a, d - c);
      return;
    }
  }

  function draw() {
    asked = false;
    const width = Math.round(canvas.clientWidth * ratio()), height = Math.round(canvas.clientHeight * ratio());
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    pen.clearRect(0, 0, width, height);
    const visible = data.layers.filter((layer) => shown.has(layer.key)), top = visible[visible.length - 1];
    for (const layer of visible) {
      pen.save();
      if (layer === top && view.swipe > 0) {
        pen.beginPath();
        pen.rect(view.swipe * width, 0, width, height);
        pen.clip();
      }
      pen.globalAlpha = layer.kind === "picture" ? 1 : view.opacity;
      drawLayer(layer);
      pen.restore();
    }
    if (view.swipe > 0 && top) line(view.swipe * width, 0, view.swipe * width, height, 2 * ratio(), "#fff");
    if (picked) drawPicked();
    if (canvas.matches(":focus-visible")) {
      const [x, y, arm] = [width / 2, height / 2, 8 * ratio()];
      for (const [color, wide] of [["#000", 3], ["#fff", 1]]) {
        line(x - arm, y, x + arm, y, wide * ratio(), color);
        line(x, y - arm, x, y + arm, wide * ratio(), color);
      }
    }
    forget();
  }

  function line(x0, y0, x1, y1, width, color) {
    pen.strokeStyle = color;
    pen.lineWidth = width;
    pen.beginPath();
    pen.moveTo(x0, y0);
    pen.lineTo(x1, y1);
    pen.stroke();
  }

  function boxOf(part, node) {
    const row = Math.floor(node / part.grid[1]), column = node % part.grid[1];
    const left = part.left + column * part.cell[1], top = part.top + row * part.cell[0];
    const [x0, y0] = [screenX(left), screenY(top)];
    return { x: x0, y: y0, width: screenX(left + part.cell[1]) - x0, height: screenY(top + part.cell[0]) - y0 };
  }

  function drawPicked() {
    const { part, node, edges } = picked;
    if (part) {
      const own = boxOf(part, node), quantity = at("quantity").value;
      const [least, most] = extent(edges.map((edge) => edge[quantity]));
      const middle = (box) => [box.x + box.width / 2, box.y + box.height / 2];
      // the strongest last, above the others
      for (const edge of [...edges].sort((a, b) => a[quantity] - b[quantity])) {
        const share = most > least ? (edge[quantity] - least) / (most - least) : 1;
        const box = boxOf(part, edge.node), color = `rgb(${ramp(share)})`;
        line(...middle(own), ...middle(box), (0.5 + 2.5 * share) * ratio(), color);
        pen.fillStyle = color;
        pen.globalAlpha = 0.75;
        pen.fillRect(box.x, box.y, box.width, box.height);
        pen.globalAlpha = 1;
      }
      outline(own);
    }
    const [x, y] = [screenX(picked.x), screenY(picked.y)];
    outline({ x, y, width: screenX(picked.x + 1) - x, height: screenY(picked.y + 1) - y });
  }

  function outline(box) {
    for (const [color, width] of [["#000", 4], ["#fff", 2]]) {
      pen.strokeStyle = color;
      pen.lineWidth = width * ratio();
      pen.strokeRect(box.x, box.y, box.width, box.height);
    }
  }

  // the graph

  async function readGraph() {
    if (!data.graph) return [];
    const text = atob(data.graph.numbers), bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const numbers = await new Response(stream).arrayBuffer();
    let place = 0;
    const take = (Kind, count) => new Kind(numbers, (place += 4 * count) - 4 * count, count);
    return data.graph.parts.map((part) => {
      const [h, w] = part.grid, kept = [h, w].map((n) => Math.ceil(n / part.stride));
      const count = kept[0] * kept[1] * part.k;
      const lists = { index: take(Int32Array, count) };
      for (const name of ["weight", "forth", "back"]) lists[name] = take(Float32Array, count);
      return { ...part, kept, ...lists, degree: take(Float32Array, h * w) };
    });
  }

  // the part in whose middle a pixel lies most, as the map leans on it there
  function partAt(x, y) {
    let best = null, farthest = 0;
    for (const part of parts) {
      const [bottom, right] = [part.top + part.cell[0] * part.grid[0], part.left + part.cell[1] * part.grid[1]];
      // of each axis for itself, like the weights of a blend
      const inside = [Math.min(x + 0.5 - part.left, right - x - 0.5), Math.min(y + 0.5 - part.top, bottom - y - 0.5)];
      const middle = Math.max(inside[0], 0) * Math.max(inside[1], 0);
      if (middle > farthest) [best, farthest] = [part, middle];
    }
    return best;
  }

  function nodeAt(part, x, y) {
    const cells = [(y + 0.5 - part.top) / part.cell[0], (x + 0.5 - part.left) / part.cell[1]].map(Math.floor);
    const near = cells.map((n, i) => Math.min(Math.round(n / part.stride), part.kept[i] - 1));
    const slot = near[0] * part.kept[1] + near[1];
    const edges = [];
    for (let i = slot * part.k; i < (slot + 1) * part.k; i++) {
      const node = part.index[i];
      if (node < 0) continue;
      edges.push({ node, weight: part.weight[i], forth: part.forth[i], back: part.back[i], degree: part.degree[node] });
    }
    return { node: near[0] * part.stride * part.grid[1] + near[1] * part.stride, edges };
  }

  // what is said of a pixel

  async function valueAt(layer, x, y) {
    const levels = rasterOf(layer);
    if (!levels) return NOTHING;
    if (layer.kind === "picture") return null;
    const [column, row] = [x, y].map((n) => Math.floor(n / levels[0].scale));
    const tile = tileOf(layer, 0, Math.floor(row / TILE), Math.floor(column / TILE));
    if (!tile) return NOTHING;
    await tile.done;
    return tile.raw[(row % TILE) * tile.canvas.width + (column % TILE)];
  }

  async function pick(x, y) {
    [x, y] = [Math.floor(x), Math.floor(y)];
    if (!(x >= 0 && y >= 0 && x < data.width && y < data.height)) return forgetPicked();
    const part = partAt(x, y), mine = (picked = { x, y, part, ...(part ? nodeAt(part, x, y) : { edges: [] }) });
    busy(1);
    const found = await Promise.all(data.layers.map((layer) => valueAt(layer, x, y)));
    busy(-1);
    // another pixel was asked for meanwhile
    if (picked !== mine) return;
    at("values").replaceChildren();
    const words = [];
    data.layers.forEach((layer, i) => {
      if (found[i] === null) return;
      const known = found[i] !== NOTHING, scaled = layer.low + (found[i] / LEVELS) * (layer.high - layer.low);
      const missing = rasterOf(layer) ? "no data" : NONE;
      const text = !known ? missing : layer.kind === "classes" ? data.names[found[i]] : short(scaled);
      element("dt", titleOf(layer), at("values"));
      element("dd", text, at("values"));
      words.push(`${layer.title}: ${text}`);
    });
    sayGraph();
    const graph = part ? `Node ${mine.node} has ${mine.edges.length} neighbours.` : `No graph: ${data.why_no_graph}.`;
    at("said").textContent = `Column ${x}, row ${y}. ${words[0] || ""}. ${graph}`;
    [at("column").value, at("row").value] = [x, y];
    redraw();
  }

  function sayGraph() {
    const { part, node, edges } = picked, body = at("neighbours").tBodies[0];
    at("graph").hidden = !part;
    body.replaceChildren();
    if (!part) return;
    const quantity = at("quantity").value;
    [at("least").textContent, at("most").textContent] = extent(edges.map((edge) => edge[quantity])).map(short);
    const skipped = part.stride > 1 ? ` (the nearest of those kept, one row and column in ${part.stride})` : "";
    at("neighbours-title").textContent =
      `Neighbours of node ${node}${skipped}, degree ${short(part.degree[node])}; ${data.graph.words}`;
    for (const edge of [...edges].sort((a, b) => b[quantity] - a[quantity])) {
      const row = element("tr", undefined, body);
      Object.assign(row.dataset, edge);
      element("td", String(edge.node), row);
      const [down, across] = [Math.floor(edge.node / part.grid[1]), edge.node % part.grid[1]];
      const place = [across * part.cell[1] + part.left, down * part.cell[0] + part.top];
      element("td", place.map(Math.round).join(", "), row);
      for (const name of ["weight", "forth", "back", "degree"]) element("td", short(edge[name]), row);
    }
  }

  function forgetPicked() {
    picked = null;
    at("graph").hidden = true;
    at("values").replaceChildren();
    at("said").textContent = "No pixel is chosen.";
    redraw();
  }

  // moving about

  function look() {
    view.x = Math.min(Math.max(view.x, 0), data.width);
    view.y = Math.min(Math.max(view.y, 0), data.height);
    view.zoom = Math.min(Math.max(view.zoom, fitting() / 2), 40);
    const percent = 100 * view.zoom;
    at("where").textContent = `${percent < 100 ? percent.toPrecision(3) : Math.round(percent)} % of ${data.width} x ${data.height} pixels`;
    redraw();
  }

  const fitting = () => Math.min(canvas.clientWidth / data.width, canvas.clientHeight / data.height) || 1;

  function zoomBy(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
    const [fixedX, fixedY] = [sceneX(x), sceneY(y)];
    view.zoom = Math.min(Math.max(view.zoom * factor, fitting() / 2), 40);
    view.x = fixedX - (x - canvas.clientWidth / 2) / view.zoom;
    view.y = fixedY - (y - canvas.clientHeight / 2) / view.zoom;
    look();
  }

  function zoomTo(zoom) {
    view.zoom = zoom;
    look();
  }

  function fit() {
    Object.assign(view, { x: data.width / 2, y: data.height / 2, zoom: fitting() });
    look();
  }

  const actions = {
    "+": () => zoomBy(1.5), "=": () => zoomBy(1.5), "-": () => zoomBy(1 / 1.5),
    "1": () => zoomTo(1 / ratio()), "0": fit,
    Enter: () => pick(view.x, view.y), Escape: forgetPicked,
  };
  const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const way = ways[event.key];
    if (way) {
      const step = event.shiftKey ? 1 : 60 / view.zoom;
      [view.x, view.y] = [view.x + step * way[0], view.y + step * way[1]];
      look();
    } else if (actions[event.key]) actions[event.key]();
    else return;
    event.preventDefault();
  });
  for (const name of ["focus", "blur"]) canvas.addEventListener(name, redraw);

  const fingers = new Map();
  let moved = 0;
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, [event.offsetX, event.offsetY]);
    if (fingers.size === 1) moved = 0;
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return;
    const now = [event.offsetX, event.offsetY], other = [...fingers].find(([id]) => id !== event.pointerId);
    fingers.set(event.pointerId, now);
    moved += Math.hypot(now[0] - before[0], now[1] - before[1]);
    if (other) {
      const [x, y] = other[1], apart = (point) => Math.hypot(point[0] - x, point[1] - y) || 1;
      zoomBy(apart(now) / apart(before), x, y);
    } else if (moved > 3) {
      view.x -= (now[0] - before[0]) / view.zoom;
      view.y -= (now[1] - before[1]) / view.zoom;
      look();
    }
  });
  canvas.addEventListener("pointerup", (event) => {
    if (fingers.size === 1 && moved <= 3) pick(sceneX(event.offsetX), sceneY(event.offsetY));
  });
  for (const name of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(name, (event) => fingers.delete(event.pointerId));
  }
  canvas.addEventListener("wheel", (event) => {
    zoomBy(Math.exp(-event.deltaY / 400), event.offsetX, event.offsetY);
    event.preventDefault();
  }, { passive: false });

  // what is beside the map

  function checkbox(text, checked, parent, changed) {
    const label = element("label", undefined, parent), box = element("input", undefined, label);
    Object.assign(box, { type: "checkbox", checked });
    box.addEventListener("change", () => changed(box.checked));
    label.append(" ", text);
    return label;
  }

  function sayRange() {
    const top = data.layers.filter((layer) => layer.kind === "values" && shown.has(layer.key)).pop();
    at("range").hidden = !top;
    if (!top) return;
    const known = Boolean(rasterOf(top)), ends = known ? [top.low, top.high].map(short) : ["", ""];
    [at("low").textContent, at("high").textContent] = ends;
    at("range").querySelector(".ramp").hidden = !known;
    at("ranged").textContent = known ? titleOf(top) : `${titleOf(top)}: ${NONE}`;
  }

  function toggle(set, key, on) {
    if (on) set.add(key);
    else set.delete(key);
  }

  function build() {
    for (const layer of data.layers) {
      const label = checkbox(layer.title, shown.has(layer.key), at("layers"), (on) => {
        toggle(shown, layer.key, on);
        sayRange();
        redraw();
      });
      label.querySelector("input").id = `layer-${layer.key}`;
    }
    data.names.forEach((name, i) => {
      element("option", name, at("chosen")).value = String(i);
      const row = element("tr", undefined, at("classes").tBodies[0]), cell = element("td", undefined, row);
      const label = checkbox(name, true, cell, (on) => {
        toggle(hidden, i, !on);
        repaint(data.layers.find((layer) => layer.kind === "classes"));
      });
      const swatch = element("span");
      swatch.className = "swatch";
      swatch.style.background = `rgb(${data.colors[i]})`;
      label.firstChild.after(swatch);
      const area = data.areas[i], m2 = area.area_m2;
      const grouped = (value) => Math.round(value).toLocaleString("en");
      element("td", m2 === null ? `${grouped(area.pixels)} px` : m2 < 1e5 ? `${grouped(m2)} m²` : `${grouped(m2 / 1e4)} ha`, row);
      element("td", `${area.percent.toFixed(2)} %`, row);
    });
    at("method").textContent = data.areas[0].method;
    const correlated = data.names.length > 1 && data.layers.some((layer) => layer.by_class);
    at("chooser").hidden = at("correlations").hidden = !correlated;
    for (const note of data.notes) element("li", note, at("notes"));
    for (const bar of document.querySelectorAll(".ramp")) {
      bar.style.background = `linear-gradient(90deg, ${RAMP.map((color) => `rgb(${color})`)})`;
    }
    at("opacity").addEventListener("input", (event) => { view.opacity = event.target.value / 100; redraw(); });
    at("swipe").addEventListener("input", (event) => { view.swipe = event.target.value / 100; redraw(); });
    at("chosen").addEventListener("change", (event) => {
      view.chosen = Number(event.target.value);
      sayRange();
      redraw();
      if (picked) pick(picked.x, picked.y);
    });
    at("quantity").addEventListener("change", () => { sayGraph(); redraw(); });
    at("look").addEventListener("submit", (event) => {
      event.preventDefault();
      const [x, y] = [Number(at("column").value), Number(at("row").value)];
      const seen = sceneX(0) <= x && x < sceneX(canvas.clientWidth) && sceneY(0) <= y && y < sceneY(canvas.clientHeight);
      if (!seen) Object.assign(view, { x: x + 0.5, y: y + 0.5 });
      look();
      pick(x, y);
    });
    [at("column").max, at("row").max] = [data.width - 1, data.height - 1];
    for (const [id, key] of [["closer", "+"], ["farther", "-"], ["native", "1"], ["fit", "0"]]) {
      at(id).addEventListener("click", actions[key]);
    }
    new ResizeObserver(look).observe(canvas);
  }

  // a click may come before the graph is unpacked
  let parts = [];
  build();
  parts = await readGraph();
  sayRange();
  fit();
  busy(-1);
})();
