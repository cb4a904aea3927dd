// What charts are made of: ticks, scales, formats, paths, and labels that keep clear of what is there.
const Parts = (() => {
  const NS = "http://www.w3.org/2000/svg";
  const pen = document.createElement("canvas").getContext("2d");

  function svg(tag, attributes = {}, parent = null, text = null) {
    const node = document.createElementNS(NS, tag);
    for (const [key, value] of Object.entries(attributes)) if (value != null) node.setAttribute(key, value);
    if (text !== null) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  }

  function textWidth(text, size = 12) {
    pen.font = `${size}px ${getComputedStyle(document.body).fontFamily}`;
    return pen.measureText(text).width;
  }

  // A name cut to a width.
  function cut(text, width, size = 12) {
    if (textWidth(text, size) <= width) return text;
    let kept = [...text];
    while (kept.length > 1 && textWidth(`${kept.join("")}…`, size) > width) kept = kept.slice(0, -1);
    return `${kept.join("")}…`;
  }

  function niceTicks(min, max, count) {
    const rough = (max - min) / Math.max(count, 1);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
    const ticks = [];
    for (let i = Math.ceil(min / step - 1e-9); i * step <= max + step * 1e-9; i++)
      ticks.push(+(i * step).toPrecision(12));
    return ticks;
  }

  function logTicks(min, max, count) {
    const low = Math.ceil(Math.log10(min) - 1e-9),
      high = Math.floor(Math.log10(max) + 1e-9);
    // Of one power of ten or two, parts are written too.
    if (high - low < 2) {
      return (high - low < 1 ? [1, 2, 3, 5] : [1, 2, 5])
        .flatMap((m) => [low - 1, low, high].map((e) => +(m * 10 ** e).toPrecision(3)))
        .filter((t, i, all) => t >= min * 0.999 && t <= max * 1.001 && all.indexOf(t) === i)
        .sort((a, b) => a - b);
    }
    const every = Math.max(1, Math.ceil((high - low + 1) / Math.max(count, 2)));
    const ticks = [];
    for (let e = low; e <= high; e += every) ticks.push(10 ** e);
    return ticks;
  }

  function scaleOf(axis, from, to) {
    const f = axis.log ? Math.log10 : (v) => v;
    const low = f(axis.min),
      span = f(axis.max) - low || 1;
    const place = (v) => from + ((f(v) - low) / span) * (to - from);
    // A logarithmic axis may leave out what is too small for it; there is no place for that.
    return { place, inside: (v) => v != null && (!axis.log || v >= axis.min * 0.999) };
  }

  const number = (v) => {
    if (v == null) return "–";
    const size = Math.abs(v);
    if (size >= 1e4) return Math.round(v).toLocaleString("en");
    if (size && size < 1e-3) return v.toExponential(1);
    if (size < 1 && size >= 0.9995) return v > 0 ? "> 0.999" : "< -0.999"; // not quite 1
    return String(+v.toPrecision(3));
  };
  const percent = (v) => {
    if (v == null) return "–";
    const p = 100 * v;
    if (p && Math.abs(p) < 1e-6) return `${p.toExponential(0)}%`;
    if (p < 100 && p >= 99.95) return "> 99.9%";
    return `${+p.toPrecision(Math.abs(p) >= 10 ? 3 : 2)}%`;
  };
  const count = (v) => (v == null ? "–" : Math.round(v).toLocaleString("en"));
  const power = (v) => (v >= 1e6 ? `${v / 1e6}M` : v >= 1e3 ? `${v / 1e3}k` : String(+v.toPrecision(3)));

  function path(points, place) {
    let d = "",
      open = false;
    for (const p of points) {
      const at = place(p);
      if (!at) {
        open = false;
        continue;
      }
      d += `${open ? "L" : "M"}${at[0].toFixed(1)} ${at[1].toFixed(1)}`;
      open = true;
    }
    return d;
  }

  const SHAPES = {
    circle: (x, y, r) => `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`,
    diamond: (x, y, r) => `M${x} ${y - 1.45 * r}L${x + 1.45 * r} ${y}L${x} ${y + 1.45 * r}L${x - 1.45 * r} ${y}Z`,
    square: (x, y, r) => `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}Z`,
    tick: (x, y, r) => `M${x} ${y - r}V${y + r}`,
  };

  // Labels go to the first place beside their point that is free of points, lines and other labels; if there is none, lines
  // may be crossed; if there is none then, the label stays away. A line offers several points, the best first.
  function placeLabels(labels, frame, parent, points, lines) {
    const taken = [...points];
    const meet = (a, b) => a.x < b.x + b.width && b.x < a.x + a.width && a.y < b.y + b.height && b.y < a.y + a.height;
    for (const label of labels) {
      const width = textWidth(label.text, 11.5) + 2;
      const height = 14;
      const gap = label.gap ?? 7;
      const around = ([px, py]) => {
        const [right, left, middle, above] = [px + gap, px - gap - width, py - height / 2, py - gap - height];
        const centre = Math.min(Math.max(px - width / 2, frame.left), frame.width - width);
        if (label.only === "above") return [[centre, above]];
        return [
          [right, middle],
          [left, middle],
          [centre, above],
          [centre, py + gap],
          [right, py - height - 2],
          [right, py + 2],
          [left, py - height - 2],
          [left, py + 2],
        ];
      };
      const boxes = (label.places || [[label.x, label.y]])
        .flatMap(around)
        .map(([x, y]) => ({ x, y, width, height }))
        .filter((box) => box.x >= frame.left - 2 && box.x + width <= frame.width)
        .filter((box) => box.y >= frame.top - 12 && box.y + height <= frame.bottom + 2)
        .filter((box) => !taken.some((other) => meet(box, other)));
      const spot = boxes.find((box) => !lines.some((other) => meet(box, other))) || boxes[0];
      if (!spot) continue;
      taken.push(spot);
      svg(
        "text",
        { x: spot.x + 1, y: spot.y + 11, class: "direct", style: `fill:${label.colour}` },
        parent,
        label.text,
      );
    }
  }

  // Names of lines, right of where each ends: in the order of the ends, one below the other where they would meet.
  function placeEnds(ends, frame, parent) {
    const step = 14;
    const columns = [];
    for (const end of [...ends].sort((a, b) => a.x - b.x)) {
      const column = columns.find((c) => Math.abs(c[0].x - end.x) < 30);
      if (column) column.push(end);
      else columns.push([end]);
    }
    for (const column of columns) {
      column.sort((a, b) => a.y - b.y);
      let y = -Infinity;
      const lines = column.map((end) => (y = Math.max(end.y, y + step)));
      const low = frame.bottom + 4;
      for (let i = lines.length - 1, most = low; i >= 0; i--, most -= step) lines[i] = Math.min(lines[i], most);
      column.forEach((end, i) =>
        svg("text", { x: end.x + 8, y: lines[i] + 4, class: "direct", style: `fill:${end.colour}` }, parent, end.text),
      );
    }
  }

  // Small boxes along a line, for labels to keep clear of.
  function along(points) {
    const boxes = [];
    points.forEach((p, i) => {
      const q = points[i + 1];
      if (!p || !q) return;
      const steps = Math.ceil(Math.hypot(q[0] - p[0], q[1] - p[1]) / 6) || 1;
      for (let k = 0; k <= steps; k++) {
        const x = p[0] + ((q[0] - p[0]) * k) / steps;
        const y = p[1] + ((q[1] - p[1]) * k) / steps;
        boxes.push({ x: x - 1, y: y - 1, width: 2, height: 2 });
      }
    });
    return boxes;
  }

  return {
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
  };
})();
