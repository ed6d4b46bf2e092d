"""The page of ablations, of the tables that sweeps left: text is kept, tables and plot are new.

    composer sweep --config ablations/keep --out sweeps/keep --jobs 2       and so on
    pip install matplotlib
    python benchmarks/ablations.py sweeps

In `docs/ablations.md` what stands between `<!-- NAME -->` and `<!-- end -->` becomes that sweep's
table, and `docs/ablations.svg` shows every run as a dot and every mean as a line.
"""

import argparse
import csv
import re
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "composer", "svg.fonttype": "none", "font.size": 9})
from matplotlib import pyplot as plt  # noqa: E402

MEASURES = ("caption", "palette", "semantics", "depth", "sketch", "mean", "all given")
LOSS = "held out loss"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweeps", type=Path, help="folder of sweeps, each in a folder of its name")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    page = args.docs / "ablations.md"
    text = page.read_text()
    found = {}
    for name in re.findall(r"<!-- (\w+) -->\n", text):
        if name == "end":
            continue
        path = args.sweeps / name / "table.csv"
        if not path.is_file():
            raise SystemExit(f"{path} is not there; run composer sweep --config ablations/{name}")
        found[name] = runs(path)
        between = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        fresh = markdown(found[name])
        text = re.sub(between, lambda m, fresh=fresh: m[1] + fresh + m[2], text, flags=re.DOTALL)
    draw(found, args.docs / "ablations.svg")
    page.write_text(text)


def runs(path: Path) -> dict[str, list[dict[str, float]]]:
    """The finished runs of a sweep by label."""
    rows = defaultdict(list)
    for row in csv.DictReader(path.open()):
        if row["state"] == "done":
            rows[row["run"]].append({key: float(row[key]) for key in (*MEASURES, LOSS)})
    return dict(rows)


def markdown(rows: dict[str, list[dict[str, float]]]) -> str:
    """Means over seeds, and each seed's mean of all conditions."""
    head = ["run", *MEASURES, "loss", "mean by seed"]
    lines = [head, ["---"] * len(head)]
    for label, seeds in rows.items():
        means = [f"{average(seeds, key):.2f}" for key in MEASURES]
        each = " ".join(f"{row['mean']:.3f}" for row in seeds)
        lines.append([label, *means, f"{average(seeds, LOSS):.4f}", each])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def average(seeds: list[dict[str, float]], key: str) -> float:
    """The mean of one measure."""
    return sum(row[key] for row in seeds) / len(seeds)


def draw(sweeps: dict[str, dict], path: Path) -> None:
    """A row of panels for each sweep, a panel for each measure."""
    heights = [len(rows) + 1 for rows in sweeps.values()]
    columns = (*MEASURES, LOSS)
    figure, panels = plt.subplots(
        len(sweeps),
        len(columns),
        figsize=(1.45 * len(columns) + 1.5, 0.24 * sum(heights)),
        gridspec_kw={"height_ratios": heights},
        sharex="col",
        squeeze=False,
        layout="constrained",
    )
    for line, (name, rows) in zip(panels, sweeps.items(), strict=True):
        for panel, measure in zip(line, columns, strict=True):
            for y, seeds in enumerate(rows.values()):
                panel.plot([average(seeds, measure)] * 2, [y - 0.3, y + 0.3], color="#c1121f")
                panel.plot([row[measure] for row in seeds], [y] * len(seeds), ".", color="#2a6f97")
            panel.set_ylim(len(rows) - 0.5, -0.5)
            panel.set_yticks(range(len(rows)), list(rows) if panel is line[0] else [])
            panel.grid(axis="x", color="#e4e0d8")
            panel.spines[["top", "right", "left"]].set_visible(False)
        line[0].set_title(name.replace("_", " "), loc="left", fontweight="bold", fontsize=9)
    for panel, measure in zip(panels[0], columns, strict=True):
        panel.annotate(measure, (0.5, 1), (0, 14), "axes fraction", "offset points", ha="center")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
