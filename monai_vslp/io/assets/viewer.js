"use strict";
// Pan-and-zoom viewer over the tiles in the folder beside the page. Works from a file: pictures are img elements, labels are
// scripts that call vslpTile, because a page from a file may fetch nothing and look into no picture.
(function () {
  const root = document.getElementById("viewer"), canvas = root.querySelector("canvas"), pen = canvas.getContext("2d");
  const info = JSON.parse(document.getElementById("viewer-data").textContent);
  const [extentHeight, extentWidth] = info.extent, layers = new Map(info.layers.map(layer => [layer.key, layer]));
  const slider = root.querySelector("[type=range]"), radios = [...root.querySelectorAll("[type=radio]")];
  const boxes = [...root.querySelectorAll("[type=checkbox]")];
  const opacity = {...info.opacity}, hidden = new Set(), NO_TISSUE = 255, KEPT = 400;
  // x, y: centre in level-0 px; zoom: CSS px per level-0 px; whole: everything is shown, also after the window changes.
  const view = {x: extentWidth / 2, y: extentHeight / 2, zoom: 1, whole: true, layer: "none"};
  let paint = 0, frame = 0, waiting = false, pointer = null;

  // ---- tiles: loaded when they come into view, the ones not seen for longest are dropped ----
  const tiles = new Map(); // by "layer/level/row_column"; the first is the one not used for longest

  const grid = level => level.shape.map(side => Math.ceil(side / info.tile));
  const exists = (level, row, column) => level.tiles[row * grid(level)[1] + column] === "1";
  const tileSize = (level, row, column) =>
    [[row, level.shape[0]], [column, level.shape[1]]].map(([i, side]) => Math.min(info.tile, side - i * info.tile));

  function tileOf(layer, index, row, column) {
    const key = `${layer.key}/${index}/${row}_${column}`;
    let tile = tiles.get(key);
    if (tile) tiles.delete(key);
    else {
      tile = {ready: false, size: tileSize(layer.levels[index], row, column)};
      const address = `${info.folder}/${key}.${layer.format}`;
      const element = layer.format === "js" ? document.createElement("script") : new Image();
      element.onload = () => { tile.ready = true; if (layer.format !== "js") tile.picture = element; element.remove(); request(); };
      element.onerror = () => { tile.failed = true; root.querySelector(".lost").hidden = false; element.remove(); request(); };
      element.src = address;
      if (layer.format === "js") document.head.append(element);
    }
    tiles.set(key, tile);
    tile.frame = frame;
    return tile;
  }

  window.vslpTile = function (key, text) { // pairs of bytes: label, number of pixels
    const tile = tiles.get(key);
    if (!tile) return;
    const runs = atob(text), labels = new Uint8Array(tile.size[0] * tile.size[1]);
    for (let i = 0, at = 0; i < runs.length; i += 2) labels.fill(runs.charCodeAt(i), at, at += runs.charCodeAt(i + 1));
    tile.labels = labels;
    tile.picture = document.createElement("canvas");
    [tile.picture.height, tile.picture.width] = tile.size;
    tile.paint = -1;
  };

  function pictureOf(tile) {
    if (tile.labels && tile.paint !== paint) {
      const brush = tile.picture.getContext("2d"), data = brush.createImageData(tile.picture.width, tile.picture.height);
      const colors = new Uint32Array(256), bytes = new Uint8Array(colors.buffer);
      info.colors.forEach((color, label) => { if (!hidden.has(label)) bytes.set([...color, 255], 4 * label); });
      const pixels = new Uint32Array(data.data.buffer);
      tile.labels.forEach((label, i) => { pixels[i] = colors[label]; });
      brush.putImageData(data, 0, 0);
      tile.paint = paint;
    }
    return tile.picture;
  }

  // ---- drawing ----
  const ratio = () => window.devicePixelRatio || 1;
  const wholeZoom = () => 0.97 * Math.min(canvas.clientWidth / extentWidth, canvas.clientHeight / extentHeight);
  const finest = Math.min(...info.layers.map(layer => layer.levels[0].scale));
  const overlay = () => layers.get(view.layer);

  function levelOf(layer) { // the coarsest level that is not visibly coarser than the screen
    let index = layer.levels.length - 1;
    while (index > 0 && layer.levels[index].scale * view.zoom * ratio() > 1.4) index--;
    return index;
  }

  function limit() {
    const least = 0.5 * wholeZoom();
    view.zoom = Math.min(Math.max(view.zoom, least), Math.max(least, 24 / finest));
    view.x = Math.min(Math.max(view.x, 0), extentWidth);
    view.y = Math.min(Math.max(view.y, 0), extentHeight);
  }

  function drawLayer(layer, alpha) {
    const scaled = view.zoom * ratio(), index = levelOf(layer), level = layer.levels[index], step = info.tile * level.scale;
    const across = x => Math.round((x - view.x) * scaled + canvas.width / 2);
    const down = y => Math.round((y - view.y) * scaled + canvas.height / 2);
    const [rows, columns] = grid(level), halfWidth = canvas.width / 2 / scaled, halfHeight = canvas.height / 2 / scaled;
    const first = value => Math.max(0, Math.floor(value / step)), last = (value, n) => Math.min(n - 1, Math.floor(value / step));
    pen.globalAlpha = alpha;
    pen.imageSmoothingEnabled = level.scale * scaled < (layer.kind === "image" ? 4 : 1);
    pen.imageSmoothingQuality = "high";
    for (let row = first(view.y - halfHeight); row <= last(view.y + halfHeight, rows); row++)
      for (let column = first(view.x - halfWidth); column <= last(view.x + halfWidth, columns); column++) {
        if (layer.kind !== "image" && !exists(level, row, column)) continue;
        // What is absent or still loading is drawn from the nearest coarser tile that is there.
        for (let up = 0; index + up < layer.levels.length; up++) {
          const coarse = layer.levels[index + up], y = row >> up, x = column >> up;
          if (!exists(coarse, y, x)) continue;
          const tile = tileOf(layer, index + up, y, x);
          if (!tile.ready || !tile.picture) continue;
          const [height, width] = tileSize(level, row, column), shrink = 2 ** up;
          const left = across(column * step), top = down(row * step);
          pen.drawImage(pictureOf(tile), (column * info.tile) / shrink - x * info.tile, (row * info.tile) / shrink - y * info.tile,
            width / shrink, height / shrink, left, top,
            across(column * step + width * level.scale) - left, down(row * step + height * level.scale) - top);
          break;
        }
      }
    pen.globalAlpha = 1;
  }

  function draw() {
    waiting = false;
    frame++;
    const width = Math.round(canvas.clientWidth * ratio()), height = Math.round(canvas.clientHeight * ratio());
    if (!width || !height) return;
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    if (view.whole) Object.assign(view, {x: extentWidth / 2, y: extentHeight / 2, zoom: wholeZoom()});
    limit();
    pen.clearRect(0, 0, width, height);
    pen.save();
    const scaled = view.zoom * ratio();
    pen.beginPath();
    pen.rect(width / 2 - view.x * scaled, height / 2 - view.y * scaled, extentWidth * scaled, extentHeight * scaled);
    pen.clip();
    pen.fillStyle = `rgb(${info.backdrop})`;
    pen.fillRect(0, 0, width, height);
    if (layers.has("image")) drawLayer(layers.get("image"), 1);
    if (overlay()) drawLayer(overlay(), opacity[overlay().kind] / 100);
    pen.restore();
    for (const [key, tile] of tiles) {
      if (tiles.size <= KEPT) break;
      if (tile.frame !== frame && (tile.ready || tile.failed)) tiles.delete(key);
    }
    describe();
    root.dataset.loading = [...tiles.values()].filter(tile => !tile.ready && !tile.failed).length;
  }

  function request() {
    if (!waiting) requestAnimationFrame(draw);
    waiting = true;
  }

  // ---- what is said beside the picture ----
  function labelAt(x, y) {
    const layer = overlay()?.kind === "labels" ? overlay() : layers.get("labels") || layers.get("network");
    if (!layer) return null;
    const index = levelOf(layer), level = layer.levels[index];
    const [row, column] = [y, x].map((value, axis) => Math.min(level.shape[axis] - 1, Math.floor(value / level.scale)));
    const [r, c] = [row, column].map(value => Math.floor(value / info.tile));
    if (!exists(level, r, c)) return NO_TISSUE;
    const tile = tileOf(layer, index, r, c);
    return tile.labels ? tile.labels[(row - r * info.tile) * tile.size[1] + column - c * info.tile] : null;
  }

  function describe() {
    const keyboard = canvas.matches(":focus-visible"), box = canvas.getBoundingClientRect();
    const place = keyboard ? {x: view.x, y: view.y} : pointer && placeOf(pointer.clientX - box.left, pointer.clientY - box.top);
    let words = "";
    if (place && place.x >= 0 && place.y >= 0 && place.x < extentWidth && place.y < extentHeight) {
      const label = labelAt(place.x, place.y);
      words = `x ${Math.floor(place.x)}, y ${Math.floor(place.y)} px`;
      if (info.mpp) words += ` · ${(place.x * info.mpp).toFixed(1)}, ${(place.y * info.mpp).toFixed(1)} µm`;
      if (label !== null) words += ` · ${label === NO_TISSUE ? "no tissue" : info.classes[label]}`;
    }
    const where = root.querySelector(".where");
    if (where.textContent !== words) where.textContent = words;
    const rounded = {x: view.x.toFixed(1), y: view.y.toFixed(1), zoom: +view.zoom.toPrecision(5), layer: view.layer};
    root.querySelector(".here").href = "#" + new URLSearchParams(rounded);
    scaleBar();
  }

  function scaleBar() {
    const unit = info.mpp || 1, most = 150 / view.zoom * unit, power = 10 ** Math.floor(Math.log10(most));
    const length = power * [5, 2, 1].find(step => step * power <= most);
    const shown = !info.mpp ? `${length} px` : length >= 1000 ? `${length / 1000} mm` : `${+length.toPrecision(1)} µm`;
    root.querySelector(".bar-of-scale span").textContent = shown;
    root.querySelector(".bar-of-scale i").style.width = `${length / unit * view.zoom}px`;
  }

  // ---- moving ----
  const placeOf = (left, top) =>
    ({x: view.x + (left - canvas.clientWidth / 2) / view.zoom, y: view.y + (top - canvas.clientHeight / 2) / view.zoom});

  function move(right, down) { // CSS px
    view.whole = false;
    view.x += right / view.zoom;
    view.y += down / view.zoom;
    request();
  }

  function zoomBy(factor, left = canvas.clientWidth / 2, top = canvas.clientHeight / 2) { // the place under (left, top) stays
    const before = placeOf(left, top);
    view.whole = false;
    view.zoom *= factor;
    limit();
    const after = placeOf(left, top);
    view.x += before.x - after.x;
    view.y += before.y - after.y;
    request();
  }

  const actions = {
    in: () => zoomBy(1.5), out: () => zoomBy(1 / 1.5), reset: () => { view.whole = true; request(); },
    full: () => document.fullscreenElement ? document.exitFullscreen() : root.requestFullscreen(),
  };
  root.querySelectorAll("[data-do]").forEach(button => button.addEventListener("click", actions[button.dataset.do]));

  const held = new Map(); // pointers that are down
  canvas.addEventListener("pointerdown", event => {
    canvas.setPointerCapture(event.pointerId);
    held.set(event.pointerId, event);
    canvas.classList.add("held");
  });
  canvas.addEventListener("pointermove", event => {
    pointer = event;
    const before = held.get(event.pointerId);
    if (!before) return request();
    const other = [...held.values()].find(each => each.pointerId !== event.pointerId);
    if (other) {
      const box = canvas.getBoundingClientRect(), apart = e => Math.hypot(e.clientX - other.clientX, e.clientY - other.clientY);
      const middle = [(event.clientX + other.clientX) / 2 - box.left, (event.clientY + other.clientY) / 2 - box.top];
      move((before.clientX - event.clientX) / 2, (before.clientY - event.clientY) / 2); // as far as the middle went
      zoomBy(apart(event) / Math.max(apart(before), 1), ...middle);
    } else move(before.clientX - event.clientX, before.clientY - event.clientY);
    held.set(event.pointerId, event);
  });
  for (const name of ["pointerup", "pointercancel"])
    canvas.addEventListener(name, event => { held.delete(event.pointerId); canvas.classList.toggle("held", held.size > 0); });
  canvas.addEventListener("pointerleave", () => { pointer = null; request(); });
  canvas.addEventListener("wheel", event => {
    event.preventDefault();
    const box = canvas.getBoundingClientRect(), lines = event.deltaMode === 1 ? 16 : 1;
    const factor = Math.exp(-event.deltaY * lines * (event.ctrlKey ? 0.01 : 0.002)); // ctrl: pinch on a touchpad
    zoomBy(factor, event.clientX - box.left, event.clientY - box.top);
  }, {passive: false});
  canvas.addEventListener("dblclick", event => zoomBy(2, event.offsetX, event.offsetY));
  canvas.addEventListener("keydown", event => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const step = canvas.clientWidth / 8, go = {
      ArrowLeft: () => move(-step, 0), ArrowRight: () => move(step, 0), ArrowUp: () => move(0, -step), ArrowDown: () => move(0, step),
      "+": actions.in, "=": actions.in, "-": actions.out, "0": actions.reset, Home: actions.reset,
    }[event.key];
    if (!go) return;
    event.preventDefault();
    go();
  });
  for (const name of ["focus", "blur"]) canvas.addEventListener(name, request);

  // ---- layers, classes, links to a view ----
  function choose(key) {
    view.layer = layers.has(key) && key !== "image" ? key : "none";
    radios.forEach(radio => { radio.checked = radio.value === view.layer; });
    const kind = overlay()?.kind;
    if (slider) [slider.disabled, slider.value] = [!kind, kind ? opacity[kind] : 0];
    root.querySelectorAll("[data-for]").forEach(part => { part.hidden = part.dataset.for !== (kind === "labels" ? kind : view.layer); });
    request();
  }
  radios.forEach(radio => radio.addEventListener("change", () => choose(radio.value)));
  slider?.addEventListener("input", () => { opacity[overlay().kind] = +slider.value; request(); });
  boxes.forEach(box => box.addEventListener("change", () => {
    box.checked ? hidden.delete(+box.value) : hidden.add(+box.value);
    paint++;
    request();
  }));

  function follow() { // #x=…&y=…&zoom=…&layer=…&opacity=…
    const wanted = new URLSearchParams(location.hash.slice(1)), number = key => wanted.has(key) ? Number(wanted.get(key)) : NaN;
    for (const key of ["x", "y", "zoom"]) if (Number.isFinite(number(key))) [view[key], view.whole] = [number(key), false];
    if (wanted.has("layer")) choose(wanted.get("layer"));
    if (overlay() && number("opacity") >= 0) opacity[overlay().kind] = Math.min(100, 100 * number("opacity"));
    if (wanted.has("x")) root.scrollIntoView();
    choose(view.layer);
  }
  choose(radios.find(radio => radio.checked)?.value ?? info.layers.at(-1).key);
  view.zoom = wholeZoom();
  follow();
  window.addEventListener("hashchange", follow);
  new ResizeObserver(request).observe(canvas);
})();
