"""Reports, charts, and the numbers of README.md and docs/benchmarks.md, all from results.json: none is typed by hand.

python benchmarks/render.py                     write the measured parts of both from benchmarks/results/
python benchmarks/render.py --check             only say whether they are what would be written
python benchmarks/render.py --keep OUT          take the results of a report over into benchmarks/results/ first
python benchmarks/render.py --draw OUT          only draw the pictures of a report, beside its results.json
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ddpm_fast.measure.charts import bars, columns  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- rendered by benchmarks/render.py: begin -->", "<!-- rendered by benchmarks/render.py: end -->"
PHASES = ("training step", "sampling step")
COMPILED = ("upstream-compiled", "upstream-max-autotune")


# A report -----------------------------------------------------------------------------------------------------------


def report(results: dict) -> str:
    """Markdown of everything in results.json."""
    parts = [f"# ddpm_fast on {machine_name(results)}", head(results)]
    if results["quick"]:
        parts.append("**A dry run on the smallest sizes: the numbers mean nothing.**")
    if "stopped" in results:
        parts.append(f"**Not complete: {results['stopped']}.**")
    parts.append(steps_table(results))
    for phase in PHASES:
        for record in select(results, "network", phase=phase):
            parts.append(f"## {phase}: {record['case']}\n\n{network_table(record)}")
    for note in (sides_note(results),):
        parts += [note] if note else []
    if list(select(results, "memory")):
        parts.append(f"## Resident memory of training, a process for each side\n\n{memory_table(results)}")
    for record in select(results, "first step"):
        parts.append(f"## Cold start and memory in training: {record['case']}\n\n{first_step_table(record)}")
    if list(select(results, "op")):
        parts.append(f"## Ops\n\n{ops_table(results)}")
    kernels = results["steps"].get("ncu", {}).get("kernels")
    if kernels:
        parts.append(f"## Kernels by hardware counters (ncu)\n\n{ncu_table(kernels)}")
    return "\n\n".join(parts) + "\n"


def machine_name(results: dict) -> str:
    """The machine's short name; without a description of the machine, the device's type."""
    if "machine" not in results:
        return f"an unknown machine ({results['device']})"
    from ddpm_fast.measure import machine

    return machine.name(results["machine"])


def head(results: dict) -> str:
    """Date, commit, versions and ceilings, as a list."""
    lines = [f"- {results['date']}, commit {results['commit']}"]
    facts = results.get("machine", {})
    names = ("gpu", "driver", "cuda", "cudnn", "processor", "cores", "threads", "vector", "python", "torch", "triton")
    known = [f"{name} {facts[name]}" for name in names if facts.get(name) is not None]
    if known:
        lines.append("- " + ", ".join(known))
    if "ceilings" in results:
        peaks = ", ".join(f"{name} {value / 1e12:.3g}" for name, value in results["ceilings"]["matmul"].items())
        copy = results["ceilings"]["copy"] / 1e9
        lines.append(f"- measured ceilings: copy {copy:.0f} GB/s; TFLOP/s of matrix products: {peaks}")
    return "\n".join(lines)


def steps_table(results: dict) -> str:
    rows = [
        [
            name,
            step["status"],
            f"{step['seconds']:.0f}",
            str(step.get("why") or step.get("summary") or "").replace("|", "/"),
        ]
        for name, step in results["steps"].items()
    ]
    return columns(["step", "", "s", ""], rows)


def select(results: dict, bench: str, **fields):
    """Records of a kind, one of each case: that of the most baselines, and of those the last."""
    found = {}
    for record in results["records"]:
        if record["bench"] == bench and all(record[k] == v for k, v in fields.items()):
            key = record["case"], record.get("dtype"), record.get("direction"), record.get("phase")
            if key not in found or len(record.get("timings", ())) >= len(found[key].get("timings", ())):
                found[key] = record
    return found.values()


def network_table(record: dict) -> str:
    """Milliseconds, spread, the ratio to ours, throughput and memory of each baseline."""
    ours = record["timings"]["ours"]["median"]
    sampling = record["phase"] == PHASES[1]
    sizes = {name: errors["parameters"] for name, errors in record["errors"].items() if "parameters" in errors}
    speed = "s per 1,000 steps; images/s at 1,000" if sampling else "images/s"
    names = ["", "ms per step", "middle half", "time over ours", speed, "peak MiB"]
    targets = record.get("targets", {})
    rows = []
    for name, t in record["timings"].items():
        speed = f"{t['images_per_second']:.3g}"
        if sampling:
            speed = f"{t['seconds_per_1000_steps']:.3g}; {speed}"
        label = f"{name} ({sizes[name]:.1f} times the parameters)" if name in sizes else name
        memory = f"{t['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in t else "–"
        spread = f"{1e3 * t['low']:.3g} – {1e3 * t['high']:.3g}"
        over = f"{t['median'] / ours:.2f}" + (f" (target {targets[name]:.1f})" if name in targets else "")
        rows.append([label, f"{1e3 * t['median']:.4g}", spread, over, speed, memory])
    rows += [[name, "–", reason, "", "", ""] for name, reason in record["left_out"].items()]
    compiled = [f"{name} {s:.0f} s" for name, s in record.get("check_seconds", {}).items() if name in COMPILED]
    note = f"\n\nTo compile and to be found equal took: {', '.join(compiled)}." if compiled else ""
    return columns(names, rows) + note


def sides_note(results: dict) -> str:
    """How many threads both sides had, and whose optimizers; empty for results that do not tell."""
    threads, optimizers = {}, {}
    for record in select(results, "network"):
        if "threads" in record:
            threads[record["threads"]] = None
            optimizers |= {name: of for name, of in record["optimizers"].items() if name in ("ours", "upstream")}
    if not threads or results["device"] != "cpu":
        return ""
    both = " or ".join(str(n) for n in threads)
    text = f"Both sides have {both} thread{'s' if both != '1' else ''}."
    if len(optimizers) == 2:
        text += (
            f" Training takes `{optimizers['ours']}` here, `{optimizers['upstream']}` at its defaults in the others."
        )
    return text


def memory_table(results: dict) -> str:
    """MiB of each baseline, in total and above the memory before the first step, and as a share of upstream's."""
    rows = []
    for record in select(results, "memory"):
        above = {name: b["peak"] - b["before"] for name, b in record["bytes"].items()}
        maps = {name: above[name] - b["kept"] for name, b in record["bytes"].items()}
        for name, b in record["bytes"].items():
            shares = ["–", "–"]
            if name != "upstream" and "upstream" in above:
                shares = [f"{of[name] / of['upstream']:.2f}" if of["upstream"] > 0 else "–" for of in (above, maps)]
                shares[0] += f" (target {record['target']:.2f})"
            mib = [f"{n / 2**20:.0f}" for n in (b["peak"], b["before"], above[name], maps[name])]
            rows.append([record["case"], name, *mib, *shares])
        rows += [[record["case"], name, reason, *[""] * 5] for name, reason in record["left_out"].items()]
    names = ["", "", "peak MiB", "before the first step", "above that", "less gradients and Adam's state"]
    return columns([*names, "above that / upstream's", "less gradients ... / upstream's"], rows)


