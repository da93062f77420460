'use strict';
// The page of a run, of a comparison, or of `layerfed watch`: one object of data in, text nodes and SVG out.
// Names and reasons come from clients. Nothing here reads markup from a text.
(async () => {
  const root = document.documentElement, LIVE = document.body.dataset.live === 'live';
  const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", Arial, sans-serif';
  const pen = document.createElement('canvas').getContext('2d');
  pen.font = `12px ${FONT}`;
  const wide = text => pen.measureText(text).width;
  const state = { x: 'rounds', map: 'share', cell: 'norm', round: null, differs: true, reference: null,
    experiment: 0, curve: 0, sort: {}, open: new Set(), theme: 'auto' };
  let drawn = [];

  // ---------------------------------------------------------------------------------- elements
  const fill = (node, attributes, kids) => {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
      else if (value === true) node.setAttribute(name, '');
      else if (value !== false && value != null) node.setAttribute(name, value);
    }
    node.append(...kids.flat(9).filter(kid => kid != null && kid !== false));
    return node;
  };
  const h = (tag, attributes, ...kids) => fill(document.createElement(tag), attributes, kids);
  const s = (tag, attributes, ...kids) =>
    fill(document.createElementNS('http://www.w3.org/2000/svg', tag), attributes, kids);
  const color = name => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const text = (x, y, words, more = {}) => s('text', { x, y, 'font-size': 12, 'font-family': FONT,
    fill: color('soft'), ...more }, words);
  const clipped = (words, room) => {
    if (wide(words) <= room) return words;
    let kept = words;
    while (kept.length > 1 && wide(`${kept}…`) > room) kept = kept.slice(0, -1);
    return `${kept}…`;
  };
  const counted = (number, what) => `${show('number', number)} ${what}${number === 1 ? '' : 's'}`;

  // ----------------------------------------------------------------------------------- numbers
  const UNITS = {
    bytes: [[1, 'B'], [1e3, 'kB'], [1e6, 'MB'], [1e9, 'GB'], [1e12, 'TB'], [1e15, 'PB']],
    flops: [[1, 'FLOPs'], [1e6, 'MFLOPs'], [1e9, 'GFLOPs'], [1e12, 'TFLOPs'], [1e15, 'PFLOPs'], [1e18, 'EFLOPs']],
    seconds: [[1e-3, 'ms'], [1, 's'], [60, 'min'], [3600, 'h']],
    percent: [[0.01, '%']], points: [[0.01, 'points']],
  };
  const known = value => typeof value === 'number' && Number.isFinite(value);
  const power = number => `×10${String(number).replace(/./g, c => '⁰¹²³⁴⁵⁶⁷⁸⁹⁻'['0123456789-'.indexOf(c)])}`;
  const unit = (kind, most) => {
    if (kind === 'percent' || kind === 'points') return UNITS[kind][0];
    if (UNITS[kind]) {
      const enough = kind === 'seconds' ? 3 : 1;
      return UNITS[kind].filter(([size], n) => !n || most >= size * (size > 1 ? enough : 1)).pop();
    }
    const exponent = most > 0 ? Math.floor(Math.log10(most)) : 0;
    return exponent > 5 || exponent < -3 ? [10 ** exponent, power(exponent)] : [1, ''];
  };
  const grouped = words => words.replace(/^(-?\d+)/, whole => whole.replace(/\B(?=(\d{3})+$)/g, ','));
  const show = (kind, value) => {
    if (value === 'inf') return '∞';
    if (typeof value === 'string') return value;
    if (!known(value)) return '–';
    if (kind === 'whole') return grouped(String(value));
    if (kind === 'percent') return `${(100 * value).toFixed(2)} %`;
    if (kind === 'points') return `${value < 0 ? '−' : '+'}${Math.abs(100 * value).toFixed(2)}`;
    const [size, name] = unit(kind, Math.abs(value));
    const scaled = value / size;
    const digits = Number.isInteger(scaled) && Math.abs(scaled) < 1e6 ? String(scaled)
      : String(Number(scaled.toPrecision(4)));
    return `${grouped(digits).replace(/^-/, '−')}${name ? ` ${name}` : ''}`;
  };
  // Mean ± sample standard deviation, in the unit of the mean.
  const around = (kind, values) => {
    const [m, d] = [mean(values), deviation(values)], words = show(kind, m);
    if (values.length < 2 || d <= 1e-12 * Math.abs(m)) return words;
    const [number, name] = words.split(' '), size = unit(kind, Math.abs(m))[0];
    const digits = (number.split('.')[1] || '').length;
    return `${number} ± ${(d / size).toFixed(Math.max(digits, kind === 'number' || UNITS[kind] ? 1 : 0))}${name ? ` ${name}` : ''}`;
  };
  const capital = words => words.charAt(0).toUpperCase() + words.slice(1);
  const extent = values => values.reduce(
    ([low, high], v) => known(v) ? [Math.min(low, v), Math.max(high, v)] : [low, high], [Infinity, -Infinity]);
  const mean = values => values.reduce((sum, v) => sum + v, 0) / values.length;
  const deviation = values => values.length < 2 ? 0
    : Math.sqrt(values.reduce((sum, v) => sum + (v - mean(values)) ** 2, 0) / (values.length - 1));

  // An axis that fits its data. A spread that is rounding noise (`floor`, or 1e-9 of the values) is none.
  const axis = (values, { kind = 'number', label = '', zero = false, floor = 1e-12, low = -Infinity,
    high = Infinity, whole = false, log = false }, room, spacing) => {
    let [lo, hi] = extent(values.map(v => known(v) && Math.abs(v) < floor ? 0 : v));
    if (lo > hi) [lo, hi] = [0, 1];
    const [size, name] = unit(kind, Math.max(Math.abs(lo), Math.abs(hi)));
    const title = name ? `${label}, ${name}` : label;
    if (log && lo > 0 && hi / lo > 20) {
      const ticks = [];
      [lo, hi] = [lo / 1.15, hi * 1.15];
      for (let e = Math.floor(Math.log10(lo)); e <= Math.log10(hi); e += 1)
        for (const m of hi / lo > 500 ? [1] : [1, 2, 5])
          if (m * 10 ** e >= lo && m * 10 ** e <= hi) ticks.push(m * 10 ** e);
      return { title, ticks, text: v => show('number', v / size),
        at: v => Math.log(v / lo) / Math.log(hi / lo) };
    }
    if (zero) [lo, hi] = [Math.min(0, lo), Math.max(0, hi)];
    if (hi - lo <= Math.max(floor, 1e-9 * Math.max(Math.abs(lo), Math.abs(hi)))) {
      const pad = Math.abs(hi) > floor ? Math.abs(hi) * 0.1 : size;
      [lo, hi] = [zero || lo >= 0 ? Math.max(0, lo - pad) : lo - pad, hi + pad];
    }
    [lo, hi] = [lo / size, hi / size];
    const rough = (hi - lo) / Math.max(2, Math.min(8, room / spacing)), base = 10 ** Math.floor(Math.log10(rough));
    let step = [1, 2, 5, 10].find(m => m * base >= rough * 0.999) * base;
    if (whole) step = Math.max(1, step);
    if (!whole) [lo, hi] = [Math.floor(lo / step + 1e-9) * step, Math.ceil(hi / step - 1e-9) * step];
    [lo, hi] = [Math.max(lo, low / size), Math.min(hi, high / size)];
    const ticks = [], decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    for (let n = Math.ceil(lo / step - 1e-9); n * step <= hi + step * 1e-6; n += 1) ticks.push(n * step * size);
    return { title, ticks, text: v => grouped((v / size).toFixed(decimals)).replace(/^-/, '−').replace(/^−0(\.0*)?$/, '0$1'),
      at: v => (v / size - lo) / (hi - lo) };
  };

  // ------------------------------------------------------------------------------------ charts
  // A chart is {svg, targets, say, stride, pick}: places that mouse and arrow keys reach, and their words.
  const DASHES = ['', '7 4', '2 3', '10 3 2 3'];
  const look = number => ({ ink: color(`c${number % 8}`), dash: DASHES[Math.floor(number / 8) % 4] });
  const SHAPES = [
    (x, y, r) => `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`,
    (x, y, r) => `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}z`,
    (x, y, r) => `M${x} ${y - 1.3 * r}l${1.25 * r} ${2.2 * r}h${-2.5 * r}z`,
    (x, y, r) => `M${x} ${y - 1.4 * r}l${1.4 * r} ${1.4 * r}l${-1.4 * r} ${1.4 * r}l${-1.4 * r} ${-1.4 * r}z`,
    (x, y, r) => `M${x} ${y + 1.3 * r}l${1.25 * r} ${-2.2 * r}h${-2.5 * r}z`,
    (x, y, r) => `M${x - r} ${y - r / 3}h${r * 0.67}v${-r * 0.8}h${r * 0.67}v${r * 0.8}h${r * 0.67}v${r * 0.67}h${-r * 0.67}v${r * 0.8}h${-r * 0.67}v${-r * 0.8}h${-r * 0.67}z`,
  ];
  const shape = number => SHAPES[number % SHAPES.length];

  const canvas = (width, height) => s('svg', { viewBox: `0 0 ${width} ${height}`, width, height, 'aria-hidden': 'true' });
  const resize = (svg, height) => {
    svg.setAttribute('height', height);
    svg.setAttribute('viewBox', `0 0 ${svg.getAttribute('width')} ${height}`);
  };
  const legend = (svg, items, width, top) => {
    let [x, y] = [4, top];
    for (const { name, ink, dash, mark, block } of items) {
      const words = clipped(name, width - 40), room = wide(words) + (block ? 38 : 46);
      if (x > 4 && x + room - 16 > width) [x, y] = [4, y + 20];
      if (block) svg.append(s('rect', { x, y: y - 6, width: 14, height: 12, fill: ink, rx: 2, stroke: color('faint'), 'stroke-width': 0.5 }));
      else svg.append(dash != null && s('path', { d: `M${x} ${y}h22`, stroke: ink, 'stroke-width': 2.25, 'stroke-dasharray': dash, fill: 'none' }) || '',
        s('path', { d: shape(mark)(x + 11, y, dash == null ? 4.5 : 3), fill: ink }));
      svg.append(text(x + (block ? 20 : 28), y + 4, words));
      x += room;
    }
    return y + 14;
  };
  const frame = (width, height, x, y, items = []) => {
    const svg = canvas(width, height), left = 14 + Math.max(...y.ticks.map(t => wide(y.text(t))), 10);
    const [right, top, bottom] = [width - 14, 28, height - 42];
    const X = v => left + x.at(v) * (right - left), Y = v => bottom - y.at(v) * (bottom - top);
    svg.append(text(2, 13, clipped(y.title, width - 8)));
    for (const t of y.ticks) svg.append(
      s('path', { d: `M${left} ${Y(t)}H${right}`, stroke: color('grid') }),
      text(left - 7, Y(t) + 4, y.text(t), { 'text-anchor': 'end' }));
    let free = -Infinity;
    for (const t of x.ticks) {
      const half = wide(x.text(t)) / 2;
      svg.append(s('path', { d: `M${X(t)} ${bottom}v4`, stroke: color('faint') }));
      if (X(t) - half < free) continue;
      svg.append(text(X(t), bottom + 17, x.text(t), { 'text-anchor': 'middle' }));
      free = X(t) + half + 8;
    }
    svg.append(s('path', { d: `M${left} ${bottom}H${right}`, stroke: color('faint') }),
      text((left + right) / 2, bottom + 35, clipped(x.title, width), { 'text-anchor': 'middle' }));
    if (items.length) resize(svg, legend(svg, items, width, height + 10));
    return { svg, X, Y, left, right, top, bottom };
  };

  const lines = ({ series, x, y, height = 280, guide }) => width => {
    series = series.filter(each => each.points.some(p => known(p[1])));
    const all = series.flatMap(each => each.points.filter(p => known(p[0]) && known(p[1])));
    const values = all.flatMap(p => p.slice(1));
    const ax = axis(all.map(p => p[0]), x, width - 60, 64), ay = axis(values, y, height - 70, 42);
    // A few lines are told apart by their dashes too, many by their marks.
    const style = n => ({ ...look(series[n].look ?? n), ...(series.length < 4 && { dash: DASHES[n] }), mark: series[n].look ?? n });
    const named = series.length > 1 ? series.map((each, n) => ({ name: each.name, ...style(n) })) : [];
    const f = frame(width, height, ax, ay, named);
    if (guide) f.svg.append(s('path', { d: `M${f.X(guide[0][0])} ${f.Y(guide[0][1])}L${f.X(guide[1][0])} ${f.Y(guide[1][1])}`, stroke: color('faint'), 'stroke-dasharray': '4 4' }));
    series.forEach((each, n) => {
      const { ink, dash, mark } = style(n), points = each.points.filter(p => known(p[0]) && known(p[1]));
      if (points[0]?.length > 2) f.svg.append(s('path', { fill: ink, opacity: Math.min(0.16, 0.5 / series.length), d:
        `M${points.map(p => `${f.X(p[0])} ${f.Y(p[2])}`).join('L')}L${[...points].reverse().map(p => `${f.X(p[0])} ${f.Y(p[3])}`).join('L')}z` }));
      f.svg.append(s('path', { fill: 'none', stroke: ink, 'stroke-width': 2.25, 'stroke-dasharray': dash, 'stroke-linejoin': 'round',
        d: `M${points.map(p => `${f.X(p[0]).toFixed(2)} ${f.Y(p[1]).toFixed(2)}`).join('L')}` }));
      if (points.length < 41) f.svg.append(s('path', { fill: ink, d: points.map(p => shape(mark)(f.X(p[0]), f.Y(p[1]), 2.6)).join('') }));
    });
    const xs = [...new Set(all.map(p => p[0]))].sort((a, b) => a - b);
    return { svg: f.svg, targets: xs.map(v => [f.X(v) - 0.75, f.top, 1.5, f.bottom - f.top]), stride: 1,
      start: xs.length - 1,
      say: n => `${x.label} ${show(x.whole ? 'whole' : x.kind, xs[n])}: ` + series.map(each => {
        const found = each.points.find(p => p[0] === xs[n] && known(p[1]));
        return found && `${each.name} ${show(y.kind, found[1])}`;
      }).filter(Boolean).join(' · ') };
  };

  const ramp = (name, share) => {
    const stops = [0, 1, 2, 3, 4].map(n => color(`${name}${n}`)), place = Math.min(3.9999, Math.max(0, share * 4));
    const [a, b] = [stops[Math.floor(place)], stops[Math.floor(place) + 1]].map(hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16)));
    return `rgb(${a.map((v, i) => Math.round(v + (b[i] - v) * (place % 1))).join(' ')})`;
  };
  const LEVELS = 40;
  const heat = ({ rows, columns, value, of = 'r', log, kind, label, xlabel, ylabel, marks, pick, selected, range, bars, cell, markName }) => width => {
    const values = rows.flatMap((_, r) => columns.map((_, c) => value(r, c)));
    let [lo, hi] = range || extent(values.filter(v => !log || v > 0));
    if (lo > hi) [lo, hi] = [0, 1];
    if (log) lo = Math.max(lo, hi * 1e-6);
    const flat = hi - lo <= 1e-9 * Math.abs(hi);
    const share = v => !known(v) || (log && v <= 0) ? null
      : flat ? 0.5 : log ? Math.max(0, Math.log(v / lo) / Math.log(hi / lo)) : (v - lo) / (hi - lo);
    const side = bars ? Math.min(150, width * 0.2) : 0;
    const left = Math.min(width * 0.3, 12 + Math.max(...rows.map(wide))), right = width - 8 - side;
    const w = (right - left) / columns.length;
    const tall = cell || Math.max(5, Math.min(24, 420 / rows.length)), top = 66, bottom = top + tall * rows.length;
    const svg = canvas(width, bottom + 42), key = Math.min(180, width * 0.4);
    const [size, name] = unit(kind, Math.abs(hi));
    svg.append(text(2, 13, clipped(`${label}${name ? `, ${name}` : ''}${log ? ' (logarithmic)' : ''}`, width - 4)));
    for (let n = 0; n < 30; n += 1) svg.append(s('rect', { x: 2 + n * key / 30, y: 20, width: key / 30 + 0.4, height: 9, fill: ramp(of, n / 29) }));
    const bare = v => kind === 'percent' ? String(Math.round(100 * v)) : show('number', v / size);
    svg.append(text(2, 42, bare(lo)), text(2 + key, 42, bare(hi), { 'text-anchor': 'end' }));
    if (key > 120) svg.append(text(2 + key / 2, 42, bare(log ? Math.sqrt(lo * hi) : (lo + hi) / 2), { 'text-anchor': 'middle' }));
    if (markName) svg.append(s('circle', { cx: key + 24, cy: 25, r: 4, fill: color('ink'), stroke: color('card'), 'stroke-width': 1.5 }), text(key + 34, 29, clipped(markName, width - key - 38)));
    svg.append(s('rect', { x: left, y: top, width: Math.max(0, right - left), height: bottom - top, fill: 'none', stroke: color('line') }));
    const gap = tall > 9 && w > 7 ? 1 : 0, paths = {};
    rows.forEach((_, r) => columns.forEach((_, c) => {
      const t = share(value(r, c));
      if (t == null) return;
      const level = Math.round(Math.min(1, t) * LEVELS);
      (paths[level] ||= []).push(`M${(left + c * w).toFixed(2)} ${(top + r * tall).toFixed(2)}h${(w - gap).toFixed(2)}v${(tall - gap).toFixed(2)}h${(gap - w).toFixed(2)}z`);
    }));
    for (const [level, found] of Object.entries(paths)) svg.append(s('path', { d: found.join(''), fill: ramp(of, level / LEVELS) }));
    if (marks) {
      const size = Math.min(4.5, tall * 0.3, w * 0.3), d = rows.flatMap((_, r) => columns.map((_, c) =>
        marks(r, c) ? SHAPES[0](left + (c + 0.5) * w - gap / 2, top + (r + 0.5) * tall - gap / 2, size) : '')).join('');
      svg.append(s('path', { d, fill: color('ink'), stroke: color('card'), 'stroke-width': tall > 9 ? 1.5 : 0.5 }));
    }
    const every = Math.ceil(13 / tall);
    rows.forEach((row, r) => r % every || svg.append(text(left - 6, top + (r + 0.5) * tall + 4, clipped(row, left - 10), { 'text-anchor': 'end' })));
    const heads = columns.map(each => clipped(String(each), 110)), longest = Math.max(...heads.map(wide));
    const turned = longest + 8 > w && !/^\d+$/.test(heads[0]) && columns.length <= 60;
    const apart = Math.max(1, Math.ceil((turned ? 13 : longest + 8) / w));
    heads.forEach((each, c) => {
      if (c % apart) return;
      const x = left + (c + 0.5) * w;
      svg.append(turned ? text(0, 0, each, { 'text-anchor': 'end', transform: `translate(${x + 4} ${bottom + 10}) rotate(-45)` })
        : text(x, bottom + 16, each, { 'text-anchor': 'middle' }));
    });
    const below = bottom + (turned ? 28 + longest * 0.72 : 34);
    svg.append(text((left + right) / 2, below, xlabel, { 'text-anchor': 'middle' }), text(Math.max(2, left - 6 - wide(ylabel)), top - 6, ylabel));
    if (bars) {
      const most = Math.max(...bars.whole, ...bars.part, 1e-300), scale = (side - 24) / most, x = right + 16;
      svg.append(text(x, top - 6, clipped(bars.name, width - x)));
      rows.forEach((_, r) => svg.append(
        s('rect', { x, y: top + r * tall + tall * 0.15, width: bars.whole[r] * scale, height: tall * 0.7 - gap, fill: color('grid'), stroke: color('faint'), 'stroke-width': 0.75 }),
        s('rect', { x, y: top + r * tall + tall * 0.15, width: bars.part[r] * scale, height: tall * 0.7 - gap, fill: color('accent') })));
    }
    if (selected) svg.append(s('rect', { x: left + selected() * w - 1, y: top - 2, width: w + 2 - gap, height: bottom - top + 4, fill: 'none', stroke: color('ink'), 'stroke-width': 1.75, rx: 2 }));
    resize(svg, below + 10);
    const n = columns.length;
    return { svg, stride: n, start: 0, pick: pick && (i => pick(i % n)), quiet: true,
      targets: rows.flatMap((_, r) => columns.map((_, c) => [left + c * w, top + r * tall, w - gap, tall - gap])),
      say: i => `${ylabel} ${rows[Math.floor(i / n)]}, ${xlabel} ${columns[i % n]}: ${label} ${show(kind, value(Math.floor(i / n), i % n))}${marks ? (marks(Math.floor(i / n), i % n) ? ', trained' : ', not trained') : ''}` };
  };

  const stack = ({ names, xs, values, kind, label, xlabel, height = 280 }) => width => {
    const totals = xs.map((_, i) => names.reduce((sum, _, n) => sum + values[n][i], 0));
    const ax = axis([xs[0] - 0.5, xs[xs.length - 1] + 0.5], { kind: 'whole', label: xlabel, whole: true }, width - 60, 64);
    const ay = axis(totals, { kind, label, zero: true }, height - 70, 42);
    const f = frame(width, height, ax, ay, names.map((name, n) => ({ name, ink: look(n).ink, block: true })));
    const w = Math.max(1, Math.min(40, (f.right - f.left) / xs.length * 0.8)), low = xs.map(() => 0);
    names.forEach((_, n) => {
      const d = xs.map((x, i) => {
        const [y0, y1] = [f.Y(low[i]), f.Y(low[i] += values[n][i])];
        return y0 - y1 > 0.01 ? `M${(f.X(x) - w / 2).toFixed(2)} ${y1.toFixed(2)}h${w.toFixed(2)}V${y0.toFixed(2)}h${(-w).toFixed(2)}z` : '';
      }).join('');
      if (d) f.svg.append(s('path', { d, fill: look(n).ink, stroke: color('card'), 'stroke-width': w > 4 ? 0.75 : 0 }));
    });
    return { svg: f.svg, targets: xs.map(x => [f.X(x) - w / 2, f.top, w, f.bottom - f.top]), stride: 1, start: xs.length - 1,
      say: i => `${xlabel} ${xs[i]}: ${show(kind, totals[i])} · ${names.map((name, n) => `${name} ${show(kind, values[n][i])}`).join(' · ')}` };
  };

  const bars = ({ rows, kind, label, low, high, zero = true }) => width => {
    const left = Math.min(width * 0.42, 14 + Math.max(...rows.map(row => wide(row.name)))), tall = 30;
    const ax = axis(rows.map(row => row.value), { kind, label, zero, low, high }, width - left - 100, 70);
    const bottom = 8 + rows.length * tall, svg = canvas(width, bottom + 42), right = width - 92, X = v => left + ax.at(v) * (right - left);
    for (const t of ax.ticks) svg.append(s('path', { d: `M${X(t)} 4V${bottom}`, stroke: color('grid') }), text(X(t), bottom + 17, ax.text(t), { 'text-anchor': 'middle' }));
    svg.append(text((left + right) / 2, bottom + 35, ax.title, { 'text-anchor': 'middle' }));
    rows.forEach((row, r) => svg.append(text(left - 8, r * tall + 26, clipped(row.name, left - 10), { 'text-anchor': 'end', fill: color('ink') }),
      s('rect', { x: X(zero ? 0 : ax.ticks[0]), y: r * tall + 13, width: Math.max(0.5, X(row.value) - X(zero ? 0 : ax.ticks[0])), height: 18, rx: 2, fill: row.soft ? color('faint') : look(row.look ?? 0).ink }),
      text(X(row.value) + 6, r * tall + 26, row.text || show(kind, row.value), { fill: color('ink') })));
    return { svg, targets: rows.map((row, r) => [left, r * tall + 11, right - left, 22]), stride: 1, start: 0,
      say: r => `${rows[r].name}: ${rows[r].text || show(kind, rows[r].value)}${rows[r].more ? ` · ${rows[r].more}` : ''}` };
  };

  const strip = ({ rows, kind, label, zero }) => width => {
    const left = Math.min(width * 0.42, 14 + Math.max(...rows.map(row => wide(row.name)))), tall = 30, right = width - 16;
    const all = rows.flatMap(({ points }) => {
      const values = points.map(p => p.value), m = mean(values), d = deviation(values);
      return [...values, m - d, m + d];
    }).concat(zero ? [0] : []);
    const ax = axis(all, { kind, label }, width - left - 30, 70), bottom = 10 + rows.length * tall;
    const svg = canvas(width, bottom + 42), X = v => left + ax.at(v) * (right - left), targets = [], words = [];
    for (const t of ax.ticks) svg.append(s('path', { d: `M${X(t)} 4V${bottom}`, stroke: color('grid') }), text(X(t), bottom + 17, ax.text(t), { 'text-anchor': 'middle' }));
    if (zero) svg.append(s('path', { d: `M${X(0)} 2V${bottom}`, stroke: color('ink'), 'stroke-width': 1.25 }));
    svg.append(text((left + right) / 2, bottom + 35, clipped(ax.title, width), { 'text-anchor': 'middle' }));
    rows.forEach((row, r) => {
      const y = r * tall + 22, values = row.points.map(p => p.value), m = mean(values), d = deviation(values), { ink } = look(row.look ?? 0);
      svg.append(text(left - 8, y + 4, clipped(row.name, left - 10), { 'text-anchor': 'end', fill: color('ink') }));
      if (values.length > 1) svg.append(s('path', { d: `M${X(m - d)} ${y}H${X(m + d)}`, stroke: ink, 'stroke-width': 2, opacity: 0.6 }));
      svg.append(s('path', { d: `M${X(m)} ${y - 9}v18`, stroke: ink, 'stroke-width': 3 }),
        s('path', { d: row.points.map(p => SHAPES[0](X(p.value), y, 4)).join(''), fill: ink, 'fill-opacity': 0.55, stroke: color('card') }));
      row.points.forEach(p => { targets.push([X(p.value) - 6, y - 6, 12, 12]); words.push(`${row.name}, ${p.name}: ${show(kind, p.value)} · mean ${around(kind, values)}`); });
    });
    return { svg, targets, stride: 1, start: 0, say: n => words[n] };
  };

  const scatter = ({ entries, front, x, y, height = 320 }) => width => {
    const points = entries.flatMap(entry => entry.points.map(p => ({ ...p, entry })));
    const means = entries.map(entry => [mean(entry.points.map(p => p.x)), mean(entry.points.map(p => p.y))]);
    const ax = axis(points.map(p => p.x), x, width - 60, 70), ay = axis(points.map(p => p.y), y, height - 70, 42);
    const f = frame(width, height, ax, ay, entries.map(entry => ({ name: entry.name, ink: look(entry.look).ink, mark: entry.look })));
    f.svg.append(s('path', { d: `M${front.map(([a, b]) => `${f.X(a)} ${f.Y(b)}`).join('L')}`, fill: 'none', stroke: color('soft'), 'stroke-dasharray': '5 4', 'stroke-width': 1.25 }));
    for (const p of points) f.svg.append(s('path', { d: shape(p.entry.look)(f.X(p.x), f.Y(p.y), 2.6), fill: look(p.entry.look).ink, opacity: 0.55 }));
    entries.forEach((entry, n) => f.svg.append(s('path', { d: shape(entry.look)(f.X(means[n][0]), f.Y(means[n][1]), 6), fill: look(entry.look).ink, stroke: color('card'), 'stroke-width': 1.25 })));
    return { svg: f.svg, targets: points.map(p => [f.X(p.x) - 5, f.Y(p.y) - 5, 10, 10]), stride: 1, start: 0,
      say: n => `${points[n].entry.name}, ${points[n].name}: ${y.label} ${show(y.kind, points[n].y)}, ${x.label} ${show(x.kind, points[n].x)}` };
  };

  // ----------------------------------------------------------------------- figures and tables
  const plainly = value => value == null ? '' : String(value);
  // A spreadsheet would take a text that begins so for a formula.
  const cellText = value => typeof value === 'string' && /^[=+\-@\t]/.test(value) ? `'${value}` : plainly(value);
  const asCsv = rows => rows.map(row => row.map(cell => /[",\n\r]/.test(cellText(cell)) ? `"${cellText(cell).replace(/"/g, '""')}"` : cellText(cell)).join(',')).join('\n') + '\n';
  const save = (name, blob) => {
    const url = URL.createObjectURL(blob);
    h('a', { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  };
  const slug = words => words.toLowerCase().replace(/[^a-z0-9]+/g, '-').replace(/^-|-$/g, '');
  let VIEW;
  const fileName = (id, ending) => `${VIEW.title.replace(/[^\w.-]+/g, '-')}-${id}.${ending}`;
  const standalone = (svg, title) => {
    const copy = svg.cloneNode(true), width = Number(svg.getAttribute('width')), height = Number(svg.getAttribute('height')) + 34;
    copy.querySelectorAll('.cursor').forEach(node => node.remove());
    const inner = s('g', { transform: 'translate(10 30)' }, ...copy.childNodes);
    return s('svg', { viewBox: `0 0 ${width + 20} ${height + 6}`, width: width + 20, height: height + 6 },
      s('rect', { width: '100%', height: '100%', fill: color('card') }), text(12, 20, title, { 'font-size': 14, 'font-weight': 600, fill: color('ink') }), inner);
  };
  const png = svg => new Promise((done, failed) => {
    const image = new Image(), url = URL.createObjectURL(new Blob([new XMLSerializer().serializeToString(svg)], { type: 'image/svg+xml' }));
    image.onload = () => {
      const sheet = h('canvas', { width: 2 * svg.getAttribute('width'), height: 2 * svg.getAttribute('height') });
      sheet.getContext('2d').drawImage(image, 0, 0, sheet.width, sheet.height);
      URL.revokeObjectURL(url);
      sheet.toBlob(done, 'image/png');
    };
    image.onerror = failed;
    image.src = url;
  });
  const unfold = (id, summary, content) => {
    const box = h('details', { id, ontoggle: () => {
      if (box.open && box.children.length === 1) box.append(content());
      state.open[box.open ? 'add' : 'delete'](id);
    } }, h('summary', { id: `${id}-summary` }, summary));
    if (state.open.has(id)) box.open = true;
    return box;
  };
  const plainTable = (caption, rows) => h('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': caption },
    h('table', {}, h('thead', {}, h('tr', {}, rows[0].map(name => h('th', { scope: 'col' }, String(name))))),
      h('tbody', {}, rows.slice(1).map(row => h('tr', {}, row.map(cell => h('td', { class: known(cell) ? 'num' : 'text' }, plainly(cell))))))));

  const figure = (id, title, about, chart, rows, { className = '', controls = [] } = {}) => {
    const plot = h('div', { id: `${id}-plot`, class: 'plot', tabindex: 0, role: 'group', 'aria-label': `${title}. ${about} Arrow keys read the values.` });
    const read = h('p', { class: 'read', id: `${id}-read`, 'aria-live': 'polite' });
    let made, at = null, cursor, last = 0;
    const put = n => {
      if (!made.targets.length) return;
      at = Math.max(0, Math.min(made.targets.length - 1, n));
      const [x, y, width, height] = made.targets[at];
      cursor ||= made.svg.appendChild(s('rect', { class: 'cursor', fill: 'none', stroke: color('ink'), 'stroke-width': 1.5, 'pointer-events': 'none' }));
      for (const [name, value] of Object.entries({ x, y, width, height })) cursor.setAttribute(name, value);
      read.textContent = made.say(at);
    };
    const nearest = event => {
      const box = made.svg.getBoundingClientRect(), scale = made.svg.getAttribute('width') / box.width;
      const [px, py] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
      let [best, least] = [0, Infinity];
      made.targets.forEach(([x, y, w, t], n) => {
        const d = Math.max(x - px, 0, px - x - w) ** 2 + Math.max(y - py, 0, py - y - t) ** 2 + 1e-6 * (px - x - w / 2) ** 2;
        if (d < least) [best, least] = [n, d];
      });
      return best;
    };
    const draw = () => {
      last = plot.clientWidth;
      made = chart(last || 600);
      cursor = null;
      plot.replaceChildren(made.svg);
      if (at != null) put(at);
      else read.textContent = made.quiet || !made.targets.length ? '' : made.say(made.start);
    };
    fill(plot, {
      onpointermove: event => put(nearest(event)),
      onclick: event => { put(nearest(event)); made.pick?.(at); },
      onkeydown: event => {
        const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -made.stride, ArrowDown: made.stride, Home: -1e9, End: 1e9 }[event.key];
        if (move) { put((at ?? made.start) + move); event.preventDefault(); }
        if (event.key === 'Enter' && at != null) made.pick?.(at);
      },
    }, []);
    drawn.push({ plot, draw, width: () => last });
    const tools = h('div', { class: 'tools' },
      h('button', { id: `${id}-png`, type: 'button', 'aria-label': `Save as PNG: ${title}`, onclick: async () => save(fileName(id, 'png'), await png(standalone(made.svg, title))) }, 'PNG'),
      h('button', { id: `${id}-svg`, type: 'button', 'aria-label': `Save as SVG: ${title}`, onclick: () => save(fileName(id, 'svg'), new Blob([new XMLSerializer().serializeToString(standalone(made.svg, title))], { type: 'image/svg+xml' })) }, 'SVG'),
      h('button', { id: `${id}-csv`, type: 'button', 'aria-label': `Save as CSV: ${title}`, onclick: () => save(fileName(id, 'csv'), new Blob([asCsv(rows())], { type: 'text/csv' })) }, 'CSV'));
    return h('figure', { id, class: className }, h('figcaption', {}, h('h3', {}, title), tools), h('p', { class: 'about' }, about),
      controls, plot, read, unfold(`${id}-data`, 'Data as a table', () => plainTable(`Data: ${title}`, rows())));
  };

  // Columns are {name, value(row), show(row), num}; a click on a head sorts.
  const table = (id, title, about, columns, rows, { className = 'wide', sort = null, rowClass } = {}) => {
    const body = h('tbody'), heads = columns.map((column, n) => h('th', { scope: 'col', class: column.num ? 'num' : '', 'aria-sort': 'none' },
      h('button', { type: 'button', id: `${id}-sort-${n}`, onclick: () => order(n, state.sort[id]?.[0] === n ? -state.sort[id][1] : column.num ? -1 : 1) }, column.name)));
    const order = (n, direction) => {
      state.sort[id] = [n, direction];
      const by = columns[n].value, blank = v => v == null || v === '';
      const sorted = [...rows].sort((a, b) => {
        const [x, y] = [by(a), by(b)];
        if (blank(x) || blank(y)) return blank(x) - blank(y);
        return direction * (typeof x === 'number' && typeof y === 'number' ? x - y : String(x).localeCompare(String(y), 'en', { numeric: true }));
      });
      heads.forEach((head, m) => head.setAttribute('aria-sort', m === n ? (direction > 0 ? 'ascending' : 'descending') : 'none'));
      put(sorted);
    };
    const put = shown => body.replaceChildren(...shown.map(row => h('tr', { class: rowClass?.(row) }, columns.map((column, m) => h(m ? 'td' : 'th', m ? { class: column.num ? 'num' : 'text' } : { scope: 'row', class: column.num ? 'num' : '' },
        column.show ? column.show(row) : column.num ? show('number', column.value(row)) : plainly(column.value(row)))))));
    if (state.sort[id] || sort) order(...(state.sort[id] || sort));
    else put(rows);
    return h('div', { id, class: `card ${className}` },
      h('div', { class: 'head' }, h('h3', {}, title), h('div', { class: 'tools' }, h('button', { id: `${id}-csv`, type: 'button', 'aria-label': `Save as CSV: ${title}`,
        onclick: () => save(fileName(id, 'csv'), new Blob([asCsv([columns.map(c => c.name), ...rows.map(row => columns.map(c => c.value(row)))])], { type: 'text/csv' })) }, 'CSV'))),
      about && h('p', { class: 'about' }, about),
      h('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': title }, h('table', {}, h('thead', {}, h('tr', {}, heads)), body)));
  };
  const choice = (id, label, options, current, changed) => h('fieldset', { id }, h('legend', {}, label), Object.entries(options).map(([value, name]) =>
    h('label', {}, h('input', { type: 'radio', id: `${id}-${value}`, name: id, value, checked: value === current, onchange: () => changed(value) }), name)));
  const facts = pairs => h('dl', { class: 'facts' }, pairs.filter(([, value]) => value != null).map(([name, value]) => h('div', {}, h('dt', {}, name), h('dd', {}, value))));
  const section = (id, title, about, ...content) => content.flat(9).some(Boolean)
    && [id, title, h('section', { id, 'aria-labelledby': `${id}-title` }, h('h2', { id: `${id}-title` }, title), about && h('p', { class: 'note' }, about), h('div', { class: 'cards' }, ...content))];
  const numbers = tiles => h('dl', { class: 'numbers' }, tiles.map(([name, value, more]) => h('div', {}, h('dt', {}, name), h('dd', {}, value, h('small', {}, more)))));

  // ---------------------------------------------------------------------------------- one run
  const kindOf = metric => metric.low === 0 && metric.high === 1 ? 'percent' : 'number';
  const X_AXES = { rounds: 'round', bytes: 'bytes sent', flops: 'FLOPs', seconds: 'time' };
  const xAxis = () => state.x === 'rounds' ? { label: 'round', kind: 'whole', whole: true }
    : { label: { bytes: 'bytes sent, up and down', flops: 'FLOPs of training and probes', seconds: 'time of rounds' }[state.x], kind: state.x, zero: true };

  const renderRun = view => {
    const { summary, metric, selection } = view, kind = kindOf(metric), main = view.scores[metric.name];
    const sum = values => values.reduce((a, b) => a + (b || 0), 0), traffic = view.traffic, up = sum(traffic.bytes_up), full = sum(traffic.bytes_full_up);
    const done = view.rounds.length - 1, seconds = sum(view.seconds), flops = view.flops.flops + view.flops.flops_probe;
    const reached = main.filter(known), best = summary.best?.value ?? null;
    const failed = sum(view.failures.map(f => f.count)), bestRound = summary.best?.round;
    const rounds = view.rounds.slice(1), evaluated = Math.max(...view.rounds.map((_, i) => Object.values(view.scores).some(score => known(score[i])) ? i : 0));

    const intro = [
      h('p', { class: 'lead', id: 'sentence' }, view.sentence),
      numbers([
        [`test ${metric.name}`, show(kind, main[evaluated]), known(best) ? `best ${show(kind, best)} in round ${bestRound}` : reached.length ? '' : 'not evaluated yet'],
        ['uplink', show('bytes', up), full ? `${show('percent', up / full)} of full-model exchange` : ''],
        ['compute', show('flops', flops), `${show('percent', flops ? view.flops.flops_probe / flops : 0)} of it in probes`],
        ['time', show('seconds', seconds), done ? `${show('seconds', seconds / done)} a round` : ''],
        ['updates', show('whole', view.updates), failed ? `${counted(failed, 'failure')}: see below` : done ? 'no failures' : 'no round is finished'],
      ])];

    // Progress: score and loss over rounds, bytes, FLOPs or time.
    const progress = h('div', { class: 'cards' });
    const xOf = n => state.x === 'rounds' ? view.rounds[n] : view.spent[state.x][n];
    const along = found => Object.entries(found).map(([name, values], n) => ({ name, look: n, points: values.map((v, i) => [xOf(i), v]) }));
    const asRows = found => () => [['round', 'bytes sent', 'FLOPs', 'seconds', ...Object.keys(found)],
      ...view.rounds.map((round, i) => [round, view.spent.bytes[i], view.spent.flops[i], view.spent.seconds[i], ...Object.values(found).map(v => v[i])])];
    const some = found => Object.fromEntries(Object.entries(found).filter(([, values]) => values.some(known)));
    const alike = some(kind === 'percent' ? Object.fromEntries(Object.entries(view.scores).filter(([, v]) => v.every(x => !known(x) || (x >= 0 && x <= 1)))) : { [metric.name]: main });
    const losses = some(view.losses);
    const drawProgress = () => {
      drawn = drawn.filter(each => !progress.contains(each.plot));
      progress.replaceChildren(...[
        Object.keys(alike).length && figure('score', `Test ${metric.name} by ${X_AXES[state.x]}`, 'On the server’s test set; round 0 is the model before training.',
          lines({ series: along(alike), x: xAxis(), y: { label: Object.keys(alike).length > 1 ? 'score' : `test ${metric.name}`, kind, low: metric.low ?? undefined, high: metric.high ?? undefined } }), asRows(alike)),
        Object.keys(losses).length && figure('loss', `Loss by ${X_AXES[state.x]}`, 'The task’s own loss; that in training is the mean over a round’s clients.', lines({ series: along(losses), x: xAxis(), y: { label: 'loss' } }), asRows(losses)),
      ].filter(Boolean));
      redraw();
    };
    const xChoice = choice('x', 'Horizontal axis', X_AXES, state.x, value => { state.x = value; drawProgress(); });

    // The selection map, and the slider to one round's clients × layers.
    const names = selection[0]?.layers || [], order = names.map((_, n) => names.length - 1 - n);
    if (state.round == null || state.round >= selection.length || state.follow) state.round = selection.length - 1;
    const rms = selection.map(row => row.norms && names.map((_, l) => Math.sqrt(mean(row.norms.map(each => each[l] ** 2)))));
    const mapBox = h('div', { class: 'wide' }), roundBox = h('div', { class: 'wide' }), slider = h('input', { type: 'range', id: 'round-slider', min: 0, max: Math.max(0, selection.length - 1), step: 1, value: state.round, 'aria-label': 'Round to show' }), at = h('output', { for: 'round-slider' });
    const goto = n => {
      state.round = n;
      state.follow = LIVE && n === selection.length - 1;
      slider.value = n;
      at.textContent = `round ${selection[n].round}`;
      slider.setAttribute('aria-valuetext', at.textContent);
      drawn.find(each => each.plot.id === 'map-plot').draw();
      drawRound();
    };
    slider.addEventListener('input', () => goto(Number(slider.value)));
    const drawMap = () => {
      drawn = drawn.filter(each => !mapBox.contains(each.plot));
      const share = state.map === 'share', at = (r, c) => share ? view.shares[c][order[r]] : rms[c]?.[order[r]];
      mapBox.replaceChildren(figure('map', share ? 'Share of the round’s clients that updated each layer' : 'Gradient norm of each layer, as probed',
        share ? 'Input at the bottom. A click, or Enter, opens a round below.' : 'Root mean square over the round’s clients; rounds without a probe are blank. Input at the bottom.',
        heat({ rows: order.map(l => names[l]), columns: selection.map(row => String(row.round)), value: at, of: share ? 'r' : 'n', log: !share, kind: share ? 'percent' : 'number',
          label: share ? 'share of clients' : 'gradient norm', xlabel: 'round', ylabel: 'layer', range: share ? [0, 1] : null, pick: goto, selected: () => state.round }),
        () => [['round', ...names], ...selection.map((row, c) => [row.round, ...names.map((_, l) => share ? view.shares[c][l] : rms[c]?.[l])])],
        { controls: rms.some(Boolean) && h('div', { class: 'controls' }, choice('map-kind', 'Colour', { share: 'clients that updated it', norm: 'gradient norm' }, state.map, value => { state.map = value; drawMap(); document.getElementById(`map-kind-${value}`)?.focus(); })) }));
      redraw();
    };
    const drawRound = () => {
      drawn = drawn.filter(each => !roundBox.contains(each.plot));
      const row = selection[state.round], mark = (r, c) => row.masks[r][c] === '1', norm = row.norms && state.cell === 'norm';
      const of = key => n => row[key]?.[n];
      const lost = known(row.best_gain) ? row.best_gain - row.gain : null, part = (a, b) => b > 0 ? ` (${show('percent', a / b)})` : '';
      const columns = [
        { name: 'client', num: true, value: n => row.clients[n], show: n => show('whole', row.clients[n]) }, { name: 'layers', value: n => row.layers.filter((_, l) => mark(n, l)).join(' ') },
        { name: 'budget', num: true, value: of('budgets') }, { name: 'spent', num: true, value: of('spent') },
        row.gains && { name: 'gain of (P1)', num: true, value: of('gains') }, { name: 'loss', num: true, value: of('train_loss') },
        { name: 'uplink', num: true, value: of('bytes_up'), show: n => show('bytes', row.bytes_up[n]) }, { name: 'time', num: true, value: of('train_seconds'), show: n => show('seconds', row.train_seconds[n]) },
        row.failed.some(Boolean) && { name: 'failed in', value: of('failed') }].filter(Boolean);
      const unitOf = view.settings.find(each => each[0] === 'budget.unit')?.[1] || '';
      roundBox.replaceChildren(
        h('div', { class: 'card', id: 'round-facts' }, h('h3', {}, `Round ${row.round}: what was solved`), facts([
          ['solver', row.solver === 'rule' ? 'a rule, no solver' : row.solver], ['time of the selection', show('seconds', row.seconds)],
          ['gap to the proven bound', known(row.gap) ? (row.gap === 0 ? '0 (optimal)' : show('percent', row.gap)) : null],
          ['objective of (P1)', known(row.objective) ? show('number', row.objective) : null], ['bound', known(row.bound) ? show('number', row.bound) : null],
          ['λ that was found', known(row.consistency) ? show('number', row.consistency) : null],
          ['gain of the masks', known(row.gain) ? show('number', row.gain) : null],
          ['penalty by λ', known(row.penalty) ? `${show('number', Math.abs(row.penalty) < 1e-9 * row.gain ? 0 : row.penalty)}${part(row.penalty, row.gain)}` : null],
          ['gain given up for λ', known(lost) ? `${show('number', lost < 1e-9 * row.best_gain ? 0 : lost)}${part(lost, row.best_gain)}` : null],
          ['budget that was spent', `${show('number', sum(row.spent))} of ${show('number', sum(row.budgets))} ${unitOf}`],
          ['clients that kept their masks', row.held.length ? show('whole', row.held.length) : null],
        ]), known(row.gain) && h('p', { class: 'about' }, 'Gains are what strategy.statistic names, by default squared gradient norms. The gain given up is the difference to each client’s own best layers, which (P1) picks at λ = 0.')),
        figure('round-map', `Round ${row.round}: clients and layers`, norm ? 'A dot marks a layer that the client trained; the colour is its gradient norm. The bars show the spent part of each budget.' : 'The colour and the dot mark the layers that the client trained. The bars show the spent part of each budget.',
          heat({ rows: row.clients.map(String), columns: row.layers, value: (r, c) => norm ? row.norms[r][c] : mark(r, c) ? 1 : 0, of: norm ? 'n' : 'r', log: norm, kind: norm ? 'number' : 'percent', range: norm ? null : [0, 1],
            label: norm ? 'gradient norm' : 'trained', markName: 'trained', xlabel: 'layer', ylabel: 'client', marks: mark, cell: Math.max(7, Math.min(26, 560 / row.clients.length)), bars: { name: `budget, ${unitOf}`, whole: row.budgets, part: row.spent } }),
          () => [['client', 'budget', 'spent', ...row.layers.flatMap(name => [`${name} trained`, ...(row.norms ? [`${name} gradient norm`] : [])])],
            ...row.clients.map((client, r) => [client, row.budgets[r], row.spent[r], ...row.layers.flatMap((_, c) => [Number(row.masks[r][c]), ...(row.norms ? [row.norms[r][c]] : [])])])],
          { controls: row.norms && h('div', { class: 'controls' }, choice('cell-kind', 'Colour', { norm: 'gradient norm', mask: 'mask only' }, state.cell, value => { state.cell = value; drawRound(); document.getElementById(`cell-kind-${value}`)?.focus(); })) }),
        table('round-clients', `Round ${row.round}: each client`, null, columns, row.clients.map((_, n) => n)));
      redraw();
    };

    // Clients.
    const has = key => view.clients.some(row => row[key] != null), classes = view.data.classes || [];
    const mainly = groups => groups && Object.entries(groups).sort((a, b) => b[1] - a[1]).map(([name, n]) => Object.keys(groups).length > 1 ? `${name} ${n}` : name).join(', ');
    const clientColumns = [
      { name: 'client', num: true, value: r => r.client, show: r => show('whole', r.client) },
      has('examples') && { name: 'examples', num: true, value: r => r.examples, show: r => show('whole', r.examples) },
      has('classes') && { name: 'classes', num: true, value: r => r.classes?.filter(n => n > 0).length, show: r => show('whole', r.classes?.filter(n => n > 0).length) },
      (view.data.groups || []).length > 0 && { name: 'group', value: r => mainly(r.groups) },
      has('score') && { name: view.clients.find(r => r.scores) ? metric.name : 'own accuracy', num: true, value: r => r.score, show: r => show(kind, r.score) },
      has('evaluated') && { name: 'after round', num: true, value: r => r.evaluated },
      { name: 'rounds', num: true, value: r => r.rounds }, { name: 'layers trained', num: true, value: r => r.layers },
      { name: 'failures', num: true, value: r => r.failures }, { name: 'uplink', num: true, value: r => r.bytes_up, show: r => show('bytes', r.bytes_up) },
      { name: 'downlink', num: true, value: r => r.bytes_down, show: r => show('bytes', r.bytes_down) }, { name: 'compute', num: true, value: r => r.flops + r.flops_probe, show: r => show('flops', r.flops + r.flops_probe) },
      { name: 'time', num: true, value: r => r.train_seconds, show: r => show('seconds', r.train_seconds) },
      has('reason') && { name: 'last failure', value: r => r.reason }].filter(Boolean);
    const withClasses = view.clients.filter(r => r.classes && classes.length);

    // Scores of parts of the test set.
    const ev = view.evaluation, groups = Object.entries(ev.groups || {}), gName = groups[0] && Object.keys(groups[0][1]).find(k => k === metric.name) || groups[0] && Object.keys(groups[0][1]).find(k => k !== 'examples');
    const gNames = [...new Set(view.groups.flatMap(g => Object.keys(g || {})))], scored = gNames.length ? Object.keys(view.groups.find(Boolean)[gNames[0]]) : [], gKey = scored.find(k => k === metric.name) ?? scored.find(k => k !== 'examples');
    const bins = ev.calibration?.bins?.filter(bin => bin.examples > 0 && known(bin.accuracy)), totals = ev.confusion?.map(sum);
    const ends = bins?.length > 0 && ['confidence', 'accuracy'].map(key => extent(bins.map(bin => bin[key])));
    const perfect = ends && [Math.max(...ends.map(e => e[0])), Math.min(...ends.map(e => e[1]))];
    const perClass = ev.per_class || [];

    const terms = view.terms, floor = view.terms_floor, phases = [...new Set(view.phases.flatMap(Object.keys))], perPhase = phases.map(name => view.phases.map(row => row[name] || 0));
    const shareOf = (a, b) => b ? `${show('percent', a / b)} of full` : '';
    const privacy = view.privacy, settings = view.settings, changed = settings.filter(row => row[3]);
    const settingTable = h('div', { class: 'wide' });
    const drawSettings = () => settingTable.replaceChildren(table('settings', 'Settings', null, [
      { name: 'setting', value: r => r[0], show: r => h('code', {}, r[0]) }, { name: 'value', value: r => String(r[1]), show: r => r[1] === '' ? 'empty' : String(r[1]) },
      { name: 'default', value: r => r[2] == null ? '' : String(r[2]), show: r => r[2] == null ? '–' : r[2] === '' ? 'empty' : String(r[2]) }],
      state.differs ? changed : settings, { sort: null, rowClass: r => r[3] && 'differs' }));
    const copy = words => h('button', { type: 'button', 'aria-label': `Copy: ${words}`, onclick: async event => {
      try { await navigator.clipboard.writeText(words); event.target.textContent = 'copied'; } catch { event.target.textContent = 'select it by hand'; }
    } }, 'Copy');

    const sections = [
      section('progress-section', 'Progress', null, done > 0 && [h('div', { class: 'controls wide' }, xChoice), h('div', { class: 'wide' }, progress)]),
      section('selection', 'Selected layers', null, selection.length > 0 && [mapBox, h('div', { class: 'card wide chooser' }, h('div', { class: 'controls' }, h('div', { class: 'slider' }, h('label', { for: 'round-slider' }, 'One round'), slider, at))), roundBox]),
      section('clients', 'Clients', null,
        withClasses.length > 0 && figure('client-classes', 'Examples of each class by client', 'What each client has to train on.', heat({ rows: withClasses.map(r => String(r.client)), columns: classes.map(String), value: (r, c) => withClasses[r].classes[c] || null, kind: 'number', label: 'examples', xlabel: 'class', ylabel: 'client' }),
          () => [['client', ...classes], ...withClasses.map(r => [r.client, ...r.classes])], { className: 'wide' }),
        view.clients.length > 0 && table('client-table', 'Each client over the run', 'Sums over all rounds; time by the clients’ own clocks.', clientColumns, view.clients)),
      section('scores', 'Test set', ev.round != null && `Of the model after round ${ev.round}.`,
        groups.length > 0 && figure('groups', `Test ${gName} by group`, 'Groups of the test set.', bars({ rows: groups.map(([name, row]) => ({ name, value: row[gName], more: row.examples != null && counted(row.examples, 'example') })), kind, label: gName, low: metric.low ?? undefined, high: metric.high ?? undefined }), () => [['group', ...Object.keys(groups[0][1])], ...groups.map(([name, row]) => [name, ...Object.values(row)])]),
        gNames.length > 0 && figure('groups-rounds', `Test ${gKey} by group and round`, 'One line for each group of the test set.', lines({ series: gNames.map((name, n) => ({ name, look: n, points: view.groups.map((g, i) => [rounds[i], g?.[name]?.[gKey]]) })), x: { label: 'round', kind: 'whole', whole: true }, y: { label: gKey, kind } }), () => [['round', ...gNames], ...rounds.map((r, i) => [r, ...gNames.map(name => view.groups[i]?.[name]?.[gKey])])]),
        ev.confusion && figure('confusion', 'Confusion matrix', 'The share of each true class’s examples that the model takes for each class.', heat({ rows: ev.classes.map(String), columns: ev.classes.map(String), value: (r, c) => totals[r] ? ev.confusion[r][c] / totals[r] : null, kind: 'percent', range: [0, 1], label: 'share of the true class', xlabel: 'predicted', ylabel: 'true', cell: Math.max(4, Math.min(30, 460 / ev.classes.length)) }), () => [['true', ...ev.classes.map(c => `predicted ${c}`)], ...ev.confusion.map((row, r) => [ev.classes[r], ...row])]),
        perClass.length > 0 && table('per-class', 'Each class', null, [{ name: 'class', value: r => r.class }, ...['precision', 'recall', 'f1'].map(key => ({ name: key, num: true, value: r => r[key], show: r => show('percent', r[key]) })), { name: 'support', num: true, value: r => r.support, show: r => show('whole', r.support) }], perClass, { className: '' }),
        bins?.length > 0 && figure('calibration', 'Calibration', `Accuracy by stated confidence; the dashed line is perfect. Expected calibration error ${show('percent', ev.calibration.ece)}.`, lines({ series: [{ name: 'accuracy', points: bins.map(bin => [bin.confidence, bin.accuracy]) }], x: { label: 'confidence', kind: 'percent', low: 0, high: 1 }, y: { label: 'accuracy', kind: 'percent', low: 0, high: 1 }, guide: perfect[0] < perfect[1] && perfect.map(v => [v, v]) }), () => [['confidence', 'accuracy', 'examples'], ...bins.map(bin => [bin.confidence, bin.accuracy, bin.examples])])),
      section('theory', 'Error terms', 'Estimates of the two terms of the method’s error floor, in squared gradients.',
        terms.e1.some(known) && figure('e1', 'E1: layers that no client trains', 'Known in rounds that probe gradient norms.', lines({ series: [{ name: 'E1', points: rounds.map((r, i) => [r, terms.e1[i]]) }], x: { label: 'round', kind: 'whole', whole: true }, y: { label: 'estimate', zero: true, floor: Math.max(floor, 1e-12) } }), () => [['round', 'e1'], ...rounds.map((r, i) => [r, terms.e1[i]])]),
        terms.e2.some(known) && figure('e2', 'E2: differences between clients', 'And the part of it that differing masks cause.', lines({ series: [{ name: 'E2', points: rounds.map((r, i) => [r, terms.e2[i]]) }, { name: 'part from masks', points: rounds.map((r, i) => [r, terms.e2_masks[i]]) }], x: { label: 'round', kind: 'whole', whole: true }, y: { label: 'estimate', zero: true, floor: Math.max(floor, 1e-12) } }), () => [['round', 'e2', 'e2_masks'], ...rounds.map((r, i) => [r, terms.e2[i], terms.e2_masks[i]])])),
      section('bytes', 'Bytes', 'As if each client were a separate device.',
        done > 0 && figure('ledger', 'Bytes against full-model exchange', 'Full-model exchange sends every layer in both directions.', bars({ rows: [
          { name: 'uplink', value: up, text: `${show('bytes', up)}` , more: shareOf(up, full) }, { name: '… full model', value: full, soft: true },
          { name: 'downlink', value: sum(traffic.bytes_down), more: shareOf(sum(traffic.bytes_down), sum(traffic.bytes_full_down)) }, { name: '… full model', value: sum(traffic.bytes_full_down), soft: true }], kind: 'bytes', label: 'bytes of the run' }),
          () => [['direction', 'bytes', 'full-model bytes'], ['uplink', up, full], ['downlink', sum(traffic.bytes_down), sum(traffic.bytes_full_down)]]),
        done > 0 && figure('bytes-rounds', 'Bytes by round', 'A client receives only the layers that it does not hold.', lines({ series: [['uplink', 'bytes_up'], ['downlink', 'bytes_down']].map(([name, key]) => ({ name, points: rounds.map((r, i) => [r, traffic[key][i]]) })), x: { label: 'round', kind: 'whole', whole: true }, y: { label: 'bytes of a round', kind: 'bytes', zero: true } }), () => [['round', ...Object.keys(traffic)], ...rounds.map((r, i) => [r, ...Object.values(traffic).map(v => v[i])])])),
      section('cost', 'Cost by phase', 'Time by the server’s clock.',
        phases.length > 0 && figure('phases', 'Time of each round by phase', 'A phase lasts until the last awaited reply.', stack({ names: phases, xs: rounds, values: perPhase, kind: 'seconds', label: 'time of a round', xlabel: 'round' }), () => [['round', ...phases], ...rounds.map((r, i) => [r, ...perPhase.map(v => v[i])])]),
        phases.length > 0 && figure('phase-totals', 'Time of the run by phase', 'Sums over rounds.', bars({ rows: phases.map((name, n) => ({ name, value: sum(perPhase[n]), look: n, more: `${show('percent', sum(perPhase[n]) / seconds)} of the rounds’ time` })), kind: 'seconds', label: 'time' }), () => [['phase', 'seconds'], ...phases.map((name, n) => [name, sum(perPhase[n])])])),
      section('failures', 'Failures', null, view.failures.length ? table('failure-table', 'Replies that were missing or refused', 'The round went on with the other clients.', [
        { name: 'phase', value: r => r.phase }, { name: 'reason', value: r => r.reason }, { name: 'times', num: true, value: r => r.count, show: r => show('whole', r.count) },
        { name: 'clients', value: r => r.clients.join(', ') }, { name: 'rounds', value: r => r.rounds.join(', ') }], view.failures, { sort: [2, -1] }) : h('p', { class: 'empty wide', id: 'no-failures' }, done ? 'Every reply came and was usable.' : 'No round is finished.')),
      privacy && section('privacy', 'Privacy', privacy.covers && `ε by client, for ${privacy.covers}, at δ = ${privacy.delta}.`,
        privacy.epsilon.some(known) ? figure('epsilon', 'Privacy loss ε by round', 'What the run has spent up to each round.', lines({ series: [{ name: 'ε', points: rounds.map((r, i) => [r, privacy.epsilon[i]]) }], x: { label: 'round', kind: 'whole', whole: true }, y: { label: 'ε', zero: true } }), () => [['round', 'epsilon'], ...rounds.map((r, i) => [r, privacy.epsilon[i]])], { className: 'wide' })
          : h('p', { class: 'empty wide' }, privacy.epsilon.includes('inf') ? 'ε is infinite: the run promises no privacy.' : 'Nothing has been revealed yet.')),
      section('configuration', 'Configuration', null,
        h('div', { class: 'card wide' }, h('h3', {}, 'Repeat this run'), Object.entries(view.commands).map(([name, words]) => [h('p', { class: 'about' }, `${name}: `, copy(words)), h('pre', { tabindex: 0 }, h('code', {}, words))])),
        h('div', { class: 'controls wide' }, h('label', {}, h('input', { type: 'checkbox', id: 'differs', checked: state.differs, onchange: event => { state.differs = event.target.checked; drawSettings(); } }), ` only the ${changed.length} of ${settings.length} settings that differ from the defaults`)),
        settingTable,
        h('div', { class: 'card wide' }, h('h3', {}, 'Versions'), facts([['engine', summary.engine], ...Object.entries(summary.versions || {})])),
        view.layers.length > 0 && table('layer-table', 'Layers of the model', null, [{ name: 'layer', value: r => r.name }, { name: 'role', value: r => ({ embeddings: 'frozen', block: 'selectable', head: 'always trained' }[r.kind]) },
          { name: 'parameters', num: true, value: r => r.elements, show: r => show('whole', r.elements) }, { name: 'size', num: true, value: r => r.bytes, show: r => show('bytes', r.bytes) }, { name: 'forward pass of an example', num: true, value: r => r.forward_flops, show: r => show('flops', r.forward_flops) }], view.layers.map((r, n) => ({ ...r, n })))),
    ];
    return { intro, sections, ready: () => { drawProgress(); drawSettings(); if (selection.length) { drawMap(); goto(state.round); } }, badge: [summary.status, summary.status],
      about: `${summary.task} · ${summary.strategy} · seed ${summary.seed} · ${summary.engine}` };
  };

  // ------------------------------------------------------------------------------- comparison
  const renderComparison = view => {
    state.experiment = Math.min(state.experiment, view.experiments.length - 1);
    const here = view.experiments[state.experiment], { metric, entries } = here;
    const kind = kindOf(metric), points = kind === 'percent' ? 'points' : 'number';
    const pick = (id, label, options, current, changed) => h('label', {}, `${label} `, h('select', { id, onchange: event => { changed(Number(event.target.value)); render(); document.getElementById(id)?.focus(); } },
      options.map((name, n) => h('option', { value: n, selected: n === current }, name))));
    const spread = (entry, key, how) => { const v = entry.runs.map(r => r[key]).filter(known); return v.length ? around(how, v) : '–'; };
    const of = key => entry => { const v = entry.runs.map(r => r[key]).filter(known); return v.length ? mean(v) : null; };
    const number = new Map(entries.map((entry, n) => [entry.name, n]));
    const reference = entries.find(e => e.name === state.reference) || entries.find(e => e.name.startsWith(view.reference)) || entries[0];
    const paired = entries.filter(e => e !== reference).map(entry => ({ name: entry.name, look: number.get(entry.name), points: entry.runs.flatMap(run => {
      const other = reference.runs.find(r => r.seed === run.seed);
      return other && known(run.score) && known(other.score) ? [{ value: run.score - other.score, name: `seed ${run.seed}` }] : [];
    }) })).filter(row => row.points.length);
    // What the files say in points is shown in points.
    const chance = p => !known(p) ? '–' : p < 0.001 ? '<0.001' : p.toFixed(3), signed = v => show(points, known(v) && kind === 'percent' ? v / 100 : v);
    const tested = (name, key, how) => ({ name, num: true, value: ([, t]) => t[key], show: ([, t]) => how(t[key]) });
    const tests = Object.entries(here.tests[reference.name]), whole = v => show('whole', v);
    const along = entry => entry.curve.map(([round, ...values], i) => [state.x === 'rounds' ? round : entry.spent[state.x][i], ...values]);
    const xChoice = choice('x', 'Horizontal axis', X_AXES, state.x, value => { state.x = value; render(); document.getElementById(`x-${value}`)?.focus(); });
    const pareto = Object.entries({ bytes_up: ['uplink', 'bytes'], flops: ['compute', 'flops'], seconds: ['time', 'seconds'] }).map(([key, [name, how]]) => figure(`pareto-${key}`, `${capital(metric.name)} against ${name}`,
      'Large marks are means, small ones single seeds; the dashed line joins the entries that none beats in both.',
      scatter({ entries: entries.map((entry, n) => ({ name: entry.name, look: n, points: entry.runs.filter(r => known(r.score) && r[key] > 0).map(r => ({ x: r[key], y: r.score, name: `seed ${r.seed}` })) })).filter(e => e.points.length), front: here.fronts[key], x: { label: `${name} of a run`, kind: how, log: true }, y: { label: `final test ${metric.name}`, kind } }),
      () => [['entry', 'seed', key, metric.name], ...entries.flatMap(e => e.runs.map(r => [e.name, r.seed, r[key], r.score]))]));
    const strips = entries.map((entry, n) => ({ name: entry.name, look: n, points: entry.runs.filter(r => known(r.score)).map(r => ({ value: r.score, name: `seed ${r.seed}` })) })).filter(row => row.points.length);
    const best = [...entries].filter(e => known(of('score')(e))).sort((a, b) => (metric.higher_is_better ? -1 : 1) * (of('score')(a) - of('score')(b)))[0];
    const cheapest = [...entries].sort((a, b) => of('bytes_up')(a) - of('bytes_up')(b))[0], runs = entries.flatMap(e => e.runs);
    const intro = [
      h('p', { class: 'lead', id: 'sentence' }, view.sentence), view.warning && h('p', { class: 'warning' }, view.warning),
      view.experiments.length > 1 && h('div', { class: 'controls' }, pick('experiment', 'Experiment', view.experiments.map(e => e.title), state.experiment, n => { state.experiment = n; state.reference = null; })),
      numbers([
        ['runs', show('whole', runs.length), `${counted(entries.length, 'entry').replace('entrys', 'entries')}, ${counted(new Set(runs.map(r => r.seed)).size, 'seed')}`],
        [`best mean ${metric.name}`, best ? show(kind, of('score')(best)) : '–', best?.name || ''],
        ['least uplink', show('bytes', of('bytes_up')(cheapest)), cheapest.name],
        ['compute of all runs', show('flops', runs.reduce((a, r) => a + r.flops, 0)), ''],
        ['time of all runs', show('seconds', runs.reduce((a, r) => a + r.seconds, 0)), '']])];
    const column = (name, key, how) => ({ name, num: true, value: of(key), show: e => spread(e, key, how) });
    return { intro, badge: null, about: here.title, ready: () => {}, sections: [
      section('results', 'Results', 'Mean ± sample standard deviation over seeds. A click on a head sorts.',
        table('results-table', `Final test ${metric.name} and costs`, null, [{ name: 'entry', value: e => e.name }, column(metric.name, 'score', kind), column(`best ${metric.name}`, 'best', kind), column('loss', 'loss', 'number'), column('uplink', 'bytes_up', 'bytes'),
          { name: 'uplink, of full', num: true, value: of('share_up'), show: e => spread(e, 'share_up', 'percent') }, column('downlink', 'bytes_down', 'bytes'), column('compute', 'flops', 'flops'), column('time', 'seconds', 'seconds'), { name: 'runs', num: true, value: e => e.runs.length }], entries, { sort: [1, metric.higher_is_better ? -1 : 1] }),
        strips.length > 0 && figure('seeds', `Final test ${metric.name} by seed`, 'Dots are runs; the bar is the mean, the line one standard deviation.', strip({ rows: strips, kind, label: `final test ${metric.name}` }), () => [['entry', 'seed', metric.name], ...entries.flatMap(e => e.runs.map(r => [e.name, r.seed, r.score]))]),
        paired.length > 0 && figure('paired', `Differences to ${reference.name}, paired by seed`, 'Runs of one seed share partition, sampling and new weights, so their difference says more than that of two means.', strip({ rows: paired, kind: points, label: `difference in ${metric.name}`, zero: true }), () => [['entry', 'pair', `difference to ${reference.name}`], ...paired.flatMap(row => row.points.map(p => [row.name, p.name, p.value]))],
          { controls: h('div', { class: 'controls' }, pick('reference', 'Reference', entries.map(e => e.name), entries.indexOf(reference), n => { state.reference = entries[n].name; })) }),
        tests.length > 0 && table('tests', `Tests of the differences to ${reference.name}${kind === 'percent' ? ', in points' : ''}`, view.tests_about, [{ name: 'entry', value: ([name]) => name }, tested('seeds', 'seeds', whole), tested('difference', 'mean', signed),
          { name: '95% interval', num: true, value: ([, t]) => t.low, show: ([, t]) => known(t.low) ? `${signed(t.low)} to ${signed(t.high)}` : '–' },
          tested('p', 'p', chance), tested('p, Holm', 'p_holm', chance), tested('p, signs', 'p_signs', chance), tested('seeds for 80%', 'needed', whole)], tests)),
      section('curves', 'Progress', null, h('div', { class: 'controls wide' }, xChoice), figure('curve', `Test ${metric.name} by ${X_AXES[state.x]}`, `Means over seeds${state.x === 'rounds' ? '' : ', also of what was spent up to a round'}; the band is one standard deviation.`, lines({ series: entries.map((e, n) => ({ name: e.name, look: n, points: along(e) })), x: xAxis(), y: { label: `test ${metric.name}`, kind, low: metric.low ?? undefined, high: metric.high ?? undefined }, height: 360 }), () => [['entry', 'round', 'bytes sent', 'FLOPs', 'seconds', 'mean', 'low', 'high'], ...entries.flatMap(e => e.curve.map(([round, ...values], i) => [e.name, round, e.spent.bytes[i], e.spent.flops[i], e.spent.seconds[i], ...values]))], { className: 'wide' })),
      section('costs', 'Score against cost', null, pareto),
      section('runs', 'Runs', null, table('runs-table', 'Each run', null, [{ name: 'run', value: r => r.folder }, { name: 'entry', value: r => r.entry }, { name: 'seed', num: true, value: r => r.seed, show: r => show('whole', r.seed) }, ...[['score', metric.name, kind], ['loss', 'loss', 'number'], ['bytes_up', 'uplink', 'bytes'], ['bytes_down', 'downlink', 'bytes'], ['flops', 'compute', 'flops'], ['seconds', 'time', 'seconds']].map(([key, name, how]) => ({ name, num: true, value: r => r[key], show: r => show(how, r[key]) })), { name: 'engine', value: r => r.engine }, { name: 'device', value: r => r.device }], entries.flatMap(e => e.runs.map(r => ({ ...r, entry: e.name }))))),
      section('settings-section', 'Settings', null, view.settings.length > 0 && table('varied', 'Settings in which the runs differ', null, [{ name: 'setting', value: r => r[0], show: r => h('code', {}, r[0]) }, { name: 'values', value: r => r[1].join(', ') }], view.settings), view.left_out.length > 0 && table('left-out', 'Folders left out', null, [{ name: 'folder', value: r => r[0] }, { name: 'reason', value: r => r[1] }], view.left_out)),
    ] };
  };

  // --------------------------------------------------------------------------- list of `watch`
  const spark = (values, low, high) => {
    const found = values.filter(known), [lo, hi] = extent(found), span = hi - lo > 1e-9 ? hi - lo : 1;
    const d = found.map((v, n) => `${(3 + n * 144 / Math.max(1, found.length - 1)).toFixed(1)} ${(26 - (v - lo) / span * 22).toFixed(1)}`).join('L');
    return s('svg', { class: 'spark', viewBox: '0 0 150 30', role: 'img', 'aria-label': found.length ? `from ${show('number', found[0])} to ${show('number', found.at(-1))}` : 'no score yet' }, found.length > 0 && s('path', { d: `M${d}`, fill: 'none', stroke: color('accent'), 'stroke-width': 2 }));
  };
  const renderList = view => ({ intro: [h('p', { class: 'lead', id: 'sentence' }, view.sentence)], badge: null, about: view.folder, ready: () => {}, sections: [
    section('runs', 'Runs', null, view.runs.length ? table('run-list', 'All runs', 'The list follows the folder as runs go on.', [
      { name: 'run', value: r => r.name, show: r => h('a', { href: r.href }, r.name) }, { name: 'status', value: r => r.status, show: r => h('span', { class: 'badge', 'data-state': r.status }, r.status) },
      { name: 'task', value: r => r.task }, { name: 'strategy', value: r => r.strategy }, { name: 'seed', num: true, value: r => r.seed, show: r => show('whole', r.seed) },
      { name: 'round', num: true, value: r => r.round, show: r => `${show('whole', r.round)} of ${show('whole', r.rounds)}` }, { name: 'score', num: true, value: r => r.score, show: r => `${show(r.percent ? 'percent' : 'number', r.score)}` },
      { name: 'score by round', value: r => r.score, show: r => spark(r.curve) }, { name: 'uplink', num: true, value: r => r.bytes_up, show: r => show('bytes', r.bytes_up) }, { name: 'time', num: true, value: r => r.seconds, show: r => show('seconds', r.seconds) }, { name: 'engine', value: r => r.engine }], view.runs, { sort: [0, 1] })
      : h('p', { class: 'empty wide' }, 'There is no run yet; this page shows it when it begins.'))] });

  // ------------------------------------------------------------------------------------- page
  const redraw = () => drawn.forEach(each => { if (each.plot.clientWidth && each.width() !== each.plot.clientWidth) each.draw(); });
  const everything = () => drawn.forEach(each => each.draw());
  const dark = matchMedia('(prefers-color-scheme: dark)');
  const dress = theme => {
    root.dataset.theme = theme || (state.theme === 'auto' ? (dark.matches ? 'dark' : 'light') : state.theme);
    everything();
  };
  dark.addEventListener('change', () => dress());
  addEventListener('beforeprint', () => dress('light'));
  addEventListener('afterprint', () => dress());
  let waiting;
  new ResizeObserver(() => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(redraw); }).observe(document.body);

  const render = () => {
    const focus = document.activeElement?.id, scroll = scrollY, main = document.getElementById('main');
    drawn = [];
    const made = { run: renderRun, comparison: renderComparison, list: renderList }[VIEW.kind](VIEW), sections = made.sections.filter(Boolean);
    document.getElementById('top').replaceChildren(
      h('div', { class: 'brand' }, h('b', {}, 'LayerFed'), LIVE && VIEW.kind !== 'list' && h('a', { href: VIEW.list, id: 'all-runs' }, 'all runs'), LIVE && h('span', { id: 'live', role: 'status' }, 'live'), h('span', { class: 'space' }),
        h('label', {}, 'Theme ', h('select', { id: 'theme', onchange: event => { state.theme = event.target.value; dress(); } }, ['auto', 'light', 'dark'].map(name => h('option', { value: name, selected: name === state.theme }, name))))),
      h('h1', {}, VIEW.title, made.badge && [' ', h('span', { class: 'badge', 'data-state': made.badge[0] }, made.badge[1])]),
      h('p', { class: 'note' }, made.about));
    document.getElementById('contents').replaceChildren(h('ul', {}, sections.map(([id, title]) => h('li', {}, h('a', { href: `#${id}` }, title)))));
    document.getElementById('contents').hidden = sections.length < 2;
    main.replaceChildren(...made.intro.filter(Boolean), ...sections.map(each => each[2]));
    document.getElementById('foot').replaceChildren(VIEW.kind === 'list' ? '' : 'Every number on this page is read or computed from the files of the run folder. The page loads nothing from a network.');
    made.ready();
    everything();
    if (focus) document.getElementById(focus)?.focus({ preventScroll: true });
    scrollTo(0, scroll);
  };

  const packed = Uint8Array.from(atob(document.getElementById('data').textContent.trim()), c => c.charCodeAt(0));
  VIEW = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream('deflate'))).json();
  state.follow = LIVE;
  dress();
  render();
  root.dataset.ready = 'yes';
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();

  if (LIVE) {
    const events = new EventSource(VIEW.events), say = words => { document.getElementById('live').textContent = words; };
    events.onmessage = async () => {
      try {
        VIEW = await (await fetch(VIEW.source)).json();
        render();
        root.dataset.updates = Number(root.dataset.updates || 0) + 1;
      } catch { say('not reachable'); }
    };
    events.onerror = () => say('connection lost; trying again');
    events.onopen = () => say('live');
  }
})();
