"""What the template of docs/performance.md calls and draws, each made from results; where there are none it says so."""

import functools
from collections.abc import Callable, Iterator, Sequence

from matplotlib.figure import Figure

from meansparse_fx.plots import LIGHT, SMALL, legend, new_figure

from ..harness import Row
from ..models import CONTENDERS, Case
from . import markdown
from .results import Results, Source, mark
from .targets import TARGETS

NOTHING = "Not measured: there is no file of this in `benchmarks/results/`."
MIB = 2**20
# Contenders of benchmarks.models that are a form of the counts, which knows no modules, and how they are drawn.
FORMS = {
    "published module": ("#9ba2ab", "s"),
    "branch-free module": ("#1d5fa8", "^"),
    "ours": ("#ff8f57", "o"),
    "ours, fused": ("#c2410c", "D"),
}
table = functools.partial(markdown.table, space=" ")


def each(sources: Sequence[Source], caller: Callable[[Source], str]) -> str:
    """Return what ``caller`` has each file say under its name and machine, if it says something."""
    said = [(source, caller(source).strip()) for source in sources]
    return "\n\n".join(f"**{s.where}** (`{s.name}`)\n\n{text}" for s, text in said if text) or NOTHING


def text(row: Row | None, column: str, form: str = "{:.2f}", marked: bool = False, scale: float = 1) -> str:
    """Return a figure of a row, and its mark; empty where there is none."""
    value = None if row is None else row.get(column)
    return "" if value is None else form.format(scale * value) + (mark(row) if marked else "")


def ratio(row: Row | None, column: str = "ratio") -> str:
    """Return a ratio of a row, and its mark."""
    return text(row, column, marked=True)


def times(source: Source) -> str:
    """Return the times of whole models: a table for each baseline, and one of the time on the device alone."""
    tables = []
    for base in ("base", "base compiled", "base reduce-overhead"):
        beside = [n for n in source.contenders if n != base and CONTENDERS.get(n, ("",))[0] == base]
        heads = ("case", base, *(name.removesuffix(base.removeprefix("base")) for name in beside))
        for words, time, column in (
            ("", "milliseconds", "ratio"),
            ("On the device alone:\n\n", "device_ms", "device_ratio"),
        ):
            rows = []
            for case, found in source.cases.items():
                cells = [ratio(found.get(name), column) for name in beside]
                if base in found and any(cells):
                    long = (found[base].get(time) or 0) >= 3
                    rows.append((case, text(found[base], time, "{:.1f} ms" if long else "{:.2f} ms"), *cells))
            if rows:
                tables.append(words + table(heads, rows))
    return "\n\n".join(tables)


def extras(results: Results, source: Source) -> Iterator[tuple[str, Row, float, float]]:
    """Yield form, row, the MiB that it moves more than the base and the milliseconds that it takes longer, a call."""
    for found in source.cases.values():
        base = found.get("base")
        case = Case.read(base.case) if base else None
        for contender in FORMS if case and case.dtype == "float32" else ():
            row = found.get(contender)
            extra = extra_bytes(results, case, contender.removesuffix(" module"))
            if row and row.milliseconds is not None and extra is not None:
                yield contender, row, extra * case.batch / MIB, (row.ratio - 1) * base.milliseconds


def extra_bytes(results: Results, case: Case, form: str) -> int | None:
    """Return the bytes that a form moves more than the base, for one image; None where that was not counted."""
    counts = results.counts.get(case.model, {})
    if not {form, "base"} <= counts.keys() or case.mode == "all gradients":
        return None
    ways = ("forward_bytes",) if case.mode == "forward" else ("forward_bytes", "backward_bytes")
    return sum(counts[form][way] - counts["base"][way] for way in ways)


def kernels(source: Source) -> str:
    """Return the operator alone, beside the activation and other ways to compute it."""
    names = ("clone", "meansparse_fx", "meansparse_fx, compiled", "torch operators", "published form")
    if source.gpu:
        beside = [name for name in source.contenders if name != "clone"]
        timed = [
            (name, column) for column in ("device_ms", "host_ms") for name in ("torch activation", "meansparse_fx")
        ]
        lines = [("case", *beside, *(f"{name}, {column[:-3]}, µs" for name, column in timed))]
        for case, found in source.cases.items():
            times = [text(found.get(name), column, "{:.1f}", True, 1e3) for name, column in timed]
            lines.append((case, *(ratio(found.get(name), "of_clone") for name in beside), *times))
        columns = [column for column in zip(*lines, strict=True) if any(column[1:])]  # those that say something
        heads, *rows = zip(*columns, strict=True)
        return "As shares of the clone's bandwidth:\n\n" + table(heads, rows)
    rows = []
    for case, found in source.cases.items():
        alone = text(found.get("torch activation"), "milliseconds", "{:.2f} ms")  # moments have none
        share = text(found["meansparse_fx"], "of_clone", "{:.0%}")
        rows.append((case, alone, *(ratio(found.get(name)) for name in names), share))
    return table(("case", "activation alone", *names, "of the clone's bandwidth"), rows)