def overview(results: dict) -> str:
    """The last output of the report: the networks' ratios and memory."""
    parts = []
    if list(select(results, "network")):
        parts += [networks_summary(results), sides_note(results)]
    if list(select(results, "memory")):
        parts.append(memory_table(results))
    return "\n\n".join(part for part in parts if part)


def first_step_table(record: dict) -> str:
    timings = record["timings"]
    told_apart = any("beside_torch" in t for t in timings.values())  # results from before December 2026 are not
    names = ["", "s to import, without torch", "s to the first step"]
    names += ["beside torch's import"] * told_apart
    rows = [
        [
            name, f"{t['import_seconds']:.2f}", f"{t['median']:.1f}",
            *([f"{t['beside_torch']:.1f}"] if told_apart else []), f"{t['peak_bytes'] / 2**20:.0f}", str(t["rounds"]),
        ]
        for name, t in timings.items()
    ]  # fmt: skip
    names += ["peak MiB in training", "processes"]
    rows += [[name, "–", reason, *["–"] * (len(names) - 3)] for name, reason in record["left_out"].items()]
    return columns(names, rows)


def ops_table(results: dict) -> str:
    """Each op and implementation: microseconds, GB/s, share of copy bandwidth, and the time over ours."""
    rows = []
    for record in select(results, "op"):
        ours = record["timings"][record["ours"]]["median"]
        for name, t in record["timings"].items():
            spread = f"{1e6 * t['low']:.4g} – {1e6 * t['high']:.4g}"
            label = f"**{name}**" if name == record["ours"] else name
            rate = [f"{t['bytes_per_second'] / 1e9:.3g}", f"{100 * t['share_of_copy']:.0f}%"]
            if "flops_per_second" in t:
                rate[0] += f"; {t['flops_per_second'] / 1e12:.3g} TFLOP/s"
                rate[1] += f"; {100 * t['share_of_matmul']:.0f}%"
            rows.append(
                [record["case"], record["dtype"], record["direction"], label, f"{1e6 * t['median']:.4g}", spread, *rate,
                 f"{t['median'] / ours:.2f}"]
            )  # fmt: skip
    names = ["op", "dtype", "", "implementation", "µs", "middle half", "GB/s", "of the ceiling", "time over ours"]
    return columns(names, rows)


