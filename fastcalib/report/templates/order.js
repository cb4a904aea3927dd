// Order: the frontier of precision and recall, and where the cutoff rules land beside it.
(() => {
  const { share, shareLog, axes, data, colour, several, shown, prefixed, panel } = Page;
  const { familiesOf, references, temperatureOptions } = Page;
  const { number, percent, count } = Chart;

  // How many prefixes each run has, in the order of the runs.
  function prefixNote(groups) {
    const numbers = groups.map(([, g]) => count(g.prefixes));
    const same = numbers.every((n) => n === numbers[0]);
    const text = same ? numbers[0] : `${numbers.slice(0, -1).join(", ")} and ${numbers.at(-1)}`;
    return `${text} prefix${text === "1" ? "" : "es"}`;
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
  const dot = (row, i, name) => ({
    x: row.recall[i],
    y: row.precision[i],
    name: name ? row.label : null,
    tip: {
      title: row.label,
      rows: [
        ["precision", percent(row.precision[i])],
        ["recall of answers", percent(row.recall[i])],
        ["recall of tokens", percent(row.token_recall[i])],
        ["tokens kept, mean", number(row.kept[i])],
        ["mass kept", percent(row.kept_mass[i])],
      ],
    },
  });

  function rulesMarks(run, rows, i, chosen) {
    const frontier = (data.frontiers[run] || []).find((g) => g.depth === null);
    const marks = [];
    if (frontier)
      marks.push({
        kind: "line",
        name: "frontier",
        colour: "var(--line)",
        width: 5,
        points: data.grid.map((x, k) => ({ x, y: frontier.answers.mean[k] })),
      });
    const families = [...new Set(rows.map((r) => r.family))];
    // The chosen family last, so that it lies above the others.
    for (const family of families.sort((a, b) => (a === chosen) - (b === chosen))) {
      const own = rows.filter((r) => r.family === family);
      const oracle = family === "size oracle";
      const faint = chosen && family !== chosen && !references.includes(family);
      if (family === chosen)
        marks.push({ kind: "line", name: family, colour: colour(run), width: 1, points: own.map((r) => dot(r, i)) });
      marks.push({
        kind: "points",
        name: family,
        colour: oracle ? "var(--ink)" : faint ? "var(--muted)" : colour(run),
        opacity: faint ? 0.4 : null,
        labelColour: "var(--soft)",
        shape: oracle ? "diamond" : "circle",
        size: oracle ? 5 : faint ? 3 : 4.5,
        points: own.map((r) => dot(r, i, !faint)),
      });
    }
    return marks;
  }

  panel(
    "fig-rules",
    data.rules,
    ({ state, choose }) => {
      choose("t", "Temperature", temperatureOptions(data.rules.flatMap((r) => (r ? r.temperatures : []))), 1);
      const families = familiesOf(data.rules.flatMap((r) => (r ? r.rows : [])));
      const options = [{ value: null, label: "every family" }, ...families.map((f) => ({ value: f, label: f }))];
      if (families.length > 1) choose("family", "Rules", options, null);
      choose("log", "Precision axis", axes, false);
      return (host) => {
        const found = shown(data.rules);
        const precision = found.flatMap(([run, table]) => [
          ...table.rows.map((row) => row.precision[table.temperatures.indexOf(state.t)]),
          ...(data.frontiers[run] || []).filter((g) => g.depth === null).flatMap((g) => g.answers.mean),
        ]);
        Chart.facets(
          host,
          found.map(([run, table]) => {
            const i = table.temperatures.indexOf(state.t);
            return {
              title: several ? data.runs[run] : "",
              spec: {
                label: `Precision and recall of each rule, ${data.runs[run]}, temperature ${state.t}`,
                x: { ...share, label: "recall of answers" },
                y: { ...(state.log ? shareLog(precision) : share), label: "precision" },
                height: several ? null : 430,
                marks: rulesMarks(run, i < 0 ? [] : table.rows, i, state.family),
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
