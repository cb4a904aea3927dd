// One prefix: the head of the ranking, the ranks of the valid tokens, their probabilities, the fit.
(() => {
  const { data, colour, share, several, hidden, element, prefixed, panel, visible } = Page;
  const { number, percent, count } = Chart;

  // One prefix: the ranking, the ranks of the valid tokens, their probabilities, the fit.
  panel(
    "fig-prefix",
    data.prefixes.map(() => true),
    ({ state, choose }) => {
      choose(
        "prefix",
        "After",
        data.prefixes.map((p, i) => ({
          value: i,
          label: p.depth ? `“${visible(p.text)}”` : "the prompt (first token)",
        })),
        0,
      );
      return (host) => {
        const of = (part) =>
          data.details
            .map((list, run) => [run, hidden.has(run) ? null : list[state.prefix]])
            .filter(([, d]) => d && d[part]);
        host.replaceChildren();
        const add = (title, note) => {
          const place = element("div");
          host.append(
            element("h3", { textContent: title }),
            element("p", { className: "lead", textContent: note }),
            place,
          );
          return place;
        };
        for (const [run] of data.details
          .map((list, i) => [i, list[state.prefix]])
          .filter(([i, d]) => !d && !hidden.has(i))) {
          host.append(
            element("p", {
              className: "missing",
              textContent: `${data.runs[run]}: not a prefix of its answers (its tokens are cut differently), or not measured.`,
            }),
          );
        }
        tokens(add, of("top"));
        if (of("valid").length) ranks(add, of);
        if (of("valid").length) probabilities(add, of("valid"));
        if (of("fit").length && of("top").length) fits(add, of);
      };
    },
    "titles",
  );

  function tokens(add, runs) {
    if (!runs.length) return;
    const host = add("The most likely next tokens", "In order of rank; those with a frame are valid.");
    for (const [run, { top }] of runs) {
      const list = element("ol", { ariaLabel: `Most likely tokens, ${data.runs[run]}` });
      top.text.slice(0, 30).forEach((text, i) => {
        const item = element("li", {
          className: top.valid[i] ? "valid" : "",
          textContent: visible(text),
          title: `rank ${top.position[i] + 1}, ${top.valid[i] ? "valid" : "invalid"}, logit ${number(top.logit[i])}`,
        });
        item.append(
          element("span", { className: "visually-hidden", textContent: top.valid[i] ? " (valid)" : " (invalid)" }),
        );
        list.append(item);
      });
      const box = element(
        "div",
        { className: "tokens" },
        ...(several ? [element("h4", { className: "run", textContent: data.runs[run] })] : []),
        list,
      );
      box.style.setProperty("--mark", colour(run));
      host.append(box);
    }
  }

  function ranks(add, of) {
    const runs = of("valid");
    const host = add(
      "Ranks of the valid tokens",
      "Each tall stroke is a valid token at its rank among all tokens; short grey strokes are the invalid ones among the first " +
        `${Math.max(...runs.map(([, d]) => (d.top ? d.top.position.length : 0)))}. A perfect order has no valid token right of the ` +
        "diamond, which stands at the number of valid tokens.",
    );
    const most =
      Math.max(
        ...runs.flatMap(([, d]) => d.valid.greater),
        ...runs.map(([, d]) => (d.top ? Math.max(...d.top.position) : 0)),
        9,
      ) + 1;
    const marks = runs.flatMap(([run, d], lane) => {
      const y = runs.length - lane,
        v = d.valid;
      const tip = (i) => ({
        title: prefixed(run, visible(v.text[i])),
        rows: [
          ["rank", count(v.greater[i] + 1)],
          ...(v.equal[i] ? [["tied with", count(v.equal[i])]] : []),
          ["probability", percent(v.p[i])],
          ["target share", percent(v.w[i])],
        ],
      });
      const invalid = d.top ? d.top.position.map((p, i) => [p, i]).filter(([, i]) => !d.top.valid[i]) : [];
      return [
        { kind: "text", y: y + 0.47, text: several ? data.runs[run] : "valid", colour: colour(run) },
        {
          kind: "points",
          name: "valid",
          shape: "tick",
          size: 11,
          colour: colour(run),
          labelColour: "var(--soft)",
          only: "above",
          points: v.greater.map((g, i) => ({
            x: g + 1,
            y: y + 0.02,
            name: visible(v.text[i]).slice(0, 14),
            tip: tip(i),
          })),
        },
        {
          kind: "points",
          name: "invalid",
          shape: "tick",
          size: 5,
          colour: "var(--muted)",
          points: invalid.map(([p, i]) => ({
            x: p + 1,
            y: y - 0.24,
            tip: {
              title: prefixed(run, visible(d.top.text[i])),
              rows: [
                ["rank", count(p + 1)],
                ["", "invalid"],
              ],
            },
          })),
        },
        {
          kind: "points",
          name: "number of valid tokens",
          shape: "diamond",
          size: 4,
          colour: "var(--ink)",
          points: [
            {
              x: v.total,
              y: y - 0.24,
              tip: {
                title: "number of valid tokens",
                rows: [
                  ["tokens", count(v.total)],
                  ["", "where the size oracle cuts"],
                ],
              },
            },
          ],
        },
      ];
    });
    Chart.facets(
      host,
      [
        {
          spec: {
            label: "Ranks of the valid tokens",
            height: 66 + 96 * runs.length,
            x: { log: true, min: 1, max: most * 1.15, label: "rank among all tokens" },
            y: { min: 0.6, max: runs.length + 0.6, ticks: [], bare: true },
            marks,
          },
        },
      ],
      true,
    );
    for (const [run, d] of runs) {
      const v = d.valid,
        some =
          v.greater.length < v.total ? ` ${count(v.greater.length)} of ${count(v.total)} valid tokens are drawn.` : "";
      const o = d.order,
        text = o
          ? ` Recall at precision ${data.precision}: ${percent(o.recall_at_precision)}; average precision ${number(o.average_precision)}; AUROC ${number(o.auroc)}.`
          : "";
      if (some || text)
        host.append(
          element("p", {
            className: "lead",
            textContent: `${several ? `${data.runs[run]}: ` : ""}${some}${text}`.trim(),
          }),
        );
    }
  }

  function probabilities(add, runs) {
    const host = add(
      "Probabilities beside the target",
      "One dot a valid token, the one with most answers below it first: the model's probability at temperature 1, among the valid tokens alone. The grey line is the target, in proportion to the answers below. Dots above it are drawn too often.",
    );
    Chart.facets(
      host,
      runs.map(([run, { valid: v }]) => {
        const order = v.w.map((_, i) => i).sort((a, b) => v.w[b] - v.w[a] || v.p[b] - v.p[a]);
        const tip = (i) => ({
          title: prefixed(run, visible(v.text[i])),
          rows: [
            ["among the valid", percent(v.p[i] / v.mass)],
            ["target", percent(v.w[i])],
            ["of all tokens", percent(v.p[i])],
          ],
        });
        const all = [...v.w, ...v.p.map((p) => p / v.mass)].filter((p) => p > 1e-12);
        return {
          title: several ? data.runs[run] : "",
          note: `Valid tokens have ${percent(v.mass)} of all probability.`,
          spec: {
            label: `Probabilities of the valid tokens, ${data.runs[run]}`,
            inside: true,
            x: {
              min: 0.5,
              max: order.length + 0.5,
              label: "valid token, most answers below it first",
              format: count,
              ticks: order.length < 12 ? order.map((_, k) => k + 1) : null,
            },
            y: {
              log: true,
              min: 10 ** Math.floor(Math.log10(Math.min(...all))),
              max: 1,
              format: percent,
              label: "probability, logarithmic",
            },
            marks: [
              {
                kind: "line",
                name: "target",
                end: "target",
                colour: "var(--muted)",
                points: order.flatMap((i, k) => [
                  { x: k + 0.5, y: v.w[i] },
                  { x: k + 1.5, y: v.w[i] },
                ]),
              },
              {
                kind: "points",
                name: "model",
                colour: colour(run),
                size: order.length > 80 ? 2.5 : 4,
                points: order.map((i, k) => ({
                  x: k + 1,
                  y: v.p[i] / v.mass,
                  tip: tip(i),
                  name: order.length <= 32 ? visible(v.text[i]) : null,
                })),
              },
            ],
          },
        };
      }),
      runs.length === 1,
    );
  }

  function fits(add, of) {
    const host = add(
      "Logit against rank",
      "Logits of language models are said to fall with rank along a straight line up to a knee (bent here, as ranks stand on a logarithmic axis), then along a logarithm. The black line is the best fit of that form. Filled dots are valid tokens.",
    );
    Chart.facets(
      host,
      of("fit")
        .filter(([, d]) => d.top && d.fit.r_squared != null)
        .map(([run, d]) => {
          const f = d.fit,
            v = d.valid || { greater: [], logit: [], text: [] };
          const points = new Map();
          d.top.position.forEach((p, i) =>
            points.set(p + 1, { x: p + 1, y: d.top.logit[i], valid: d.top.valid[i], text: d.top.text[i] }),
          );
          v.greater.forEach((g, i) => {
            if (!points.has(g + 1)) points.set(g + 1, { x: g + 1, y: v.logit[i], valid: 1, text: v.text[i] });
          });
          const list = [...points.values()],
            most = Math.max(...list.map((p) => p.x), 10);
          const ranks = [...new Set(Array.from({ length: 120 }, (_, i) => Math.round(most ** (i / 119))))];
          const value = (k) => (k <= f.knee ? f.slope * k + f.intercept : f.scale + f.decay * Math.log(k + f.shift));
          const ys = list.map((p) => p.y),
            pad = (Math.max(...ys) - Math.min(...ys)) * 0.06 || 1;
          const clip = (y) => (y >= Math.min(...ys) - pad && y <= Math.max(...ys) + pad ? y : null);
          const dots = (valid) => ({
            kind: "points",
            name: valid ? "valid" : "invalid",
            hollow: !valid,
            size: valid ? 3.5 : 2.5,
            colour: valid ? colour(run) : "var(--muted)",
            points: list
              .filter((p) => !!p.valid === valid)
              .map((p) => ({
                ...p,
                tip: {
                  title: visible(p.text),
                  rows: [
                    ["rank", count(p.x)],
                    ["logit", number(p.y)],
                    ["", valid ? "valid" : "invalid"],
                  ],
                },
              })),
          });
          return {
            title: several ? data.runs[run] : "",
            note: `R² ${number(f.r_squared)} (1 is a perfect fit); knee at rank ${count(f.knee)}; beyond it the logit falls by ${number(-f.decay * Math.LN10)} with each factor of ten in rank.`,
            spec: {
              label: `Logit against rank, ${data.runs[run]}`,
              x: { log: true, min: 1, max: most * 1.1, label: "rank" },
              y: { min: Math.min(...ys) - pad, max: Math.max(...ys) + pad, label: "logit" },
              marks: [
                { kind: "guide", x: f.knee, label: "knee" },
                dots(false),
                dots(true),
                {
                  kind: "line",
                  name: "fit",
                  colour: "var(--ink)",
                  width: 1.5,
                  points: ranks.flatMap((k, i) => [
                    ...(ranks[i - 1] <= f.knee && k > f.knee ? [{ x: null, y: null }] : []),
                    { x: k, y: clip(value(k)) },
                  ]),
                },
              ],
            },
          };
        }),
    );
  }
})();