def ncu_table(kernels: list[dict]) -> str:
    rows = [
        [k["kernel"], f"{k.get('nanoseconds', 0) / 1e3:.4g}", f"{k.get('bytes', 0) / 1e6:.4g}",
         f"{k.get('bytes_per_second', 0) / 1e9:.4g}", f"{k.get('percent_of_peak', 0):.0f}%"]
        for k in kernels
    ]  # fmt: skip
    return columns(["kernel", "µs", "MB of device memory", "GB/s", "of the peak"], rows)


def charts(results: dict, folder: Path) -> list[Path]:
    """training.png, sampling.png, first-step.png and ops.png in a folder, those that there are numbers for."""
    made = []
    for phase, file in zip(PHASES, ("training.png", "sampling.png"), strict=True):
        panels = {r["case"]: r["timings"] for r in select(results, "network", phase=phase)}
        made += _chart(panels, folder / file, f"One {phase}, {machine_name(results)}", "ms", 1e3, "upstream")
    panels = {r["case"]: r["timings"] for r in select(results, "first step")}
    title = f"Cold process to first training step, {machine_name(results)}"
    made += _chart(panels, folder / "first-step.png", title, "s", 1, "upstream")
    panels = {
        # The reference is an oracle: where something else runs, its bar would only flatten the others.
        f"{r['case']}, {r['dtype']}, {r['direction']}": {
            name: t for name, t in r["timings"].items() if name != "reference" or r["ours"] == "reference"
        }
        for r in select(results, "op")
        if r["direction"] == "forward+backward" or r["case"].startswith(("fill", "sampler", "q_sample"))
    }
    made += _chart(panels, folder / "ops.png", f"Ops, {machine_name(results)}", "µs", 1e6, "eager")
    return made


def _chart(panels: dict, path: Path, title: str, unit: str, scale: float, reference: str) -> list[Path]:
    panels = {label: timings for label, timings in panels.items() if timings}  # none where the time was over
    if not panels:
        return []
    groups = {label: {name: scale * t["median"] for name, t in timings.items()} for label, timings in panels.items()}
    spread = {
        label: {name: (scale * t["low"], scale * t["high"]) for name, t in timings.items()}
        for label, timings in panels.items()
    }
    title = f"{title}\nin brackets: speed over {reference}'s"
    bars(groups, path, title=title, unit=unit, spread=spread, reference=reference)
    return [path]


# README.md and docs/benchmarks.md -------------------------------------------------------------------------------------


def kept() -> dict[str, dict]:
    """The newest results of each kind of device, a CPU's by its vectors and maker, by file name without its ending."""
    newest: dict[tuple[str, str, str], tuple[str, dict]] = {}
    for file in sorted(RESULTS.glob("*.json")):
        if file.name == "traffic.json":
            continue
        results = json.loads(file.read_text())
        newest[kind(results)] = (file.stem, results)
    return dict(newest[of_kind] for of_kind in sorted(newest, reverse=True))


def kind(results: dict) -> tuple[str, str, str]:
    """The device's type, and a CPU's vectors and maker: sorted backwards, GPUs come first and AVX-512 before AVX2."""
    if results["device"] != "cpu":
        return results["device"], "", ""
    machine = results["machine"]
    maker = re.match(r"\w*", machine.get("processor") or "")
    return results["device"], machine.get("vector") or "", maker[0] if maker else ""


