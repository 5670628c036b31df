const root = document.documentElement;
const specs = JSON.parse(document.getElementById("figures").textContent);
const views = [];
const shade = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();
const system = matchMedia("(prefers-color-scheme: dark)");

function config() {
  const text = { labelColor: shade("soft"), titleColor: shade("soft"), labelFont: shade("sans"), titleFont: shade("sans"), titleFontWeight: 400 };
  return {
    background: "transparent",
    font: shade("sans"),
    view: { stroke: null },
    axis: { ...text, labelFontSize: 11, titleFontSize: 11, gridColor: shade("line"), domainColor: shade("line"), tickColor: shade("line"), labelPadding: 5, titlePadding: 8 },
    legend: { ...text, labelFontSize: 11, symbolStrokeWidth: 2 },
    line: { strokeWidth: 1.75 },
    mark: { color: shade("chart-1") },
    rect: { invalid: "filter" },
    range: {
      category: [1, 2, 3, 4, 5, 6].map((i) => shade("chart-" + i)),
      heatmap: [1, 2, 3, 4, 5].map((i) => shade("heat-" + i)),
      ramp: [1, 2, 3, 4, 5].map((i) => shade("heat-" + i)),
    },
    style: {
      threshold: { color: shade("error"), strokeDash: [5, 4], strokeWidth: 1.25 },
      zone: { color: shade("soft"), opacity: 0.16 },
      span: { color: shade("ink"), strokeWidth: 3 },
      none: { color: shade("soft"), strokeDash: [2, 3], strokeWidth: 1 },
    },
  };
}

async function draw() {
  const run = (draw.run = (draw.run ?? 0) + 1);
  for (const view of views.splice(0)) view.finalize();
  let drawn = 0;
  const places = [...document.querySelectorAll(".chart")];
  for (const place of places) {
    try {
      const result = await vegaEmbed(place, specs[place.dataset.figure], {
        mode: "vega-lite", renderer: "svg", actions: false, config: config(), tooltip: { theme: "custom" },
      });
      if (run !== draw.run) return result.finalize(); // the theme was switched meanwhile
      views.push(result);
      drawn += 1;
    } catch (error) {
      console.error(`chart ${place.dataset.figure}: ${error.message}`);
      place.classList.add("failed");
      place.textContent = "This chart could not be drawn: " + error.message;
    }
  }
  root.dataset.charts = `${drawn}/${places.length}`;
}

// Theme: the reader's choice if there is one, else the system's.
const stored = { get() { try { return localStorage.getItem("setpoint-theme"); } catch { return null; } },
                 set(value) { try { localStorage.setItem("setpoint-theme", value); } catch { /* no storage for this page */ } } };
const button = document.getElementById("theme");
function wear(theme) {
  root.dataset.theme = theme;
  button.textContent = theme === "dark" ? "Light" : "Dark";
  draw();
}
button.addEventListener("click", () => {
  const theme = root.dataset.theme === "dark" ? "light" : "dark";
  stored.set(theme);
  wear(theme);
});
system.addEventListener("change", () => stored.get() ?? wear(system.matches ? "dark" : "light"));
wear(stored.get() ?? (system.matches ? "dark" : "light"));

// Table of sites: sort by a column, keep one role.
const body = document.querySelector("#site-table tbody");
const heads = [...document.querySelectorAll("#site-table thead th")];
const order = body ? [...body.rows] : [];
const value = (row, column) => (column ? Number.parseFloat((row.cells[column].dataset.v ?? "").replace("inf", "Infinity")) : order.indexOf(row));
heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
  const descending = head.getAttribute("aria-sort") !== "descending" && column > 0;
  heads.forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const sign = descending ? -1 : 1;
  const sorted = [...order].sort((a, b) => {
    const [x, y] = [value(a, column), value(b, column)];
    if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y); // no value: at the end
    return x === y ? 0 : sign * (x < y ? -1 : 1);
  });
  body.append(...sorted);
}));
document.getElementById("role")?.addEventListener("change", (event) => {
  for (const row of order) row.hidden = Boolean(event.target.value) && row.dataset.role !== event.target.value;
});
