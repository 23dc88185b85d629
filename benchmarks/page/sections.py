"""The tables of the page, each made from results; where there are none it says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, replace

from ..harness import Row
from ..models import CONTENDERS
from .results import MEASURED, Results, Source, case_of, mark
from .targets import TARGETS, wins

NOTHING = "Not measured: there is no file of this in `benchmarks/results/`."
MIB = 2**20
# Which form of the counts a contender of benchmarks.models is.
FORMS = {
    "published module": "published",
    "branch-free module": "branch-free",
    "ours": "ours",
    "ours, fused": "ours, fused",
}


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, empty without rows; all columns but the first are numbers, and stand right."""
    rows = list(rows)
    if not rows:
        return ""
    lines = [list(heads), ["---", *["---:"] * (len(heads) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _each(sources: Sequence[Source], content: Callable[[Source], str]) -> str:
    """Return what each file says under its name and machine, if it says something."""
    said = [(source, content(source)) for source in sources]
    return "\n\n".join(f"**{s.where}** (`{s.name}`)\n\n{text}" for s, text in said if text) or NOTHING


def targets(results: Results) -> str:
    """Return the table of targets."""
    lines = ["| target | limit | verdict | figures | file |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(target.line(results))} |" for target in TARGETS)])


def rivals(results: Results) -> str:
    """Return how often each of ours is faster and slower than each rival."""
    found = wins(results)
    if not found:
        return NOTHING
    rows = [(f"{words} (`{file}`)", str(won), str(lost), f"{middle:.2f}") for file, words, won, lost, middle in found]
    return table(("rows of one run", "ours faster", "ours slower", "median of the ratio"), rows)


def models(results: Results) -> str:
    """Return the times of whole models."""
    return _each(results.models, lambda source: "\n\n".join(_times(source)))


def _times(source: Source) -> Iterator[str]:
    """Yield a table for each baseline, and one of the time on the device alone."""
    names = dict.fromkeys(row.contender for row in source.rows)
    for base, field in ((b, f) for b in ("base", "base compiled", "base reduce-overhead") for f in ("", "device_")):
        beside = [name for name in names if name != base and CONTENDERS.get(name, ("",))[0] == base]
        rows = []
        for case, found in source.cases.items():
            cells = [_ratio(found.get(name), f"{field}ratio") for name in beside]
            if base in found and any(cells):
                rows.append(
                    (case, _ms(getattr(found[base], f"{field or 'milli'}{'ms' if field else 'seconds'}")), *cells)
                )
        suffix = base.removeprefix("base")
        if rows:
            heads = ("case", base, *(name.removesuffix(suffix) for name in beside))
            yield ("On the device alone:\n\n" if field else "") + table(heads, rows)


def _ratio(row: Row | None, field: str = "ratio") -> str:
    value = None if row is None else getattr(row, field)
    return "" if row is None or value is None else f"{value:.2f}{mark(row)}"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.{1 if value >= 3 else 2}f} ms"


def memory(results: Results) -> str:
    """Return bytes kept, peak, launches, graphs and compile seconds, where they were asked for."""
    asked: tuple[tuple[str, Callable[[Row], str]], ...] = (
        ("kept, MiB", lambda r: "" if not r.kept_bytes else f"{r.kept_bytes / MIB:.1f}"),
        ("peak, MiB", lambda r: "" if r.peak_bytes is None else f"{r.peak_bytes / MIB:.1f}"),
        ("launches", lambda r: "" if r.launches is None else str(r.launches)),
        ("graphs", lambda r: "" if r.graphs is None else str(r.graphs)),
        ("compile, s", lambda r: "" if r.compile_seconds is None else f"{r.compile_seconds:.1f}"),
    )

    def content(source: Source) -> str:
        rows = [(row.case, row.contender, *(read(row) for _, read in asked)) for row in source.rows]
        return table(("case", "contender", *(head for head, _ in asked)), [row for row in rows if any(row[2:])])

    return _each(results.models, content)


def counts(results: Results) -> str:
    """Return the counted bytes and calls, by model."""
    if not results.counts:
        return NOTHING
    forms = list(dict.fromkeys(count.form for count in results.counts))
    rows = []
    for model in dict.fromkeys(count.model for count in results.counts):
        own = {form: results.count(model, form) for form in forms}
        base = own["base"]
        for words, size, call in (
            ("forward", "forward_bytes", "forward_calls"),
            ("backward", "backward_bytes", "backward_calls"),
        ):
            cells = [f"{getattr(c, size) / MIB:.2f} ({getattr(c, call) / c.sites:.1f})" for c in own.values()]
            rows.append((f"{model}, {base.sites} sites, {words}", *cells))
    return table(("MiB an image (calls a site)", *forms), rows)


