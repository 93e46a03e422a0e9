"use strict";
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const tip = document.getElementById("tooltip");
  const views = new Map();
  const MANY_MARKS = 10000; // from here on a canvas draws faster than the document does
  let figures = [];

  async function load() {
    const packed = Uint8Array.from(atob(document.getElementById("data").textContent.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  function rowsOf(columns) {
    const names = Object.keys(columns);
    const length = names.length ? columns[names[0]].length : 0;
    return Array.from({ length }, (_, i) => Object.fromEntries(names.map((name) => [name, columns[name][i]])));
  }

  function colour(name) {
    return getComputedStyle(root).getPropertyValue(name).trim();
  }

  function themedConfig() {
    const [text, muted, line] = ["--text", "--muted", "--line"].map(colour);
    return {
      axis: { labelColor: muted, titleColor: text, gridColor: line, tickColor: line },
      legend: { labelColor: text, titleColor: text },
    };
  }

  function showTooltip(_, event, item, value) {
    tip.hidden = !value;
    if (!value) return;
    tip.replaceChildren(
      ...Object.entries(value).map(([key, entry]) => {
        const line = document.createElement("div");
        line.append(document.createElement("span"), document.createElement("span"));
        line.firstChild.textContent = key;
        line.lastChild.textContent = entry;
        return line;
      }),
    );
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 4))}px`;
    tip.style.top = `${event.clientY + 14 + height > innerHeight ? event.clientY - height - 14 : event.clientY + 14}px`;
  }

  async function draw(figure) {
    const place = document.getElementById(figure.name);
    const chart = place.querySelector(".chart");
    const choices = place.querySelector(".choices");
    const old = views.get(figure.name);
    const chosen = figure.spec.signals.filter(({ bind }) => bind).map(({ name }) => [name, old && old.signal(name)]);
    if (old) old.finalize();
    choices.replaceChildren();
    const data = figure.spec.data.map((entry) =>
      entry.name in figure.rows ? { ...entry, values: figure.rows[entry.name] } : entry,
    );
    const rows = Object.values(figure.rows).reduce((sum, table) => sum + table.length, 0);
    const { view } = await vegaEmbed(chart, { ...figure.spec, data, background: colour("--back") }, {
      mode: "vega",
      config: themedConfig(),
      renderer: rows > MANY_MARKS ? "canvas" : "svg",
      bind: choices,
      tooltip: showTooltip,
      actions: false,
      defaultStyle: false,
    });
    if (old) for (const [name, value] of chosen) view.signal(name, value);
    view.signal("ink", colour("--text")).signal("faint", colour("--muted")).run();
    views.set(figure.name, view);
  }

  function drawAll(theme) {
    root.dataset.theme = theme;
    tip.hidden = true;
    return Promise.all(figures.map(draw));
  }

  function save(name, type, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  function csv(columns) {
    const cell = (value) => (/[",\n]/.test(value ?? "") ? `"${String(value).replaceAll('"', '""')}"` : (value ?? ""));
    const names = Object.keys(columns);
    const lines = columns[names[0]].map((_, i) => names.map((name) => cell(columns[name][i])).join(","));
    return [names.join(","), ...lines, ""].join("\n");
  }

  async function start() {
    const theme = () => (dark.matches ? "dark" : "light");
    root.dataset.theme = theme();
    figures = await load();
    for (const figure of figures) {
      figure.rows = Object.fromEntries(Object.entries(figure.tables).map(([name, table]) => [name, rowsOf(table)]));
      const place = document.getElementById(figure.name);
      place.querySelector(".save-svg").onclick = async () =>
        save(`${figure.name}.svg`, "image/svg+xml", await views.get(figure.name).toSVG());
      place.querySelector(".save-csv").onclick = () =>
        save(`${figure.name}.csv`, "text/csv", csv(Object.values(figure.tables)[0]));
    }
    await drawAll(theme());
    document.getElementById("theme").onclick = () => drawAll(root.dataset.theme === "dark" ? "light" : "dark");
    dark.addEventListener("change", () => drawAll(theme()));
    let shown;
    addEventListener("beforeprint", () => { shown = root.dataset.theme; drawAll("light"); });
    addEventListener("afterprint", () => drawAll(shown));
    addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
    root.dataset.ready = "yes";
  }
  start();
})();
