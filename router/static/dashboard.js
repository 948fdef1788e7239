// The router's own page. Everything shown comes from /admin/; nothing is loaded from anywhere else.

import { call, complain, useKey } from "./api.js";
import { TimeChart } from "./charts.js";
import { STAGES, growth, parse, percentile, stages, total } from "./metrics.js";
import { find, renderPools, renderRequests, renderWorkers } from "./panels.js";

const PERIOD_MS = 2000;
const KEEP_S = 310;
const QUANTILES = { p50: 0.5, p90: 0.9, p99: 0.99 };
const $ = (id) => document.getElementById(id);

let history = []; // [{time, samples}], oldest first
let timer = 0;
const charts = {};

function observe(samples) {
  const now = { time: Date.now() / 1000, samples };
  history.push(now);
  while (history.length > 2 && now.time - history[0].time > KEEP_S) history.shift();
  const window = Number($("window").value);
  const before = history.findLast(({ time }) => now.time - time >= window - 0.5) ?? history[0];
  const old = window === 0 ? null : before === now ? null : before.samples;
  const recent = history.length > 1 ? history.at(-2) : null;
  renderTiles(samples, old);
  extendCharts(now, recent, samples, old);
}

function quantiles(samples, old, name, scale = 1) {
  return Object.values(QUANTILES).map((share) => {
    const value = percentile(samples, old, name, share);
    return value === null ? null : value * scale;
  });
}

function renderTiles(samples, old) {
  const tiles = [];
  const metrics = { TTFT: ["baton_ttft_seconds", 1, "s", 3], TPOT: ["baton_tpot_seconds", 1000, "ms", 2],
    ITL: ["baton_inter_token_seconds", 1000, "ms", 2] };
  for (const [title, [name, scale, unit, digits]] of Object.entries(metrics))
    for (const [label, share] of Object.entries(QUANTILES)) {
      const value = percentile(samples, old, name, share);
      tiles.push([`${title} ${label}`, value === null ? "–" : `${(value * scale).toFixed(digits)} ${unit}`]);
    }
  for (const what of ["inflight", "queued", "recovering"])
    tiles.push([what, String(total(samples, `baton_${what}_requests`))]);
  $("tiles").replaceChildren(...tiles.map(([label, value]) => {
    const tile = document.createElement("div");
    tile.className = "tile";
    tile.dataset.metric = label;
    tile.append(Object.assign(document.createElement("span"), { textContent: label }));
    tile.append(Object.assign(document.createElement("b"), { textContent: value }));
    return tile;
  }));
}

function extendCharts(now, recent, samples, old) {
  charts.ttft.add(now.time, quantiles(samples, old, "baton_ttft_seconds"));
  charts.tpot.add(now.time, quantiles(samples, old, "baton_tpot_seconds", 1000));
  charts.itl.add(now.time, quantiles(samples, old, "baton_inter_token_seconds", 1000));
  charts.stages.add(now.time, stages(samples, old));
  const seconds = recent ? now.time - recent.time : 0;
  const rate = (direction) => growth(samples, recent.samples, "baton_tokens_total", { direction }) / seconds;
  charts.tokens.add(now.time, seconds > 0 ? [rate("in"), rate("out")] : null);
  charts.requests.add(now.time, ["inflight", "queued", "recovering"].map((s) => total(samples, `baton_${s}_requests`)));
}

async function refresh() {
  try {
    const [text, status] = await Promise.all([call("metrics"), call("status")]);
    const pools = await call("pools").catch((error) => (error.status === 409 ? null : Promise.reject(error)));
    observe(parse(text));
    $("model").textContent = status.model;
    $("state").textContent = status.ready ? "serving" : "no workers to serve with";
    $("state").className = `pill ${status.ready ? "good" : "bad"}`;
    renderPools(pools, status.pools);
    renderWorkers(status.workers, pools?.workers ?? []);
    renderRequests(status.recent);
    complain("");
  } catch (error) {
    $("state").textContent = error.status === 403 ? "locked" : "no answer";
    $("state").className = "pill bad";
    complain(error.message);
  }
  clearTimeout(timer);
  timer = setTimeout(refresh, document.hidden ? 4 * PERIOD_MS : PERIOD_MS);
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  for (const chart of Object.values(charts)) chart.make();
}

function start() {
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const theme = () => localStorage.getItem("baton-theme") ?? (prefersDark.matches ? "dark" : "light");
  document.documentElement.dataset.theme = theme();
  const percentiles = Object.keys(QUANTILES);
  charts.ttft = new TimeChart($("chart-ttft"), percentiles, { digits: 3 });
  charts.stages = new TimeChart($("chart-stages"), STAGES, { stacked: true, digits: 3 });
  charts.tpot = new TimeChart($("chart-tpot"), percentiles);
  charts.itl = new TimeChart($("chart-itl"), percentiles);
  charts.tokens = new TimeChart($("chart-tokens"), ["in", "out"], { digits: 0 });
  charts.requests = new TimeChart($("chart-requests"), ["inflight", "queued", "recovering"], { digits: 0 });
  prefersDark.addEventListener("change", () => setTheme(theme()));
  $("theme").addEventListener("click", () => {
    localStorage.setItem("baton-theme", theme() === "dark" ? "light" : "dark");
    setTheme(theme());
  });
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    useKey($("key").value);
    $("key").value = "";
    refresh();
  });
  $("window").addEventListener("change", refresh);
  $("find-form").addEventListener("submit", (event) => {
    event.preventDefault();
    find($("find").value.trim());
  });
  refresh();
}

start();
