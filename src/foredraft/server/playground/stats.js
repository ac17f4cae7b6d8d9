// What one run did so far. Plain numbers; knows nothing of the page.

export const KINDS = ["accepted", "recovered", "bonus", "plain"];
const WINDOW = 0.6; // seconds over which the momentary rate is taken

export class Stats {
  constructor(now) {
    this.began = now;
    this.first = null;
    this.last = now;
    this.tokens = 0;
    this.passes = 0;
    this.drafted = 0;
    this.accepted = 0;
    this.kinds = { accepted: 0, recovered: 0, bonus: 0, plain: 0 };
    this.reached = [];
    this.right = [];
    this.steps = []; // { drafted, accepted }
    this.times = []; // [seconds since the first token, tokens]
  }

  /** One step of the server: what it drafted, what was right, which tokens came of it. */
  step(info, now) {
    if (!info.tokens.length && !info.drafted) return;
    this.first ??= now;
    this.last = now;
    this.passes += 1;
    this.tokens += info.tokens.length;
    this.drafted += info.drafted;
    this.accepted += info.accepted;
    for (const token of info.tokens) this.kinds[token.kind] += 1;
    for (let i = 0; i < info.drafted; i++) {
      this.reached[i] = (this.reached[i] ?? 0) + 1;
      this.right[i] = (this.right[i] ?? 0) + (i < info.accepted ? 1 : 0);
    }
    this.steps.push({ drafted: info.drafted, accepted: info.accepted });
    this.times.push([(now - this.first) / 1000, this.tokens]);
  }

  get seconds() { return this.first === null ? 0 : (this.last - this.first) / 1000; }

  /** From asking to the last token. */
  get whole() { return (this.last - this.began) / 1000; }

  /** Mean rate after the first token, which belongs to the prompt. */
  get rate() {
    const [, before] = this.times[0] ?? [0, 0];
    return this.seconds > 0 ? (this.tokens - before) / this.seconds : 0;
  }

  /** [seconds, tokens per second] through the run. */
  rates() {
    const points = [];
    let from = 0;
    for (let to = 1; to < this.times.length; to++) {
      while (this.times[to][0] - this.times[from][0] > WINDOW && from < to - 1) from += 1;
      const span = this.times[to][0] - this.times[from][0];
      if (span > 0.05) points.push([this.times[to][0], (this.times[to][1] - this.times[from][1]) / span]);
    }
    return points;
  }
}
