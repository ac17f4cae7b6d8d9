"""The result as one HTML page: pictures and tables, light or dark as the reader's system is, no request to anywhere."""

from collections.abc import Iterator
from html import escape

from foredraft.bench import plots, table
from foredraft.bench.result import Bench

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # what the page itself forbids the browser
STYLE = """
:root { color-scheme: light dark; --page: #f4f5f8; --card: #ffffff; --ink: #16181d; --muted: #5b6270; --grid: #e2e5ec;
  --fast: #2f62d9; --draft: #d9822b; --plain: #9aa3b2; --extra: #138a72; --good: #12805c; --bad: #c4314b; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1116; --card: #181b22; --ink: #e8eaf0; --muted: #9aa3b2;
  --grid: #2b303b; --fast: #7aa2ff; --draft: #f0a55c; --plain: #6d7687; --extra: #4fc8ae; --good: #4cc79a;
  --bad: #ff7a90; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2.2rem 1.2rem 3rem; }
h1 { font-size: 1.65rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.02rem; margin: 0 0 .15rem; }
p { margin: 0; color: var(--muted); }
.cards, .plots { display: grid; gap: 1rem; margin-top: 1.3rem; }
.cards { grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 12px; padding: 1.05rem 1.2rem;
  min-width: 0; }
.card b { display: block; font-size: 2rem; line-height: 1.15; font-weight: 650; font-variant-numeric: tabular-nums;
  letter-spacing: -.02em; }
.card.good b { color: var(--good); } .card.bad b { color: var(--bad); } .card.fast b { color: var(--fast); }
.card small { color: var(--muted); font-size: .86rem; }
svg { display: block; width: 100%; height: auto; margin-top: .7rem; }
svg text { font-family: inherit !important; }
.wide { margin-top: 1rem; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin-top: .6rem; font-variant-numeric: tabular-nums;
  font-size: .9rem; }
th, td { text-align: right; padding: .32rem .7rem; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { color: var(--muted); font-weight: 500; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.best td { font-weight: 650; color: var(--fast); }
ul { margin: .5rem 0 0; padding-left: 1.1rem; color: var(--muted); }
.warning { color: var(--bad); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: .6rem 0 0; }
dt { color: var(--muted); } dd { margin: 0; }
"""


def page(found: Bench) -> str:
    """The whole file."""
    title = f"foredraft bench: {found.setting.model}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(_parts(found))
        + "\n</main></body></html>\n"
    )


def _parts(found: Bench) -> Iterator[str]:
    about = found.setting
    yield f"<h1>{escape(about.model)}, drafted for by {escape(found.drafter)}</h1>"
    yield f"<p>{escape(f'{about.dtype} on {about.device}, {about.runtime} runtime, {about.threads} threads')}</p>"
    yield f'<div class="cards">{"".join(_cards(found))}</div>'
    yield from (f'<p class="wide warning">{escape(line)}</p>' for line in table.warnings(found))
    pictures = (
        f'<section class="card"><h2>{escape(title)}</h2><p>{escape(sentence)}</p>{svg}</section>'
        for title, sentence, svg in plots.plots(found)
    )
    yield f'<div class="plots">{"".join(pictures)}</div>'
    yield from (_table(found, title, rows) for title, rows in table.tables(found))
    notes = "".join(f"<li>{escape(line)}</li>" for line in table.lines(found))
    yield f'<section class="card wide"><h2>How to read this</h2><ul>{notes}</ul></section>'
    yield f'<section class="card wide"><h2>Where it ran</h2><dl>{"".join(_setting(found))}</dl></section>'


def _cards(found: Bench) -> Iterator[str]:
    best, runs = found.best, found.counts.requests * found.counts.rounds * len(found.drafting)
    within = f" (95 %: {table.interval(best.speedup, ' to ')})" if best.speedup.bounds else ""
    yield _card(
        f"{best.speedup.value:.2f}&times;",
        f"the speed of plain decoding, with {best.name}{within}",
        "fast",
    )
    if found.equal is not None:
        kind, word = ("good", "equal") if found.equal else ("bad", "different")
        yield _card(word, f"tokens, against plain decoding, in {runs} runs", kind)
    yield _card(
        f"{best.median_tokens_per_second:.0f}", f"tokens a second; plain {found.plain.median_tokens_per_second:.0f}"
    )
    yield _card(f"{best.stats.mean_acceptance_length:.2f}", "tokens for each pass of the target")
    if found.prediction:
        yield _card(f"{found.prediction.alpha:.3f}", "alpha: how often a draft token is accepted, given all before it")


def _card(value: str, words: str, kind: str = "") -> str:
    return f'<div class="card {kind}"><b>{value}</b><small>{escape(words)}</small></div>'


def _table(found: Bench, title: str, rows: table.Rows) -> str:
    header = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    best = table.label(found.best)
    body = "".join(
        f'<tr class="{"best" if row[0] == best else ""}">{"".join(f"<td>{escape(cell)}</td>" for cell in row)}</tr>'
        for row in rows[1:]
    )
    heading = escape(title[:1].upper() + title[1:])
    return f'<section class="card wide"><h2>{heading}</h2><table><tr>{header}</tr>{body}</table></section>'


def _setting(found: Bench) -> Iterator[str]:
    about, params = found.setting, found.options.params
    versions = ", ".join(f"{name} {number}" for name, number in about.versions.items())
    lengths = ", ".join("policy" if it is None else str(it) for it in found.options.lengths)
    rows = {
        "processor": f"{about.processor}, {about.threads} threads, {about.system}",
        "versions": versions,
        "sampling": f"temperature {params.temperature:g}, up to {params.max_new_tokens} tokens, {params.verifier}",
        "draft lengths": lengths,
        "memory": table.memory(found).removeprefix("memory: "),
    }
    return (f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in rows.items())