def measured() -> str:
    """The measured part of docs/benchmarks.md: the newest results in full, and the counts."""
    parts = []
    for stem, results in kept().items():
        parts += [where(results), networks_summary(results)]
        note = sides_note(results)
        parts += [note] if note else []
        for phase, file in zip(PHASES, ("training.png", "sampling.png"), strict=True):
            if (RESULTS / f"{stem}-{file}").exists():
                parts.append(f"![{phase}](../benchmarks/results/{stem}-{file})")
        if list(select(results, "memory")):
            parts.append("Resident memory of a few training steps, in a process for each side:")
            parts.append(memory_table(results))
        first = [record for record in select(results, "first step") if record["timings"]]
        if first:
            parts.append(f"From a cold process, and memory in training ({first[0]['case']}):")
            parts.append(first_step_table(first[0]))
        ops = ops_summary(results)
        if ops:
            parts.append("Ops against the operators that upstream runs:")
            parts.append(ops)
        parts.append(f"Everything: [{stem}.md](../benchmarks/results/{stem}.md).")
    parts.append(traffic_part())
    return in_words("\n\n".join(parts))


def measured_in_short() -> str:
    """The measured part of README.md: the networks' ratios, of all kinds of device in one table, and one chart."""
    machines = list(kept().values())
    runs = "; ".join(f"**{label(results)}**: {run(results)}" for results in machines)
    names, cells = ["", ""], {}
    for i, results in enumerate(machines):
        names += [f"{label(results)}: ours, ms", "upstream / ours", "upstream-compiled / ours"]
        for phase in PHASES:
            for r in select(results, "network", phase=phase):
                ours = r["timings"]["ours"]["median"]
                over = [r["timings"].get(n, {}).get("median") for n in ("upstream", "upstream-compiled")]
                row = cells.setdefault((r["case"], phase), ["–"] * 3 * len(machines))
                row[3 * i : 3 * i + 3] = [f"{1e3 * ours:.4g}", *("–" if o is None else f"{o / ours:.2f}" for o in over)]
    table = columns(names, [[*place, *row] for place, row in cells.items()])
    chart = f"![One sampling step](benchmarks/results/{next(iter(kept()))}-sampling.png)"
    return in_words("\n\n".join((f"{runs}. Medians of interleaved rounds in one process:", table, chart)))


def label(results: dict) -> str:
    """A kind of device in a few words: the GPU, or a CPU's maker and vectors."""
    device, vector, maker = kind(results)
    return results["machine"].get("gpu") or f"{maker} {vector}".strip() or device


def where(results: dict) -> str:
    """The machine, the date and the commit of results, as a sentence's beginning."""
    return f"On {run(results)}; medians of interleaved rounds in one process:"


def run(results: dict) -> str:
    """The machine, the date, the commit and torch."""
    measured_at = f"{results['date'].split()[0]}, commit {results['commit']}"
    return f"{machine_name(results)}, {measured_at}, torch {results['machine']['torch']}"


def in_words(text: str) -> str:
    """Rendered text with its tables aligned again."""
    parts = text.split("\n\n")
    for i, part in enumerate(parts):
        if part.startswith("|"):
            names, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.split("\n")]
            parts[i] = columns(names, rows)
    return "\n\n".join(parts)


def networks_summary(results: dict, against: tuple[str, ...] | None = None) -> str:
    """One row per configuration and phase: ours in milliseconds, the others' times over ours, and the targets.

    Args:
        against: these baselines only, without targets; None: all of them.
    """
    records = [r for phase in PHASES for r in select(results, "network", phase=phase)]
    names = list(dict.fromkeys(n for r in records for n in r["timings"] if n != "ours"))
    names = [n for n in names if against is None or n in against]
    rows = []
    for r in records:
        ours = r["timings"]["ours"]["median"]
        targets = r.get("targets", {}) if against is None else {}
        over = [f"{r['timings'][n]['median'] / ours:.2f}" if n in r["timings"] else "–" for n in names]
        over = [o + (f" (target {targets[n]:.1f})" if n in targets else "") for n, o in zip(names, over, strict=True)]
        rows.append([r["case"], r["phase"], f"{1e3 * ours:.4g}", *over])
    return columns(["", "", "ours, ms", *(f"{n} / ours" for n in names)], rows)


