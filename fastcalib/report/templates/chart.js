// Charts as inline SVG, drawn at the width of the figure: direct labels; values on hover, on touch and by arrow keys.
// A spec is {label, x, y, marks, height}; an axis {min, max, log, label, format, ticks}; colours are CSS variables, so
// that light and dark need no redrawing.
const Chart = (() => {
  const {
    svg,
    textWidth,
    cut,
    niceTicks,
    logTicks,
    scaleOf,
    path,
    SHAPES,
    placeLabels,
    placeEnds,
    along,
    number,
    percent,
    count,
    power,
  } = Parts;
  const NEAR = 44; // how far a pointer may be from a point that it means, in pixels

  // One tooltip and one live region for the page.
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  const live = document.createElement("div");
  live.className = "visually-hidden";
  live.setAttribute("aria-live", "polite");

  function showTip(box, x, y, content, colour) {
    tip.replaceChildren();
    const title = document.createElement("strong");
    title.textContent = content.title;
    title.style.setProperty("--mark", colour);
    tip.append(title);
    const list = document.createElement("dl");
    for (const [name, value] of content.rows || []) {
      const dt = document.createElement("dt"),
        dd = document.createElement("dd");
      dt.textContent = name;
      dd.textContent = value;
      list.append(dt, dd);
    }
    tip.append(list);
    if (!tip.isConnected) document.body.append(tip, live);
    tip.hidden = false;
    const width = tip.offsetWidth,
      height = tip.offsetHeight,
      room = document.documentElement.clientWidth;
    let left = box.left + x + 14;
    if (left + width > room - 8) left = box.left + x - 14 - width;
    tip.style.left = `${Math.max(8, Math.min(left, room - 8 - width)) + scrollX}px`;
    let top = box.top + y - height - 12;
    if (top < 8) top = box.top + y + 16;
    tip.style.top = `${top + scrollY}px`;
  }

  function draw(host, spec) {
    const width = Math.max(host.clientWidth, 200);
    const yTicks =
      spec.y.ticks || (spec.y.log ? logTicks(spec.y.min, spec.y.max, 6) : niceTicks(spec.y.min, spec.y.max, 5));
    const format = {
      x: spec.x.format || (spec.x.log ? power : number),
      y: spec.y.format || (spec.y.log ? power : number),
    };
    // Room on the right for the labels of lines that end there.
    const named = spec.inside ? [] : spec.marks.filter((m) => m.end).map((m) => textWidth(m.end, 11.5));
    const left = Math.ceil(Math.max(8, ...yTicks.map((t) => textWidth(format.y(t)) + 10)));
    const right = Math.ceil(Math.max(14, ...named.map((w) => w + 14)));
    const top = spec.y.label ? 30 : 12,
      bottom = spec.x.label ? 44 : 26;
    const height = spec.height || Math.round(Math.min(Math.max(width * 0.68, 230), 380));
    const frame = { left, right: width - right, top, bottom: height - bottom, width };
    const xTicks =
      spec.x.ticks ||
      (spec.x.log ? logTicks : niceTicks)(spec.x.min, spec.x.max, Math.max(2, Math.floor(width / 84)));
    const x = scaleOf(spec.x, frame.left, frame.right),
      y = scaleOf(spec.y, frame.bottom, frame.top);

    const root = svg("svg", {
      viewBox: `0 0 ${width} ${height}`,
      tabindex: 0,
      role: "application",
      "aria-roledescription": "chart",
      "aria-label": `${spec.label}. Arrow keys read the values: left and right along a series, up and down between series.`,
    });
    const back = svg("g", { class: "grid", "aria-hidden": "true" }, root);
    for (const t of yTicks) {
      if (!spec.y.bare) svg("line", { x1: left, x2: frame.right, y1: y.place(t), y2: y.place(t) }, back);
      svg("text", { x: left - 7, y: y.place(t) + 4, "text-anchor": "end" }, back, format.y(t));
    }
    for (const t of xTicks) {
      const at = x.place(t),
        text = format.x(t),
        half = textWidth(text) / 2;
      svg("line", { x1: at, x2: at, y1: frame.bottom, y2: frame.bottom + 4, class: "axis" }, back);
      svg(
        "text",
        { x: Math.max(half, Math.min(at, width - half)), y: frame.bottom + 18, "text-anchor": "middle" },
        back,
        text,
      );
    }
    svg("line", { x1: left, x2: frame.right, y1: frame.bottom, y2: frame.bottom, class: "axis" }, back);
    if (spec.y.label) svg("text", { x: 0, y: 12, class: "name" }, back, spec.y.label);
    if (spec.x.label)
      svg("text", { x: frame.right, y: height - 6, "text-anchor": "end", class: "name" }, back, `${spec.x.label} →`);

    const at = (p) => (x.inside(p.x) && y.inside(p.y) ? [x.place(p.x), y.place(p.y)] : null);
    const series = [],
      labels = [],
      ends = [],
      taken = [],
      crossed = [],
      body = svg("g", {}, root),
      front = svg("g", { "aria-hidden": "true" }, root);
    for (const mark of spec.marks) {
      const group = svg("g", { class: `mark ${mark.muted ? "muted" : ""}`, opacity: mark.opacity }, body);
      const colour = mark.colour || "var(--muted)";
      group.style.setProperty("--mark", colour);
      if (mark.kind === "area") {
        const full = mark.points.filter((p) => p.low != null && p.high != null);
        const d =
          path(full, (p) => [x.place(p.x), y.place(p.high)]) +
          path([...full].reverse(), (p) => [x.place(p.x), y.place(p.low)]).replace(/^M/, "L");
        if (full.length) svg("path", { d: `${d}Z`, class: "area" }, group);
      } else if (mark.kind === "bars") {
        for (const p of mark.points) {
          svg(
            "rect",
            {
              x: x.place(p.x0) + 1,
              width: Math.max(x.place(p.x1) - x.place(p.x0) - 2, 1),
              y: y.place(p.y),
              height: Math.max(frame.bottom - y.place(p.y), 0),
              class: "bar",
            },
            group,
          );
        }
      } else if (mark.kind === "guide") {
        const vertical = mark.x != null;
        const [x1, y1, x2, y2] = mark.from
          ? [x.place(mark.from[0]), y.place(mark.from[1]), x.place(mark.to[0]), y.place(mark.to[1])]
          : vertical
            ? [x.place(mark.x), frame.top, x.place(mark.x), frame.bottom]
            : [left, y.place(mark.y), frame.right, y.place(mark.y)];
        svg("line", { x1, y1, x2, y2, class: "guide" }, group);
        if (mark.label)
          labels.push({
            x: mark.at === "end" ? x2 : x1,
            y: vertical ? frame.top + 4 : y1 - 7,
            text: mark.label,
            colour: "var(--muted)",
            gap: 4,
          });
      } else if (mark.kind === "stems") {
        for (const p of mark.points)
          svg(
            "line",
            { x1: x.place(p.x), x2: x.place(p.x), y1: y.place(p.y0), y2: y.place(p.y1), class: "stem" },
            group,
          );
      } else if (mark.kind === "text") {
        svg(
          "text",
          { x: left + 2, y: y.place(mark.y), class: "lane", style: `fill:${colour}` },
          group,
          cut(mark.text, frame.right - left - 4, 13.5),
        );
      } else if (mark.kind === "line") {
        crossed.push(...along(mark.points.map(at)));
        svg(
          "path",
          { d: path(mark.points, at), class: "line", "stroke-dasharray": mark.dash, "stroke-width": mark.width },
          group,
        );
        if (mark.markers) {
          mark.points.forEach((p, i) => {
            const place = at(p);
            const first = mark.hollowStart && i === 0;
            if (!place) return;
            svg("path", { d: SHAPES.circle(...place, first ? 2.8 : 2.4), class: first ? "dot hollow" : "dot" }, group);
          });
        }
      } else if (mark.kind === "points") {
        for (const p of mark.points) {
          const place = at(p);
          if (!place) continue;
          const shape = p.shape || mark.shape || "circle",
            size = p.size || mark.size || 4;
          svg(
            "path",
            { d: SHAPES[shape](...place, size), class: shape === "tick" ? "rug" : mark.hollow ? "dot hollow" : "dot" },
            group,
          );
          taken.push({ x: place[0] - size, y: place[1] - size, width: 2 * size, height: 2 * size });
          if (p.name)
            labels.push({
              x: place[0],
              y: place[1],
              text: p.name,
              colour: mark.labelColour || colour,
              only: mark.only,
              gap: mark.only ? size + 1 : 7,
            });
        }
      }
      const hot = (mark.points || []).filter((p) => p.tip && at(p)).map((p) => ({ place: at(p), tip: p.tip }));
      if (hot.length) series.push({ name: mark.name || "", hot, group, colour });
      const places = mark.end ? mark.points.map(at).filter(Boolean).reverse() : [];
      if (places.length && spec.inside) {
        // Beside its last point, else its first, else any between.
        places.splice(1, 0, ...places.splice(-1));
        labels.unshift({ places, text: mark.end, colour });
      } else if (places.length) ends.push({ x: places[0][0], y: places[0][1], text: mark.end, colour });
    }
    placeEnds(ends, frame, front);
    placeLabels(labels, frame, front, taken, crossed);
    const ring = svg("circle", { r: 6, class: "ring", visibility: "hidden" }, root);

    let active = null;
    const show = (s, i, spoken) => {
      active = { s, i };
      const { hot, group, colour } = series[s];
      const [px, py] = hot[i].place;
      root.classList.add("active");
      for (const other of series) other.group.classList.toggle("on", other.group === group);
      ring.setAttribute("cx", px);
      ring.setAttribute("cy", py);
      ring.setAttribute("visibility", "visible");
      ring.style.setProperty("--mark", colour);
      const box = root.getBoundingClientRect(),
        zoom = box.width / width;
      showTip(box, px * zoom, py * zoom, hot[i].tip, colour);
      if (spoken) live.textContent = [hot[i].tip.title, ...(hot[i].tip.rows || []).map((r) => r.join(": "))].join(", ");
    };
    const hide = () => {
      active = null;
      tip.hidden = true;
      root.classList.remove("active");
      ring.setAttribute("visibility", "hidden");
    };
    const nearest = (event) => {
      const box = root.getBoundingClientRect(),
        zoom = width / box.width;
      const mx = (event.clientX - box.left) * zoom,
        my = (event.clientY - box.top) * zoom;
      let best = null,
        least = NEAR ** 2;
      series.forEach((one, s) =>
        one.hot.forEach(({ place }, i) => {
          const distance = (place[0] - mx) ** 2 + (place[1] - my) ** 2;
          if (distance < least) [best, least] = [[s, i], distance];
        }),
      );
      if (best) show(...best, false);
      else hide();
    };
    root.addEventListener("pointermove", nearest);
    root.addEventListener("pointerdown", nearest);
    root.addEventListener("pointerleave", hide);
    root.addEventListener("blur", hide);
    root.addEventListener("keydown", (event) => {
      if (!series.length) return;
      const step = {
        ArrowRight: [0, 1],
        ArrowLeft: [0, -1],
        ArrowUp: [-1, 0],
        ArrowDown: [1, 0],
        Home: [0, -Infinity],
        End: [0, Infinity],
      }[event.key];
      if (event.key === "Escape") hide();
      if (!step) return;
      event.preventDefault();
      if (!active) {
        show(0, 0, true);
        return;
      }
      const s = (active.s + step[0] + series.length) % series.length;
      // Between series, to the point nearest in x.
      const here = series[active.s].hot[active.i].place[0];
      const beside = (hot) =>
        hot.reduce((b, p, i) => (Math.abs(p.place[0] - here) < Math.abs(hot[b].place[0] - here) ? i : b), 0);
      const i = step[0] ? beside(series[s].hot) : Math.max(0, Math.min(active.i + step[1], series[s].hot.length - 1));
      show(s, i, true);
    });
    host.replaceChildren(root);
  }

  // Charts side by side where there is room: [{title, note, spec}].
  const drawn = new Map();
  const watcher = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const entry = drawn.get(target);
      if (!entry) continue;
      if (!target.isConnected) {
        drawn.delete(target);
        watcher.unobserve(target);
        continue;
      }
      if (Math.abs(target.clientWidth - entry.width) > 1) {
        entry.width = target.clientWidth;
        draw(target, entry.spec);
      }
    }
  });
  function facets(host, list, wide = list.length === 1) {
    const grid = document.createElement("div");
    grid.className = wide ? "facets one" : "facets";
    host.replaceChildren(grid);
    for (const { title, note, spec } of list) {
      const box = document.createElement("div");
      box.className = "facet";
      if (title) box.append(Object.assign(document.createElement("h4"), { textContent: title }));
      if (note) box.append(Object.assign(document.createElement("p"), { textContent: note }));
      const plot = document.createElement("div");
      plot.className = "plot";
      box.append(plot);
      grid.append(box);
      drawn.set(plot, { spec, width: plot.clientWidth });
      draw(plot, spec);
      watcher.observe(plot);
    }
  }
  return { facets, number, percent, count, power };
})();
