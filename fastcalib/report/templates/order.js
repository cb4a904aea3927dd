// Order: the frontier of precision and recall, and where the cutoff rules land beside it.
(() => {
  const { share, data, colour, several, shown, prefixed, panel, temperatureOptions } = Page;
  const { number, percent, count } = Chart;

  function prefixNote(groups) {
    const same = groups.every(([, g]) => g.prefixes === groups[0][1].prefixes);
    return (same ? groups.slice(0, 1) : groups)
      .map(
        ([run, g]) => `${same ? "" : `${data.runs[run]}: `}${count(g.prefixes)} prefix${g.prefixes === 1 ? "" : "es"}`,
      )
      .join(" · ");
  }

  // Precision against recall over all cutoffs, for all prefixes and for each depth.
  panel(
    "fig-frontier",
    data.frontiers,
    ({ state, choose }) => {
      choose(
        "by",
        "Recall counts",
        [
          { value: "answers", label: "answers" },
          { value: "tokens", label: "tokens" },
        ],
        "answers",
      );
      return (host) => {
        const runs = shown(data.frontiers);
        const depths = [...new Set(runs.flatMap(([, list]) => list.map((g) => g.depth)))].sort(
          (a, b) => (a ?? -1) - (b ?? -1),
        );
        const groupTitle = (depth) =>
          depth === null ? "All prefixes" : depth === 0 ? "First token" : `After ${depth} token${depth > 1 ? "s" : ""}`;
        Chart.facets(
          host,
          (depths.length > 2 ? depths : depths.slice(0, 1)).map((depth) => {
            const groups = runs.flatMap(([run, list]) => list.filter((g) => g.depth === depth).map((g) => [run, g]));
            return {
              title: groupTitle(depth),
              note: prefixNote(groups),
              spec: {
                label: `Precision against recall, ${groupTitle(depth)}`,
                x: { ...share, label: `recall of ${state.by}` },
                y: { ...share, label: "precision" },
                marks: groups.flatMap(([run, g]) => {
                  const curve = g[state.by],
                    recall = state.by === "answers" ? g.oracle[1] : g.oracle[2];
                  return [
                    {
                      kind: "area",
                      colour: colour(run),
                      points: data.grid.map((x, i) => ({ x, low: curve.low[i], high: curve.high[i] })),
                    },
                    {
                      kind: "line",
                      name: `${data.runs[run]} frontier`,
                      colour: colour(run),
                      points: data.grid.map((x, i) => ({
                        x,
                        y: curve.mean[i],
                        tip: {
                          title: prefixed(run, "best cutoff"),
                          rows: [
                            ["recall at least", percent(x)],
                            ["precision, mean", percent(curve.mean[i])],
                            ["middle half", `${percent(curve.low[i])} to ${percent(curve.high[i])}`],
                          ],
                        },
                      })),
                    },
                    {
                      kind: "points",
                      name: "size oracle",
                      shape: "diamond",
                      size: 5,
                      colour: colour(run),
                      points: [
                        {
                          x: recall,
                          y: g.oracle[0],
                          name: run === runs[0][0] ? "size oracle" : null,
                          tip: {
                            title: prefixed(run, "size oracle"),
                            rows: [
                              ["precision", percent(g.oracle[0])],
                              ["recall", percent(recall)],
                            ],
                          },
                        },
                      ],
                    },
                  ];
                }),
              },
            };
          }),
        );
      };
    },
    "key",
  );

  // Where each rule lands.
  panel(
    "fig-rules",
    data.rules,
    ({ state, choose }) => {
      choose("t", "Temperature", temperatureOptions(data.rules.flatMap((r) => (r ? r.temperatures : []))), 1);
      return (host) => {
        Chart.facets(
          host,
          shown(data.rules).map(([run, table]) => {
            const i = table.temperatures.indexOf(state.t);
            const frontier = (data.frontiers[run] || []).find((g) => g.depth === null);
            const rows = i < 0 ? [] : table.rows;
            return {
              title: several ? data.runs[run] : "",
              spec: {
                label: `Precision and recall of each rule, ${data.runs[run]}, temperature ${state.t}`,
                x: { ...share, label: "recall of answers" },
                y: { ...share, label: "precision" },
                height: several ? null : 430,
                marks: [
                  ...(frontier
                    ? [
                        {
                          kind: "line",
                          name: "frontier",
                          colour: "var(--line)",
                          width: 5,
                          points: data.grid.map((x, k) => ({ x, y: frontier.answers.mean[k] })),
                        },
                      ]
                    : []),
                  ...[...new Set(rows.map((r) => r.family))].map((family) => ({
                    kind: "points",
                    name: family,
                    colour: family === "size oracle" ? "var(--ink)" : colour(run),
                    labelColour: "var(--soft)",
                    shape: family === "size oracle" ? "diamond" : "circle",
                    size: family === "size oracle" ? 5 : 4.5,
                    points: rows
                      .filter((r) => r.family === family)
                      .map((r) => ({
                        x: r.recall[i],
                        y: r.precision[i],
                        name: r.label,
                        tip: {
                          title: r.label,
                          rows: [
                            ["precision", percent(r.precision[i])],
                            ["recall of answers", percent(r.recall[i])],
                            ["recall of tokens", percent(r.token_recall[i])],
                            ["tokens kept, mean", number(r.kept[i])],
                            ["mass kept", percent(r.kept_mass[i])],
                          ],
                        },
                      })),
                  })),
                ],
              },
            };
          }),
          !several,
        );
      };
    },
    "titles",
  );
})();
