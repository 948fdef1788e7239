// Charts over time. Colours follow the theme; a chart is made anew when it changes.

const HEIGHT = 190;
const POINTS = 900;
const STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800]; // seconds between marks of the time axis

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** A chart of one or more series over time, lines or a stack, that keeps the last POINTS. */
export class TimeChart {
  constructor(element, names, { stacked = false, digits = 2 } = {}) {
    this.element = element;
    this.names = names;
    this.stacked = stacked;
    this.digits = digits;
    this.times = [];
    this.rows = names.map(() => []);
    this.make();
    new ResizeObserver(() => this.plot.setSize(this.size())).observe(element);
  }

  /** Add a point; `values` holds one number or null per series. */
  add(time, values) {
    this.times.push(time);
    this.rows.forEach((row, i) => row.push(values?.[i] ?? null));
    if (this.times.length > POINTS) {
      this.times.shift();
      this.rows.forEach((row) => row.shift());
    }
    this.plot.setData(this.data());
  }

  /** Drop the plot and draw it again in the colours of the theme. */
  make() {
    this.plot?.destroy();
    const clock = (_, times) => times.map((time) => new Date(time * 1000).toLocaleTimeString([], { hour12: false }));
    const axis = { stroke: colour("--dim"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false } };
    const order = this.names.map((_, i) => i);
    const series = order.map((i) => {
      const ink = colour(`--s${(i % 5) + 1}`);
      return {
        label: this.names[i],
        stroke: ink,
        width: this.stacked ? 1 : 2,
        fill: this.stacked ? `${ink}66` : undefined,
        points: { show: false },
        value: (_, __, ___, at) => this.shown(i, at),
      };
    });
    const bands = this.stacked ? order.slice(1).map((i) => ({ series: [i + 1, i] })) : undefined;
    this.plot = new uPlot(
      { ...this.size(), series: [{}, ...series], bands, axes: [{ ...axis, values: clock, incrs: STEPS, space: 90 }, { ...axis, size: 56 }], cursor: { y: false },
        scales: { y: { range: (_, low, high) => [0, high > 0 ? high * 1.1 : 1] } } },
      this.data(),
      this.element,
    );
  }

  size() {
    return { width: Math.max(200, this.element.clientWidth), height: HEIGHT };
  }

  data() {
    if (!this.stacked) return [this.times, ...this.rows];
    const sums = this.times.map(() => 0);
    const layers = this.rows.map((row) => row.map((value, at) => (value === null ? null : (sums[at] += value))));
    return [this.times, ...layers];
  }

  shown(i, at) {
    const value = this.rows[i][at ?? this.times.length - 1];
    return value === null || value === undefined ? "–" : value.toFixed(this.digits);
  }
}