def kernels_on_gpus(results: Results) -> str:
    """Return by what is computed the shares of the clone's bandwidth that GPUs gave, for the page of the kernels."""

    def content(source: Source) -> str:
        shares: dict[str, list[Row]] = {}
        for row in source.rows:
            if row.of_clone is not None and row.contender != "clone":
                words = row.case.split()
                shares.setdefault(f"{row.contender}, {words[-1]}, {words[1]}", []).append(row)
        rows = []
        for what, found in shares.items():
            worst = min(found, key=lambda row: row.of_clone)
            rows.append((what, str(len(found)), _span(found, "of_clone"), worst.case))
        return table(("what", "shapes", "share of the clone's bandwidth", "the worst"), rows)

    return each([source for source in results.kernels if source.gpu], content)


def summary(gpus: Results) -> str:
    """Return what was measured on GPUs against each target, and the headline: for a terminal, 38 lines at most."""
    lines = [target.line(gpus) for target in TARGETS]
    found = [f"{what}, {limit}: {verdict}; {figures}" for what, limit, verdict, figures, _ in lines if figures]
    return "\n".join([*headline(gpus).splitlines(), *found][:38])


def headline(results: Results) -> str:
    """Return a line a file of whole models, for the README."""
    own = {"ours": "ours", "ours, fused": "fused"}
    lines = []
    for source in results.models:
        eager = _spans(source, own | {"published module": "the published module"})
        compiled = _spans(source, {"ours compiled": "ours", "published module compiled": "the published module"})
        device = _spans(source, own, "device_ratio")
        models = ", ".join(dict.fromkeys(Case.read(row.case).model for row in source.rows))
        line = f"- {source.where} ({models}), time over the base: {eager}"
        line += f"; compiled, over the base compiled: {compiled}" if compiled else ""
        line += f"; on the device alone: {device}" if device else ""
        lines.append(f"{line}.")
    return "\n".join(lines) or "Whole models have not been measured."


def _spans(source: Source, names: dict[str, str], column: str = "ratio") -> str:
    """Return the least and the largest ratio of each contender, under the words it is called by."""
    found = {words: [row for row in source.rows if row.contender == name] for name, words in names.items()}
    return ", ".join(f"{words} {span}" for words, rows in found.items() if (span := _span(rows, column)))


def _span(rows: Sequence[Row], column: str) -> str:
    rows = [row for row in rows if column in row]
    texts = [f"{value:.2f}" for value in sorted(row[column] for row in rows)]
    return " to ".join(dict.fromkeys((texts[0], texts[-1]))) + max(map(mark, rows)) if texts else ""


def figure_of(sources: Sequence[Source]) -> Figure:
    """Return every contender's ratio, a line a case: eager ones left, compiled ones right."""
    cases = [(source, case) for source in sources for case in source.cases]
    figure = new_figure(LIGHT, 8.6, 1.6 + 0.34 * len(cases))
    axes = figure.subplots(1, 2, sharey=True)
    for side, suffix, title in zip(axes, ("", " compiled"), ("over the base", "over the compiled base"), strict=True):
        for name, (colour, marker) in FORMS.items():
            rows = [source.cases[case].get(name + suffix) for source, case in cases]
            points = [(row.ratio, -at) for at, row in enumerate(rows) if row]
            style = {"color": colour, "markersize": 6, "label": None if suffix else name}
            side.plot([x for x, _ in points], [y for _, y in points], marker, **style)
        side.set_title(title, fontsize=SMALL)
        side.axvline(1, color=LIGHT.ink, linewidth=1)
        side.grid(color=LIGHT.grid, linewidth=0.8)
        side.set_axisbelow(True)
        side.tick_params(labelsize=SMALL, length=0)
        side.spines[:].set_visible(False)
    labels = [f"{case}\n{source.where.partition(', torch')[0]}" for source, case in cases]
    axes[0].set_yticks([-line for line in range(len(cases))], labels, fontsize=7)
    axes[0].set_ylim(0.6 - len(cases), 0.6)
    legend(figure, LIGHT, 4)
    return figure
