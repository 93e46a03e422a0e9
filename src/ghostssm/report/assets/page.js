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

  async function draw({ name, spec }) {
    const place = document.getElementById(name);
    const rows = Object.values(spec.datasets).reduce((sum, table) => sum + table.length, 0);
    const { view } = await vegaEmbed(place.querySelector(".chart"), spec, {
      mode: "vega-lite",
      renderer: rows > MANY_MARKS ? "canvas" : "svg",
      bind: place.querySelector(".choices"),
      tooltip: { id: tip.id, disableDefaultStyle: true },
      actions: false,
      defaultStyle: false,
    });
    views.set(name, view);
  }

  function hideTooltip() {
    tip.classList.remove("visible");
  }

  function paint(theme) {
    root.dataset.theme = theme;
    hideTooltip();
    const [ink, faint] = ["--text", "--muted"].map(colour);
    const painted = (view) => view.signal("ink", ink).signal("faint", faint).background(colour("--back")).runAsync();
    return Promise.all([...views.values()].map(painted));
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
    await Promise.all(figures.map(draw));
    await paint(theme());
    document.getElementById("theme").onclick = () => paint(root.dataset.theme === "dark" ? "light" : "dark");
    dark.addEventListener("change", () => paint(theme()));
    let shown;
    addEventListener("beforeprint", () => { shown = root.dataset.theme; paint("light"); });
    addEventListener("afterprint", () => paint(shown));
    addEventListener("scroll", hideTooltip, { passive: true });
    root.dataset.ready = "yes";
  }
  start();
})();