def ops_summary(results: dict) -> str:
    """One row per op, its first shape, in the dtype of training: microseconds of ours and of eager torch."""
    dtype, name = ("bf16", "bfloat16") if results["device"] == "cuda" else ("fp32", "float32")
    rows, seen = [], set()
    for r in select(results, "op"):
        op = r["case"].rsplit("-", 1)[0]
        if r["dtype"] != dtype or (op, r["direction"]) in seen or "eager" not in r["timings"]:
            continue
        seen.add((op, r["direction"]))
        ours, eager = r["timings"][r["ours"]], r["timings"]["eager"]
        rows.append(
            [f"`{op}`, {r['case'].rsplit('-', 1)[1]}, {r['direction']}", r["ours"], f"{1e6 * ours['median']:.4g}",
             f"{1e6 * eager['median']:.4g}", f"{eager['median'] / ours['median']:.2f}"]
        )  # fmt: skip
    return columns([name, "implementation", "ours, µs", "eager, µs", "eager / ours"], rows) if rows else ""


def traffic_part() -> str:
    """The table of counts, the same on every machine."""
    file = RESULTS / "traffic.json"
    if not file.exists():
        return ""
    counts = json.loads(file.read_text())
    rows = []
    for phase in PHASES:
        for label, key, form, unit in (
            ("operators", "operators", "{:.0f}", 1),
            ("GB moved", "bytes_moved", "{:.2f}", 1e9),
            ("MB kept for backward", "bytes_kept", "{:.0f}", 1e6),
        ):
            cells = [counts[side][phase][key] for side in ("upstream", "fast", "low")]
            if cells[0]:
                shown = [form.format(cell / unit) for cell in cells]
                rows.append([f"{label}, {phase}", *shown, f"{cells[0] / cells[1]:.2f}"])
    table = columns(["per image", "upstream", "here", 'here, `memory="low"`', "upstream / here"], rows)
    mults = ", ".join(map(str, counts["config"]["dim_mults"]))
    size, dim = counts["config"]["image_size"], counts["config"]["dim"]
    return (
        "What the CUDA path does is counted too, from operator dispatch, without a clock "
        f"(Unet({dim}, ({mults})) at {size}×{size}, float32; `python benchmarks/traffic.py`):\n\n{table}"
    )


def with_measured(text: str, part: str) -> str:
    """A page with its measured part replaced.

    Raises:
        ValueError: the marks are not there, once each.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the page must hold {BEGIN!r} and {END!r} once each")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{part}\n{END}{rest.split(END)[1]}"


def pages() -> dict[Path, str]:
    """The pages that hold measured numbers, as they should be."""
    parts = {README: measured_in_short(), PAGE: measured()}
    return {file: with_measured(file.read_text(), part) for file, part in parts.items()}


def keep(out: Path) -> str:
    """Copy a report into benchmarks/results/ under its date, device and a CPU's vectors and maker; returns the name."""
    results = json.loads((out / "results.json").read_text())
    if results["quick"]:
        raise SystemExit("this was a dry run; its numbers mean nothing and are not kept")
    stem = "-".join(part.lower() for part in (results["date"].split()[0], *kind(results)) if part)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / f"{stem}.md").write_text(report(results))
    with tempfile.TemporaryDirectory() as folder:
        for chart in charts(results, Path(folder)):
            shutil.copyfile(chart, RESULTS / f"{stem}-{chart.name}")
    return stem


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a page is another")
    parser.add_argument("--draw", type=Path, metavar="OUT", help="a report's folder, to draw its pictures in")
    parser.add_argument("--keep", type=Path, metavar="OUT", help="a report's folder, to take over first")
    options = parser.parse_args()
    if options.draw is not None:
        made = charts(json.loads((options.draw / "results.json").read_text()), options.draw)
        print("drawn: " + (", ".join(map(str, made)) or "nothing; there are no timings"))
        return
    if options.keep is not None:
        print(f"kept: benchmarks/results/{keep(options.keep)}.json")
    for file, text in pages().items():
        if options.check and text != file.read_text():
            raise SystemExit(f"{file.relative_to(ROOT)} is not what benchmarks/render.py writes; run it")
        file.write_text(text)


if __name__ == "__main__":
    main()
