"""Draws what `bench.run` measured: per op a roofline and the speed-up over each peer, and one page with all of it.

python -m bench.plot [--results bench/results/GPU] [--out FOLDER]

Without `--results`, every folder under bench/results that holds CSV files is drawn. The figures go to FOLDER, by
default `plots` beside the CSV files: `<op>_roofline.png`, `<op>_speedup.png` and `index.html`. The same rows give the
same bytes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from octavo.bench import figures
from octavo.bench.floors import Ceilings, latest, providers, read_launch_cost, read_rows
from octavo.bench.page import Section, page
from octavo.bench.store import Row, default_folder


def result_folders(root: Path) -> list[Path]:
    """The folders under `root` that hold results."""
    return sorted({path.parent for path in root.glob("*/*.csv")})


def sections(rows: Sequence[Row], ceilings: Ceilings) -> list[Section]:
    """Draws every op of some rows."""
    newest = latest(rows)
    looks = figures.styles(providers(newest))
    drawn = []
    for op in sorted({row.op for row in newest}):
        mine = [row for row in newest if row.op == op]
        images = {}
        if any(row.median_us for row in mine):
            images["roofline"] = figures.roofline(mine, ceilings, looks)
        bars = figures.speedup(mine, looks)
        if bars:
            images["speedup"] = bars
        drawn.append(Section(op, mine, images))
    return drawn


def plot(results: Path, out: Path) -> list[Path]:
    """Draws one results folder into `out` and returns the files written.

    Raises:
        FileNotFoundError: the folder holds no rows.
        ValueError: a CSV file that is not one of results.
    """
    rows = read_rows(results)
    if not rows:
        raise FileNotFoundError(f"{results}: no rows of results there; run `python -m bench.run` first")
    ceilings = Ceilings.read(results)
    if not ceilings.values:
        print(f"{results}: no ceilings.json, so no roofs or floors: run `python -m bench.ceilings`", file=sys.stderr)
    drawn = sections(rows, ceilings)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for section in drawn:
        for what, png in section.figures.items():
            written.append(out / f"{section.op}_{what}.png")
            written[-1].write_bytes(png)
    written.append(out / "index.html")
    written[-1].write_text(page(rows[-1].gpu, drawn, ceilings, read_launch_cost(results)), encoding="utf-8")
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="a folder of CSV files (default: each in bench/results)")
    parser.add_argument("--out", type=Path, help="where the figures go (default: plots/ in the results folder)")
    args = parser.parse_args(arguments)
    folders = [args.results] if args.results else result_folders(default_folder())
    if not folders:
        print(f"{default_folder()}: no rows of results there; run `python -m bench.run` first", file=sys.stderr)
        return 1
    for folder in folders:
        out = folder / "plots"
        if args.out:
            out = args.out if len(folders) == 1 else args.out / folder.name
        try:
            written = plot(folder, out)
        except (FileNotFoundError, ValueError) as error:
            print(error, file=sys.stderr)
            return 1
        for path in written:
            print(f"{path}  {path.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
