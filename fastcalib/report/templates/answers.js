// Whole answers: validity and diversity, and how losses compound over the tokens.
(() => {
  const { data, colour, share, shareUpTo, shareLog, axes, several, shown, prefixed, panel, lines, end } = Page;
  const { rulesOf, references, familiesOf, temperatureOptions } = Page;
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
  const HINTS = {
    "top-k": "keeps the k most likely tokens",
    "top-p": "keeps the most likely tokens up to this mass",
    "min-p": "keeps tokens at least this share as likely as the best",
    epsilon: "keeps tokens at least this likely",
    eta: "epsilon, lowered where the model is unsure",
    "top-n-sigma": "keeps logits within n standard deviations of the best",
  };
  const DASHES = { "no cutoff": "2 3", "size oracle": "6 3" };

  // One run under one family of rules, and the references. The shade of a line goes with its rule's number.
  function valDivMarks(run, list, family) {
    const own = list.filter((entry) => entry.family === family);
    const drawn = list.filter((entry) => entry.family === family || references.includes(entry.family));
    return drawn.map((entry) => {
      const rule = entry.family === family;
      return lines({
        name: entry.rule,
        colour: rule ? colour(run) : entry.family === "size oracle" ? "var(--ink)" : "var(--muted)",
        opacity: rule ? 0.4 + (0.6 * (own.indexOf(entry) + 1)) / own.length : 1,
        muted: !rule,
        dash: DASHES[entry.family],
        hollowStart: true,
        end: rule ? String(entry.parameter ?? entry.label) : entry.label,
        points: entry.temperature.map((_, i) => sequencePoint(run, entry, i)),
      });
    });
  }
  // Rules that keep no valid answer at any temperature have no diversity, and so no line.
  const isBare = (entry) => !entry.diversity.some((v) => v != null);
  const named = (entry) => (references.includes(entry.family) ? entry.label : String(entry.parameter ?? entry.label));
  const withoutLine = (list, family) =>
    list.filter((e) => (e.family === family || references.includes(e.family)) && isBare(e)).map(named);

  panel(
    "fig-val-div",
    data.sequence,
    ({ state, choose }) => {
      const families = familiesOf(data.sequence.flatMap((list) => list || []));
      const options = families.map((family) => ({ value: family, label: family }));
      // One run has room for all families, several stand beside each other under one.
      if (!several) options.unshift({ value: null, label: "every family" });
      const first = several && families.includes("top-p") ? "top-p" : options[0]?.value;
      if (options.length) choose("family", "Rules", options, first);
      // On one linear axis, runs that are five times less valid than others would lie flat on the ground.
      const best = data.sequence.filter(Boolean).map((list) => Math.max(...list.flatMap((entry) => entry.validity)));
      choose("log", "Axes", axes, Math.max(...best) > 5 * Math.min(...best));
      return (host) => {
        const runs = shown(data.sequence);
        const chosen = state.family ? [state.family] : families.length ? families : [null];
        const every = runs
          .flatMap(([, list]) => list)
          .filter((entry) => chosen.includes(entry.family) || references.includes(entry.family));
        const diversity = every.flatMap((entry) => entry.diversity).filter((v) => v > 0);
        const validity = every.flatMap((entry) => entry.validity);
        const most = Math.min(1, Math.ceil(Math.max(...diversity, 0) * 10.5) / 10);
        const x = state.log ? shareLog(diversity) : { min: 0, max: most };
        const y = state.log ? shareLog(validity) : shareUpTo(validity);
        Chart.facets(
          host,
          runs.flatMap(([run, list]) =>
            chosen.map((family) => {
              const bare = withoutLine(list, family);
              const name = family || "No cutoff and size oracle";
              return {
                title: several ? data.runs[run] : name,
                note:
                  (several && family ? `${family}: ` : "") +
                  (HINTS[family] || "") +
                  (bare.length ? `. Without a line, as no valid answer is kept: ${bare.join(", ")}` : ""),
                spec: {
                  label: `Validity against diversity, ${prefixed(run, name)}`,
                  inside: true,
                  x: { ...x, format: percent, label: "diversity: share of the answers" },
                  y: { ...y, label: "validity" },
                  marks: valDivMarks(run, list, family),
                },
              };
            }),
          ),
        );
      };
    },
    "titles",
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
            y: shareUpTo(runs.flatMap(([, entry]) => entry[key])),
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
    choose("log", "Axis of what is left", axes, false);
    return (host) => {
      const runs = shown(data.compounding).map(([run, list]) => [run, list.filter((e) => e.temperature === state.t)]);
      const last = Math.max(...runs.flatMap(([, list]) => list.flatMap((e) => e.token)), 1);
      const point = (run, e, key, token, i) => ({
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
      });
      const line = (run, e, key) => {
        const chosen = e.rule === state.rule;
        return lines({
          name: e.rule,
          muted: !chosen,
          markers: chosen,
          opacity: chosen ? null : several ? 0.3 : 0.45,
          colour: chosen || several ? colour(run) : "var(--muted)",
          end: chosen ? end(run) : null,
          points: e.token.map((token, i) => point(run, e, key, token, i)),
        });
      };
      Chart.facets(
        host,
        [
          ["alpha", "Precision of each token", "α: of the kept tokens, how many are valid"],
          ["alpha_product", "Precision so far", "product of α: answers of the kept sets that are still valid"],
          ["beta", "Recall of each token", "β: of the answers still kept, how many stay"],
          ["beta_product", "Recall so far", "product of β: answers that are still kept"],
        ].map(([key, title, note]) => {
          const values = runs.flatMap(([, list]) => list.flatMap((e) => e[key]));
          return {
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
              y: key.endsWith("product") ? (state.log ? shareLog(values) : shareUpTo(values)) : share,
              marks: runs.flatMap(([run, list]) =>
                [...list]
                  .sort((a, b) => (a.rule === state.rule) - (b.rule === state.rule))
                  .map((e) => line(run, e, key)),
              ),
            },
          };
        }),
      );
    };
  });
})();
