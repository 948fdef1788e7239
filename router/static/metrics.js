// The Prometheus text of a router, as numbers over a window.

export const STAGES = ["router", "recovery", "prefill_queue", "prefill_compute", "relay"];
const LINE = /^([a-zA-Z_:]\w*)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** Samples of an exposition: name → [{labels, value}]. */
export function parse(text) {
  const samples = new Map();
  for (const line of text.split("\n")) {
    const match = LINE.exec(line);
    if (!match) continue;
    const labels = {};
    for (const [, key, value] of (match[2] ?? "").matchAll(LABEL)) labels[key] = value;
    if (!samples.has(match[1])) samples.set(match[1], []);
    samples.get(match[1]).push({ labels, value: match[3] === "+Inf" ? Infinity : Number(match[3]) });
  }
  return samples;
}

/** The sum of a metric over the samples whose labels match. */
export function total(samples, name, wanted = {}) {
  return (samples?.get(name) ?? [])
    .filter(({ labels }) => Object.entries(wanted).every(([key, value]) => labels[key] === value))
    .reduce((sum, { value }) => sum + value, 0);
}

/** How much a counter grew from `old` (null: from zero). One that fell belongs to a new process. */
export function growth(now, old, name, wanted = {}) {
  const value = total(now, name, wanted), before = old ? total(old, name, wanted) : 0;
  return value >= before ? value - before : value;
}

/** A percentile of a histogram between two expositions, as PromQL's histogram_quantile; null if nothing was observed. */
export function percentile(now, old, name, share) {
  const bounds = [...new Set((now.get(`${name}_bucket`) ?? []).map(({ labels }) => labels.le))]
    .map((le) => ({ bound: le === "+Inf" ? Infinity : Number(le), count: growth(now, old, `${name}_bucket`, { le }) }))
    .sort((a, b) => a.bound - b.bound);
  const count = bounds.at(-1)?.count ?? 0;
  if (count <= 0) return null;
  const rank = share * count;
  let low = 0, below = 0;
  for (const entry of bounds) {
    if (entry.count >= rank) {
      if (entry.bound === Infinity) return low;
      const part = entry.count > below ? (rank - below) / (entry.count - below) : 1;
      return low + (entry.bound - low) * part;
    }
    [low, below] = [entry.bound, entry.count];
  }
  return low;
}

/** Mean seconds of each stage of the time to first token; they add up to its mean. Null without a request. */
export function stages(now, old) {
  const count = growth(now, old, "baton_ttft_seconds_count");
  if (count <= 0) return null;
  return STAGES.map((stage) => growth(now, old, "baton_ttft_stage_seconds_sum", { stage }) / count);
}
