"""What lies in the folder of results, by benchmark and file."""

from pathlib import Path

from ..harness import Row, read

REPLACED = {"19197a7"}  # commits whose rows of the operator's kernels were measured before those were replaced


def mark(row: Row) -> str:
    """Return † behind a figure of a kernel that has been replaced since: of ours run eagerly; moments are as they were.

    Example:
        >>> mark(Row(benchmark="models", contender="ours", commit="19197a7"))
        '†'
    """
    own = row.contender.startswith(("ours", "meansparse_fx", "operator", "module")) or "operator" in row.case
    other = row.benchmark == "calibration" or "compiled" in row.contender or "reduce-overhead" in row.contender
    return "†" if row.commit in REPLACED and own and not other and " moments" not in row.case else ""


class Source:
    """One file of results.

    Attributes:
        rows: In its order; never empty.
        cases: The rows by case and contender.
        contenders: All that are in it, in its order.
        gpu: Whether it is from a GPU: files from a CPU say so in their names, as benchmarks/README.md asks.
        where: The machine in words.
    """

    def __init__(self, name: str, rows: list[Row]) -> None:
        self.name, self.rows, self.gpu = name, rows, "-cpu-" not in name
        self.contenders = list(dict.fromkeys(row.contender for row in rows))
        self.cases: dict[str, dict[str, Row]] = {}
        for row in rows:
            self.cases.setdefault(row.case, {})[row.contender] = row
        first = rows[0]
        threads = "" if self.gpu else f", {first.threads} thread{'s' * ((first.threads or 0) > 1)}"
        triton = f", Triton {first.triton}" if first.triton else ""
        when = "".join(dict.fromkeys(f", commit {row.commit}, {row.date}" for row in rows if row.commit))
        self.where = f"{first.device}{threads}, torch {first.torch}{triton}{when}"


class Results:
    """All files that pages are made from.

    Attributes:
        models, kernels, calibration, attack, host, scaling: Sources, a device each; without those of CPUs on demand.
        counts: What `contenders.counts` has, by model and form.
        images: How many images calibration needs.
        judge, strongest, choice, zoo, extra: Rows.
        paper: Rows by table, those tables alone that were measured.
    """

    def __init__(self, folder: Path, gpu: bool = False) -> None:
        def sources(benchmark: str) -> list[Source]:
            paths = (path for path in sorted(folder.glob(f"{benchmark}-*.csv")) if path.stem != "calibration-images")
            found = [Source(path.name, rows) for path in paths if (rows := read(path))]
            return [source for source in found if source.gpu or not gpu]

        self.models, self.kernels, self.calibration = map(sources, ("models", "kernels", "calibration"))
        self.attack, self.host, self.scaling = map(sources, ("attack", "host", "scaling"))
        counted = read(folder / "roofline.csv")
        self.roofline = [Source("roofline.csv", counted)] if counted else []
        self.counts = self.roofline[0].cases if counted else {}
        names = ("calibration-images", "judge", "strongest", "choice", "zoo", "zoo-extra")
        self.images, self.judge, self.strongest, self.choice, self.zoo, self.extra = (
            read(folder / f"{name}.csv") for name in names
        )
        self.paper = {number: rows for number in range(1, 13) if (rows := read(folder / f"paper-{number}.csv"))}
