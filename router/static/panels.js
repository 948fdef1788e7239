// Pools with their buttons, workers, requests and the waterfall of one of them.

import { call, complain } from "./api.js";
import { STAGES } from "./metrics.js";

const $ = (id) => document.getElementById(id);
const seconds = (value) => (value === null || value === undefined ? "–" : `${value.toFixed(3)} s`);

function node(tag, text = "", className = "") {
  return Object.assign(document.createElement(tag), { textContent: text, className });
}

function row(cells) {
  const line = document.createElement("tr");
  for (const cell of cells) {
    const [content, className] = Array.isArray(cell) ? cell : [cell, ""];
    const field = node("td", "", className);
    field.append(content);
    line.append(field);
  }
  return line;
}

/** `cluster`: the controller's view, null without a controller; `seen`: the router's view. */
export function renderPools(cluster, seen) {
  const pools = cluster?.pools ?? Object.fromEntries(Object.entries(seen).map(([name, pool]) => [name, { ready: pool.usable }]));
  $("autoscaler").textContent = cluster && cluster.autoscaler !== "off" ? `autoscaler: ${cluster.autoscaler}` : "";
  $("pools").replaceChildren(...Object.entries(pools).map(([name, pool]) => poolCard(name, pool, cluster !== null)));
  const changes = (cluster?.changes ?? []).slice(-20).reverse();
  $("changes-box").hidden = !changes.length;
  $("changes").replaceChildren(...changes.map((change) => {
    const when = new Date(change.at * 1000).toLocaleString();
    const why = change.reason ? `: ${change.reason}` : "";
    return node("li", `${when} ${change.pool} ${change.before} → ${change.after}, by ${change.by}${why}`);
  }));
}

function poolCard(name, pool, canScale) {
  const card = node("div", "", "pool");
  card.dataset.pool = name;
  const line = node("div", "", "row");
  const size = pool.desired === undefined ? `${pool.ready} ready` : `${pool.ready} / ${pool.desired}`;
  line.append(node("strong", name), node("span", size, "size"));
  if (canScale) {
    const [low, high] = [pool.low ?? 0, pool.high ?? 1024];
    for (const [sign, target] of [["−", pool.desired - 1], ["+", pool.desired + 1]]) {
      const button = node("button", sign);
      button.type = "button";
      button.ariaLabel = `${name} to ${target}`;
      button.disabled = target < low || target > high;
      button.addEventListener("click", () => scale(button, name, target));
      line.append(button);
    }
  }
  card.append(line);
  if (pool.recommended !== undefined && pool.recommended !== pool.desired)
    card.append(node("p", `recommended: ${pool.recommended}. ${pool.reason}`, "advice"));
  return card;
}

async function scale(button, pool, replicas) {
  button.disabled = true;
  try {
    await call(`pools/${pool}`, { method: "PUT", headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ replicas, reason: "dashboard" }) });
    complain("");
  } catch (error) {
    complain(error.message);
  }
}

/** `held`: the controller's workers, with their exact counts. */
export function renderWorkers(workers, held) {
  const states = new Map(held.map((worker) => [worker.name, worker]));
  $("workers").replaceChildren(...workers.map((worker) => {
    const load = worker.load ?? {}, mine = states.get(worker.name);
    const blocks = ["free", "cached", "live", "leased", "quarantined"].map((state) => load[`blocks_${state}`] ?? 0);
    const used = blocks[2] + blocks[3] + blocks[4], all = blocks.reduce((a, b) => a + b, 0);
    const meter = Object.assign(document.createElement("meter"), { max: all || 1, value: used, high: 0.9 * all });
    const text = mine && mine.state !== "ready" ? mine.state : worker.usable ? "serving" : worker.state;
    const colour = { serving: "good", draining: "warn", starting: "warn", lost: "bad", failed: "bad" }[text] ?? "";
    const kv = node("span");
    kv.append(meter, ` ${used}/${all}`);
    return row([worker.name, worker.info?.role ?? "–", [text, colour], [String(load.num_running ?? "–"), "number"],
      [String(load.num_waiting ?? "–"), "number"], kv, [String(load.pending_handoffs ?? "–"), "number"],
      [load.step_s ? `${(load.step_s * 1000).toFixed(1)} ms` : "–", "number"]]);
  }));
}

/** The last requests that ended, newest first. */
export function renderRequests(recent) {
  $("requests").replaceChildren(...recent.map((request) => {
    const link = Object.assign(node("a", request.request_id), { href: "#waterfall" });
    link.addEventListener("click", (event) => {
      event.preventDefault();
      waterfall(request);
    });
    const failed = request.error !== null;
    return row([link, [request.finish ?? request.error ?? "running", failed ? "bad" : ""],
      [String(request.num_prompt), "number"], [String(request.cached_tokens ?? 0), "number"],
      [String(request.num_output), "number"], [seconds(request.first_token_s), "number"],
      [seconds(request.ended_s), "number"], String(request.attempts.length)]);
  }));
}

/** Look a request up; the id of an answer stands for its first choice. */
export async function find(id) {
  if (!id) return;
  for (const name of [id, `${id}-0`]) {
    try {
      waterfall(await call(`requests/${encodeURIComponent(name)}`));
      complain("");
      return;
    } catch (error) {
      complain(error.message);
    }
  }
}

/** Bars of stages and attempts on one time axis, from the request's arrival. */
function waterfall(request) {
  const spans = [];
  let at = 0;
  for (const [i, stage] of STAGES.entries()) {
    const length = request.stages[stage];
    if (length === undefined) continue;
    spans.push([stage, at, at + length, `--s${i + 1}`]);
    at += length;
  }
  const end = request.ended_s ?? Math.max(at, ...request.attempts.map((a) => a.ended_s ?? a.started_s ?? a.sent_s));
  for (const attempt of request.attempts) {
    const stop = attempt.ended_s ?? end;
    const first = attempt.first_token_s ?? stop;
    spans.push([`${attempt.number}: ${attempt.prefill}`, attempt.sent_s, first, "--s4"]);
    if (attempt.handoff_s !== null && attempt.started_s !== null)
      spans.push(["hand-off", attempt.started_s - attempt.handoff_s, attempt.started_s, "--s3"]);
    spans.push([`${attempt.number}: ${attempt.decode}`, attempt.started_s ?? first, stop, "--s1"]);
  }
  const title = node("strong", request.request_id);
  const facts = node("small", ` ${request.num_prompt} + ${request.num_output} tokens, ${seconds(end)}, ${request.finish ?? request.error ?? "running"}`);
  $("waterfall").replaceChildren(title, facts, ...spans.map(([name, from, to, ink]) => {
    const line = node("div", "", "span"), lane = node("div", "", "lane"), bar = node("div", "", "bar");
    const scale = end > 0 ? 100 / end : 0;
    bar.style.left = `${Math.max(0, from) * scale}%`;
    bar.style.width = `${Math.max(0, to - Math.max(0, from)) * scale}%`;
    bar.style.background = `var(${ink})`;
    lane.append(bar);
    line.append(node("span", name), lane, node("span", seconds(to - from), "time"));
    return line;
  }));
  $("waterfall").hidden = false;
}