def roofline(results: Results) -> str:
    """Return the counted extra bytes of each measured form beside its measured extra time."""

    def content(source: Source) -> str:
        rows = []
        for case, found in source.cases.items():
            asked = case_of(found["base"]) if "base" in found else None
            for contender, form in FORMS.items():
                row = found.get(contender)
                extra = asked and row and extra_bytes(results, asked.model, form, asked.mode)
                if row is None or row.milliseconds is None or extra is None or asked.dtype != "float32":
                    continue
                time = (row.ratio - 1) * found["base"].milliseconds
                cells = (f"{extra * asked.batch / MIB:+.1f}", f"{time:+.2f}")
                rows.append((f"{case}, {contender}{mark(row)}", *cells, implied(extra * asked.batch, time)))
        return table(("over the base", "counted, MiB", "measured, ms", "GB/s"), rows)

    return _each(results.models, content) if results.counts else NOTHING


def extra_bytes(results: Results, model: str, form: str, mode: str) -> int | None:
    """Return the bytes that a form moves more than the base, for one image; None where that was not counted."""
    own, base = results.count(model, form), results.count(model, "base")
    if own is None or base is None or mode == "all gradients":
        return None
    forward = own.forward_bytes - base.forward_bytes
    return forward if mode == "forward" else forward + own.backward_bytes - base.backward_bytes


def implied(extra: float, milliseconds: float) -> str:
    """Return the bandwidth at which the extra bytes would take the extra time; empty where either is none."""
    return f"{extra / milliseconds / 1e6:.1f}" if extra * milliseconds > 0 else ""


def kernels(results: Results) -> str:
    """Return the operator alone, beside the activation and other ways to compute it."""
    names = ("clone", "meansparse_fx", "meansparse_fx, compiled", "torch operators", "published form")

    def content(source: Source) -> str:
        rows = []
        if source.gpu:
            beside = [name for name in dict.fromkeys(row.contender for row in source.rows) if name != "clone"]
            for case, found in source.cases.items():
                times = [_micro(found.get(name), field) for name, field in _TIMED]
                rows.append((case, *(_ratio(found.get(name), "of_clone") for name in beside), *times))
            heads = ("case", *beside, *(f"{name}, {field[:-3]}, µs" for name, field in _TIMED))
            return "As shares of the clone's bandwidth:\n\n" + table(*_without_empty(heads, rows))
        for case, found in source.cases.items():
            alone = found["torch activation"]
            share = found["meansparse_fx"].of_clone
            cells = [_ratio(found.get(name)) for name in names]
            rows.append((case, f"{alone.milliseconds:.2f} ms", *cells, "" if share is None else f"{share:.0%}"))
        return table(("case", "activation alone", *names, "of the clone's bandwidth"), rows)

    return _each(results.kernels, content)


_TIMED = [(name, field) for field in ("device_ms", "host_ms") for name in ("torch activation", "meansparse_fx")]


def _micro(row: Row | None, field: str) -> str:
    value = None if row is None else getattr(row, field)
    return "" if row is None or value is None else f"{1e3 * value:.1f}{mark(row)}"


