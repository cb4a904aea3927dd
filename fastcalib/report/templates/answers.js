// Whole answers: validity and diversity, and how losses compound over the tokens.
(() => {
  const { data, colour, share, several, shown, prefixed, panel, rulesOf, temperatureOptions, lines, end } = Page;
  const { number, percent, count } = Chart;

  // Validity against diversity, a chart for each family of rules.
  const answerNote = (run, diversity) =>
    data.answers[run]
      ? [["as varied as", `${number(diversity * data.answers[run])} of ${count(data.answers[run])}`]]
      : [];
  const sequencePoint = (run, entry, i) => ({
    x: entry.diversity[i],
    y: entry.validity[i],
    tip: {
      title: prefixed(run, `${entry.label}, T = ${entry.temperature[i]}`),
      rows: [
        ["validity", percent(entry.validity[i])],
        ["diversity", percent(entry.diversity[i])],
        ...answerNote(run, entry.diversity[i]),
      ],
    },
  });
  panel(
    "fig-val-div",
    data.sequence,
    ({ state, choose }) => {
      choose(
        "scale",
        "Diversity axis",
        [
          { value: false, label: "linear" },
          { value: true, label: "logarithmic" },
        ],
        false,
      );
      const hints = {
        "top-k": "keeps the k most likely tokens",
        "top-p": "keeps the most likely tokens up to this mass",
        "min-p": "keeps tokens at least this share as likely as the best",
        epsilon: "keeps tokens at least this likely",
        eta: "epsilon, lowered where the model is unsure",
        "top-n-sigma": "keeps logits within n standard deviations of the best",
      };
      return (host) => {
        const runs = shown(data.sequence),
          every = runs.flatMap(([, list]) => list);
        const values = every.flatMap((entry) => entry.diversity).filter((v) => v > 0);
        const least = Math.min(...values, 1),
          most = Math.max(...values, 0);
        const x = {
          label: "diversity: share of the answers",
          format: percent,
          log: state.scale,
          min: state.scale ? 10 ** Math.floor(Math.log10(least)) : 0,
          max: state.scale ? 1 : Math.min(1, Math.ceil(most * 10.5) / 10),
        };
        const reference = ["no cutoff", "size oracle"];
        const families = [...new Set(every.map((entry) => entry.family))].filter((f) => !reference.includes(f));
        Chart.facets(
          host,
          (families.length ? families : [null]).map((family) => ({
            title: family || "No cutoff and size oracle",
            note: hints[family],
            spec: {
              label: `Validity against diversity, ${family || "no cutoff"}`,
              inside: true,
              x,
              y: { ...share, label: "validity" },
              marks: runs.flatMap(([run, list]) => {
                const own = list.filter((entry) => entry.family === family);
                return list
                  .filter((entry) => entry.family === family || reference.includes(entry.family))
                  .map((entry) =>
                    lines({
                      name: entry.rule,
                      colour:
                        entry.family === "size oracle" && !several
                          ? "var(--ink)"
                          : several || entry.family === family
                            ? colour(run)
                            : "var(--muted)",
                      opacity: entry.family === family ? 0.4 + (0.6 * (own.indexOf(entry) + 1)) / own.length : 1,
                      muted: entry.family !== family,
                      dash: { "no cutoff": "2 3", "size oracle": "6 3" }[entry.family],
                      end:
                        entry.family === family
                          ? String(entry.parameter ?? entry.label)
                          : run === runs[0][0]
                            ? entry.label
                            : null,
                      points: entry.temperature.map((_, i) => sequencePoint(run, entry, i)),
                    }),
                  );
              }),
            },
          })),
        );
      };
    },
    "key",
  );

  panel("fig-temperature", data.sequence, ({ state, choose }) => {
    choose("rule", "Rule", rulesOf(data.sequence), "none");
    return (host) => {
      const runs = shown(data.sequence).flatMap(([run, list]) =>
        list.filter((entry) => entry.rule === state.rule).map((entry) => [run, entry]),
      );
      const all = runs.flatMap(([, entry]) => entry.temperature);
      Chart.facets(
        host,
        [
          ["validity", "chance that a sample is valid"],
          ["diversity", "variety of the valid samples, share of the answers"],
        ].map(([key, note]) => ({
          title: key[0].toUpperCase() + key.slice(1),
          note,
          spec: {
            label: `${key} over temperature`,
            x: { label: "temperature", min: 0, max: Math.max(...all, 1) },
            y: share,
            marks: runs.map(([run, entry]) =>
              lines({
                name: data.runs[run],
                colour: colour(run),
                end: end(run),
                points: entry.temperature.map((t, i) => ({ ...sequencePoint(run, entry, i), x: t, y: entry[key][i] })),
              }),
            ),
          },
        })),
      );
    };
  });

  // Compounding: what each token costs, and what is left after so many.
  panel("fig-compounding", data.compounding, ({ state, choose }) => {
    choose("rule", "Rule", rulesOf(data.compounding), "size_oracle");
    choose(
      "t",
      "Temperature",
      temperatureOptions(data.compounding.flatMap((list) => (list || []).map((e) => e.temperature))),
      1,
    );
    return (host) => {
      const runs = shown(data.compounding).map(([run, list]) => [run, list.filter((e) => e.temperature === state.t)]);
      const last = Math.max(...runs.flatMap(([, list]) => list.flatMap((e) => e.token)), 1);
      Chart.facets(
        host,
        [
          ["alpha", "Precision of each token", "α: of the kept tokens, how many are valid"],
          ["alpha_product", "Precision so far", "product of α: answers of the kept sets that are still valid"],
          ["beta", "Recall of each token", "β: of the answers still kept, how many stay"],
          ["beta_product", "Recall so far", "product of β: answers that are still kept"],
        ].map(([key, title, note]) => ({
          title,
          note,
          spec: {
            label: `${title} by depth`,
            x: {
              label: "token of the answer",
              min: 1,
              max: Math.max(last, 2),
              ticks: Array.from({ length: last }, (_, i) => i + 1).filter(
                (_, i) => last <= 12 || i % Math.ceil(last / 12) === 0,
              ),
              format: count,
            },
            y: share,
            marks: runs.flatMap(([run, list]) =>
              [...list]
                .sort((a, b) => (a.rule === state.rule) - (b.rule === state.rule))
                .map((e) => {
                  const chosen = e.rule === state.rule;
                  return lines({
                    name: e.rule,
                    muted: !chosen,
                    markers: chosen,
                    opacity: chosen ? null : 0.45,
                    colour: chosen ? colour(run) : "var(--muted)",
                    end: chosen ? end(run) : null,
                    points: e.token.map((token, i) => ({
                      x: token,
                      y: e[key][i],
                      tip: {
                        title: prefixed(run, e.label),
                        rows: [
                          ["token", count(token)],
                          ["α, β", `${percent(e.alpha[i])}, ${percent(e.beta[i])}`],
                          ["precision so far", percent(e.alpha_product[i])],
                          ["recall so far", percent(e.beta_product[i])],
                        ],
                      },
                    })),
                  });
                }),
            ),
          },
        })),
      );
    };
  });
})();
