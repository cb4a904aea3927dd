// Shape over temperature, and reliability on text.
(() => {
  const { data, colour, share, shareUpTo, several, shown, prefixed, panel, lines, end } = Page;
  const { number, percent, count } = Chart;

  // Shape over temperature.
  panel("fig-shape", data.shape, () => (host) => {
    const runs = shown(data.shape);
    Chart.facets(
      host,
      [
        ["valid_mass", "Valid mass", "probability of all valid tokens together", percent],
        ["kl", "Distance from the target", "KL(w || p) in nats, invalid tokens included", number],
        [
          "kl_valid",
          "Distance among the valid tokens",
          "KL(w || p on the valid tokens) in nats, where there are several",
          number,
        ],
        [
          "evenness",
          "Evenness",
          "equally likely tokens with the same entropy, as a share of the valid ones, where there are several",
          percent,
        ],
        [
          "expected_distinct",
          "Distinct valid tokens drawn",
          `expected in ${data.draws || "as many draws as there are valid tokens"}${data.draws ? " draws" : ""}, as a share of the valid ones`,
          percent,
        ],
        ["entropy", "Entropy", "of all next tokens, in nats", number],
      ].map(([key, title, note, format]) => {
        const means = runs.flatMap(([, s]) => s.measures[key].mean).filter((v) => v > 0);
        // A distance that is far greater at one temperature than at most hides all others on a linear axis.
        const middle = [...means].sort((a, b) => a - b)[means.length >> 1];
        const steep = format === number && Math.max(...means) > 20 * middle;
        const low = steep ? Math.min(...means) * 0.7 : 0;
        const highs = runs
          .flatMap(([, s]) => [...s.measures[key].high, ...s.measures[key].mean])
          .filter((v) => v != null);
        return {
          title,
          note: steep ? `${note}, logarithmic` : note,
          spec: {
            label: `${title} over temperature`,
            x: { label: "temperature", min: 0, max: Math.max(...runs.flatMap(([, s]) => s.temperatures), 1) },
            y:
              format === percent
                ? shareUpTo(highs)
                : { log: steep, min: low, max: Math.max(...highs, 1e-9) * 1.05, format },
            marks: runs.flatMap(([run, s]) => {
              const m = s.measures[key];
              return [
                {
                  kind: "area",
                  colour: colour(run),
                  points: s.temperatures.map((x, i) => ({
                    x,
                    low: m.low[i] == null ? null : Math.max(m.low[i], low),
                    high: m.high[i] == null ? null : Math.max(m.high[i], low),
                  })),
                },
                lines({
                  name: data.runs[run],
                  colour: colour(run),
                  end: end(run),
                  points: s.temperatures.map((x, i) => ({
                    x,
                    y: m.mean[i],
                    tip: {
                      title: prefixed(run, `T = ${x}`),
                      rows: [
                        ["mean", format(m.mean[i])],
                        ["middle half", `${format(m.low[i])} to ${format(m.high[i])}`],
                      ],
                    },
                  })),
                }),
              ];
            }),
          },
        };
      }),
    );
  });

  panel(
    "fig-reliability",
    data.reliability,
    () => (host) => {
      Chart.facets(
        host,
        shown(data.reliability).map(([run, bins]) => ({
          title: several ? data.runs[run] : "",
          spec: {
            label: `Reliability diagram, ${data.runs[run]}`,
            x: { ...share, label: "confidence" },
            y: { ...share, label: "accuracy" },
            marks: [
              { kind: "bars", points: bins.map((b) => ({ x0: b.lower, x1: b.upper, y: b.share })) },
              { kind: "guide", from: [0, 0], to: [1, 1] },
              {
                kind: "stems",
                colour: colour(run),
                points: bins.map((b) => ({ x: b.confidence, y0: b.confidence, y1: b.accuracy })),
              },
              lines({
                name: "accuracy",
                colour: colour(run),
                points: bins.map((b) => ({
                  x: b.confidence,
                  y: b.accuracy,
                  tip: {
                    title: `confidence ${percent(b.lower)} to ${percent(b.upper)}`,
                    rows: [
                      ["accuracy", percent(b.accuracy)],
                      ["mean confidence", percent(b.confidence)],
                      ["tokens", count(b.count)],
                      ["share of tokens", percent(b.share)],
                    ],
                  },
                })),
              }),
            ],
          },
        })),
        false,
      );
    },
    "titles",
  );
})();