def _without_empty(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[Sequence[str], list[list[str]]]:
    """Return a table without the columns that say nothing."""
    full = [at for at in range(len(heads)) if any(row[at] for row in rows)]
    return [heads[at] for at in full], [[row[at] for at in full] for row in rows]


def calibration(results: Results) -> str:
    """Return calibration beside the plain pass, and how many images it takes."""

    def content(source: Source) -> str:
        rows = [
            (
                r.case,
                r.contender,
                f"{r.milliseconds:,.{0 if r.milliseconds >= 100 else 3}f}",
                f"{r.ratio:.2f}",
                r.baseline,
            )
            for r in source.rows
        ]
        return table(("case", "contender", "ms", "ratio", "to"), rows)

    parts = [_each(results.calibration, content)]
    if results.images:
        rows = [
            (
                f"{100 * need.tolerance:g} %" if need.tolerance else "all images",
                f"{need.images:,}",
                f"{100 * need.accuracy:.2f}",
            )
            for need in results.images
        ]
        parts.append("How many images a tolerance takes (`calibration-images.csv`):")
        parts.append(table(("tolerance", "images", "accuracy at alpha 0.3, %"), rows))
    return "\n\n".join(parts)


def attacks(results: Results) -> str:
    """Return the attacks' times over the base's."""

    def content(source: Source) -> str:
        rows = []
        for row in source.rows:
            passes = f"{row.forward_images or 0:,} / {row.backward_images or 0:,}"
            per_pass = "" if row.ratio_per_pass is None else f"{row.ratio_per_pass:.2f}"
            rows.append((row.case, row.contender, f"{row.milliseconds:,.0f}", _ratio(row), per_pass, passes))
        heads = ("case", "contender", "ms", "over base", "per pass", "images forward / backward")
        return table(heads, rows)

    return _each(results.attack, content)


def scaling(results: Results) -> str:
    """Return what was measured of growth, and the plans with their formula."""

    def content(source: Source) -> str:
        rows = []
        for row in source.rows:
            each = f"{1e3 * row.seconds / row.size:.3g}" if row.what == "transform" else ""
            beside = "" if row.beside is None else f"{row.beside:.3g}"
            words = f"{row.what}, {row.case}"
            rows.append((words, f"{row.size:,} {row.unit}", f"{row.seconds:,.3g}", beside, each, row.formula))
        heads = ("what", "size", "seconds", "beside", "ms a node", "computed from")
        return table(heads, rows)

    return _each(results.scaling, content)


def host(results: Results) -> str:
    """Return what calls cost on the host."""

    def content(source: Source) -> str:
        rows = []
        for row in source.rows:
            span = [row.host_ms] if row.host_ms is not None else [row.low, row.high]
            rows.append((f"{row.case}: {row.contender}", " to ".join(f"{1e3 * ms:.3g}" for ms in span) + mark(row)))
        return table(("call", "µs"), rows)

    return _each(results.host, content)


SECTIONS: dict[str, Callable[[Results], str]] = {
    function.__name__: function
    for function in (targets, rivals, models, memory, counts, roofline, kernels, host, calibration, attacks, scaling)
}


def kernels_on_gpus(results: Results) -> str:
    """Return by what is computed the shares of the clone's bandwidth that GPUs gave, for the page of the kernels."""

    def content(source: Source) -> str:
        shares: dict[tuple[str, str, str], list[Row]] = {}
        for row in source.rows:
            if row.of_clone is not None and row.contender != "clone":
                words = row.case.split()
                shares.setdefault((row.contender, words[-1], words[1]), []).append(row)
        rows = []
        for (contender, mode, dtype), found in shares.items():
            worst = min(found, key=lambda row: row.of_clone)
            rows.append((f"{contender}, {mode}, {dtype}", str(len(found)), _span(found, "of_clone"), worst.case))
        return table(("what", "shapes", "share of the clone's bandwidth", "the worst"), rows)

    return _each([source for source in results.kernels if source.gpu], content)


def summary(results: Results) -> str:
    """Return what was measured on GPUs against each target, and the headline: for a terminal, 38 lines at most."""
    sources = {f.name: [s for s in getattr(results, f.name) if s.gpu] for f in fields(Results) if f.name in MEASURED}
    lines = [target.line(replace(results, **sources)) for target in TARGETS]
    found = [f"{what}, {limit}: {verdict}; {figures}" for what, limit, verdict, figures, _ in lines if figures]
    return "\n".join([*headline(replace(results, **sources)).splitlines(), *found][:38])


def headline(results: Results) -> str:
    """Return a line a file of whole models, for the README."""
    if not results.models:
        return "Whole models have not been measured."
    lines = []
    for source in results.models:
        eager = _spans(source, {"ours": "ours", "ours, fused": "fused", "published module": "the published module"})
        compiled = _spans(source, {"ours compiled": "ours", "published module compiled": "the published module"})
        device = _spans(source, {"ours": "ours", "ours, fused": "fused"}, "device_ratio")
        models = ", ".join(dict.fromkeys(case_of(row).model for row in source.rows))
        behind = f"; compiled, over the base compiled: {compiled}" if compiled else ""
        behind += f"; on the device alone: {device}" if device else ""
        lines.append(f"- {source.where} ({models}), time over the base: {eager}{behind}.")
    return "\n".join(lines)


def _spans(source: Source, names: dict[str, str], field: str = "ratio") -> str:
    """Return the least and the largest ratio of each contender, under the words it is called by."""
    found = {words: [row for row in source.rows if row.contender == name] for name, words in names.items()}
    spans = {
        words: _span([row for row in rows if getattr(row, field) is not None], field) for words, rows in found.items()
    }
    return ", ".join(f"{words} {span}" for words, span in spans.items() if span)


def _span(rows: Sequence[Row], field: str) -> str:
    texts = [f"{value:.2f}" for value in sorted(getattr(row, field) for row in rows)]
    return " to ".join(dict.fromkeys((texts[0], texts[-1]))) + mark(rows[0]) if texts else ""
