// The page: its data, and panels, which are figures with controls that draw themselves again when something is chosen.
// Text from the runs reaches the page as text content alone.
const Page = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { number, percent, count, power } = Chart;
  const hidden = new Set(); // runs that are switched off
  const panels = [];
  const colour = (run) => `var(--run-${run % 8})`;
  const share = { min: 0, max: 1, format: percent, ticks: [0, 0.25, 0.5, 0.75, 1] };
  // Shares stand on one scale, 0 to 100%, unless all of them are so small that nothing could be seen there.
  const shareUpTo = (values) => {
    const most = Math.max(...values.filter((v) => v != null), 0);
    if (most > 0.4 || !most) return share;
    const power = 10 ** Math.floor(Math.log10(most));
    const max = [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].map((m) => m * power).find((m) => m >= most * 0.999);
    return { min: 0, max, format: percent };
  };
  // Shares on a logarithmic axis, at most so many powers of ten; what is smaller is left out.
  const shareLog = (values, decades = 5) => {
    const some = values.filter((v) => v > 0);
    if (!some.length) return share;
    const most = Math.max(...some);
    const power = 10 ** Math.floor(Math.log10(most));
    const max = Math.min(1, [1, 2, 5, 10].map((m) => m * power).find((m) => m >= most * 0.999));
    const low = 10 ** Math.floor(Math.log10(Math.min(...some) * 1.001));
    return { log: true, min: Math.max(low, max / 10 ** decades), max, format: percent };
  };
  const axes = [
    { value: false, label: "linear" },
    { value: true, label: "logarithmic" },
  ];
  const several = data.runs.length > 1;

  function element(tag, attributes = {}, ...children) {
    const node = Object.assign(document.createElement(tag), attributes);
    node.append(...children);
    return node;
  }

  // Runs that have something to show: [[index, value]].
  const shown = (values) => values.map((value, i) => [i, value]).filter(([i, value]) => value && !hidden.has(i));
  const prefixed = (run, text) => (several ? `${data.runs[run]}, ${text}` : text);

  // `names`: where the runs are named, "direct" beside their lines, in a "key", or by the charts' "titles".
  // A panel is a figure with controls and a place for charts; it is drawn again when a control or the set of runs changes.
  function panel(id, values, build, names = "direct") {
    const figure = document.getElementById(id);
    if (!figure || !values.some(Boolean)) return;
    const controls = element("div", { className: "controls" }),
      host = element("div", { className: "charts" });
    figure.prepend(controls, host);
    const state = {};
    const redraw = () => {
      draw(host);
      key(host, names === "key" || (names === "direct" && !direct));
    };
    const draw = build({
      state,
      redraw,
      choose: (name, label, options, initial) => choose(controls, state, name, label, options, initial, redraw),
    });
    if (!controls.children.length) controls.remove();
    panels.push(redraw);
    redraw();
  }

  function choose(controls, state, name, label, options, initial, redraw) {
    state[name] = options.some((o) => o.value === initial) ? initial : options[0].value;
    if (options.length < 2) return;
    const pick = (value) => {
      state[name] = value;
      redraw();
    };
    if (options.length <= 3) {
      const group = element("fieldset", {}, element("legend", { textContent: label }));
      const segment = element("span", { className: "segment" });
      for (const option of options) {
        const input = element("input", {
          type: "radio",
          name: `${name}-${panels.length}`,
          checked: option.value === state[name],
        });
        input.addEventListener("change", () => pick(option.value));
        segment.append(element("label", {}, input, option.label));
      }
      group.append(segment);
      controls.append(group);
      return;
    }
    const select = element("select");
    select.dataset.control = name;
    options.forEach((option, i) =>
      select.append(element("option", { value: i, textContent: option.label, selected: option.value === state[name] })),
    );
    select.addEventListener("change", () => pick(options[select.value].value));
    controls.append(element("label", {}, label, select));
  }

  const rulesOf = (lists) => {
    const found = new Map();
    for (const list of lists)
      for (const entry of list || [])
        if (!found.has(entry.rule)) found.set(entry.rule, { value: entry.rule, label: entry.label });
    return [...found.values()];
  };
  // The families of the rules in some lists of entries, the references apart.
  const references = ["no cutoff", "size oracle"];
  const familiesOf = (entries) => [...new Set(entries.map((e) => e.family))].filter((f) => !references.includes(f));
  const temperatureOptions = (all) =>
    [...new Set(all)].sort((a, b) => a - b).map((t) => ({ value: t, label: `T = ${t}` }));
  const lines = (mark) => ({ kind: "line", markers: true, ...mark });
  // Names of runs stand at the ends of their lines where there is room for them, else in a key above the charts.
  const direct = data.runs.length <= 4 && data.runs.every((name) => name.length <= 16);
  const end = (run) => (several && direct ? data.runs[run] : null);
  function key(host, needed) {
    if (!several || !needed) return;
    const list = element("ul", { className: "key" });
    data.runs.forEach((name, run) => {
      if (hidden.has(run)) return;
      const item = element("li", { className: "run", textContent: name });
      item.style.setProperty("--mark", colour(run));
      list.append(item);
    });
    host.prepend(list);
  }

  const visible = (text) =>
    text
      .replace(/\n/g, "⏎")
      .replace(/\t/g, "⇥")
      .replace(/\r/g, "␍")
      .replace(/^ | $/g, "␣")
      .replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (c) => `<U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}>`) ||
    "(empty)";

  // Runs can be switched off; the last one stays.
  function connectRuns() {
    for (const button of document.querySelectorAll(".runs button")) {
      button.addEventListener("click", () => {
        const run = Number(button.dataset.run);
        if (hidden.has(run)) hidden.delete(run);
        else if (hidden.size < data.runs.length - 1) hidden.add(run);
        button.setAttribute("aria-pressed", String(!hidden.has(run)));
        panels.forEach((redraw) => redraw());
      });
    }
  }

  return {
    data,
    colour,
    share,
    shareUpTo,
    shareLog,
    axes,
    several,
    hidden,
    element,
    shown,
    prefixed,
    panel,
    rulesOf,
    references,
    familiesOf,
    temperatureOptions,
    lines,
    end,
    visible,
    connectRuns,
  };
})();
