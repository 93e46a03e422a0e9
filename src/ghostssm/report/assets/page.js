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
    return columns[names[0]].map((_, i) => Object.fromEntries(names.map((name) => [name, columns[name][i]])));
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

  async function draw({ name, spec }) {
    const place = document.getElementById(name);
    const chart = place.querySelector(".chart");
    const choices = place.querySelector(".choices");
    const old = views.get(name);
    const chosen = old ? spec.params.filter(({ bind }) => bind).map(({ name }) => [name, old.signal(name)]) : [];
    if (old) old.finalize();
    choices.replaceChildren();
    const rows = Object.values(spec.datasets).reduce((sum, table) => sum + table.length, 0);
    const { view } = await vegaEmbed(chart, { ...spec, background: colour("--back") }, {
      mode: "vega-lite",
      config: themedConfig(),
      renderer: rows > MANY_MARKS ? "canvas" : "svg",
      bind: choices,
      tooltip: { id: tip.id, disableDefaultStyle: true },
      actions: false,
      defaultStyle: false,
    });
    for (const [name, value] of chosen) view.signal(name, value);
    view.signal("ink", colour("--text")).signal("faint", colour("--muted")).run();
    views.set(name, view);
  }

  function hideTooltip() {
    tip.classList.remove("visible");
  }

  function drawAll(theme) {
    root.dataset.theme = theme;
    hideTooltip();
    return Promise.all(figures.map(draw));
  }

  function save(name, type, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  function csv(rows) {
    const cell = (value) => (/[",\n]/.test(value ?? "") ? `"${String(value).replaceAll('"', '""')}"` : (value ?? ""));
    const lines = rows.map((row) => Object.values(row).map(cell).join(","));
    return [Object.keys(rows[0]).join(","), ...lines, ""].join("\n");
  }

  async function start() {
    const theme = () => (dark.matches ? "dark" : "light");
    root.dataset.theme = theme();
    figures = await load();
    for (const { name, spec, tables } of figures) {
      spec.datasets = Object.fromEntries(Object.entries(tables).map(([table, columns]) => [table, rowsOf(columns)]));
      const place = document.getElementById(name);
      place.querySelector(".save-svg").onclick = async () =>
        save(`${name}.svg`, "image/svg+xml", await views.get(name).toSVG());
      place.querySelector(".save-csv").onclick = () =>
        save(`${name}.csv`, "text/csv", csv(Object.values(spec.datasets)[0]));
    }
    await drawAll(theme());
    document.getElementById("theme").onclick = () => drawAll(root.dataset.theme === "dark" ? "light" : "dark");
    dark.addEventListener("change", () => drawAll(theme()));
    let shown;
    addEventListener("beforeprint", () => { shown = root.dataset.theme; drawAll("light"); });
    addEventListener("afterprint", () => drawAll(shown));
    addEventListener("scroll", hideTooltip, { passive: true });
    root.dataset.ready = "yes";
  }
  start();
})();
