"""The runs on the report's page: a table of all, and a section each with its series, statistics and record."""

from __future__ import annotations

import itertools
import math
import statistics
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Sequence

from nemo_bench.report import plots
from nemo_bench.report import profile as step_profile
from nemo_bench.report.markup import Child, el
from nemo_bench.report.model import INCOMPLETE, PASS, DeviceUse, Numbers, Point, Run, flatten
from nemo_bench.report.numbers import LAST_LOSSES, counted, tokens_text, unit_name
from nemo_bench.report.page_parts import (
    NONE,
    Column,
    badge,
    bullets,
    decimals,
    facts,
    figure,
    four,
    moment,
    percent,
    plural,
    row,
    section,
    table,
    whole,
)
from nemo_bench.report.profile import StepProfile

# More runs than this are closed, and opened at a click.
OPEN_RUNS = 4
# More events than this (checkpoints, for the most part) are counted rather than listed.
SHOWN_EVENTS = 20
SHOWN_RANKS = 24
SHOWN_KERNELS = 2
# Losses of single steps jump with the text; the means of so many are compared.
LOSS_WINDOW = 5


def section_of(anchor: str, heading: str, runs: Sequence[Run], points: Sequence[Point]) -> ET.Element | None:
    """All runs; None where there is none. A run's own part is `<anchor>-<number>`."""
    if not runs:
        return None
    point_of = {name: point.name for point in points for name in point.runs}
    parts = [
        _run(f"{anchor}-{number}", run, point_of.get(run.name), opened=len(runs) <= OPEN_RUNS)
        for number, run in enumerate(runs)
    ]
    buttons = [
        el("button", text, type="button", hidden=True, data_open=answer)
        for text, answer in (("Open all", "yes"), ("Close all", "no"))
    ]
    overview = _overview(anchor, runs) if len(runs) > 1 else None
    return section(anchor, heading, overview, el("p", buttons, class_="buttons") if len(runs) > 1 else None, parts)


def losses(runs: Sequence[Run]) -> ET.Element | None:
    """The losses of one training in several number formats in one plot; None without such runs.

    Of several runs of a number format, a finished one is drawn, and of these the longest.
    """
    alike: dict[tuple[object, ...], dict[str, Run]] = {}
    for run in sorted(runs, key=lambda run: (not run.final, -len(run.steps))):
        if run.record.config is not None and run.precision is not None and run.data not in (None, "mock"):
            alike.setdefault((run.model, run.data, *_training(run)), {}).setdefault(run.precision, run)
    figures = []
    for work, formats in alike.items():
        drawn = [formats[name] for name in sorted(formats)]
        curves = [curve for i, run in enumerate(drawn) if (curve := _loss_curve(run, i)) is not None]
        if len(curves) > 1:
            plot = plots.losses_together(f"Losses of {work[0]}", curves)
            names = f"Runs: {', '.join(run.name for run in drawn)}."
            figures.append(figure(plot, f"{work[0]} on {work[1]} data: loss by number format", *_apart(curves), names))
    return section("losses", "Losses by number format", el("div", figures, class_="figures")) if figures else None


def _training(run: Run) -> list[tuple[str, str]]:
    """What a run's losses depend on, but for number formats and layouts."""
    optim = ("lr", "min_lr", "warmup_steps", "weight_decay", "adam_", "clip_grad")
    sizes = (
        "seq_length",
        "global_batch_size",
        "init_method_std",
        *(vars(run.architecture) if run.architecture else ()),
    )
    wanted = (
        *("data.", "checkpoint.resume_from", "checkpoint.weights_from", "trainer.seed", "trainer.max_steps"),
        *(f"model.optim.{key}" for key in optim),
        *(f"model.{key}" for key in sizes),
    )
    without = ("data.folder", "data.num_workers")
    return [
        (key, value)
        for key, value in flatten(run.record.config or {}).items()
        if key.startswith(wanted) and not key.startswith(without)
    ]


def _loss_curve(run: Run, series: int) -> plots.Curve | None:
    """The losses up to the first that is no number, and a word on it; None where too few are known."""
    known = [(step, loss) for step, loss in zip(run.steps.step, run.steps.loss) if loss is not None]
    finite = [*itertools.takewhile(lambda pair: math.isfinite(pair[1]), known)]
    if len(finite) < LOSS_WINDOW:
        return None
    broken = f" (no number from step {known[len(finite)][0]:,} on)" if len(finite) < len(known) else ""
    steps, values = zip(*finite)
    return plots.Curve(f"{run.precision}{broken}", steps, values, series % plots.SERIES, dashed=False)


def _apart(curves: Sequence[plots.Curve]) -> Iterator[str]:
    """How far each curve strays from the first, over the steps that both have."""
    for curve in curves[1:]:
        ours, firsts = dict(zip(curve.x, curve.y)), dict(zip(curves[0].x, curves[0].y))
        apart = [ours[step] - firsts[step] for step in ours if step in firsts]
        means = [abs(statistics.fmean(apart[i : i + LOSS_WINDOW])) for i in range(len(apart) - LOSS_WINDOW + 1)]
        told = f"at most {max(means):.3f} away from" if means else "of other steps than"
        yield f"{curve.label} is {told} {curves[0].label} in means of {LOSS_WINDOW} steps, over {len(apart):,} steps."


def _overview(anchor: str, runs: Sequence[Run]) -> ET.Element:
    columns = (
        Column("run"),
        Column("state"),
        Column("counted", "steps", number=True),
        *(Column(name, "s", number=True) for name in ("median", "mean", "p95", "spread", "last")),
        Column("loss", "first to last", number=True),
        Column("remark"),
    )
    rows = [
        row(columns, [el("a", run.name, href=f"#{anchor}-{number}"), _state(run), *_overview_cells(run)])
        for number, run in enumerate(runs)
    ]
    return table("All runs; of those without a result, no numbers", columns, [el("tbody", rows)], "wordy runs")


def _overview_cells(run: Run) -> list[Child]:
    remarks = [run.why_not_final] if run.why_not_final else []
    t = run.times if run.final else None
    numbers = [NONE] * 7
    if t is not None:
        if t.warmup_steps or t.excluded:
            remarks.insert(0, counted(t))
        times = (four(each) for each in (t.median_s, t.mean_s, t.p95_s))
        numbers = [f"{t.counted:,}", *times, f"{t.spread:.1%}", four(t.last_s), _loss(run) or NONE]
    return [*numbers, "; ".join([*remarks, *run.warnings])]


def _loss(run: Run) -> str | None:
    """None for a run without a result: how far it came is in the plot."""
    if not run.final or run.first_loss is None or run.last_loss is None:
        return None
    return f"{run.first_loss:.3f} to {run.last_loss:.3f}"


def _state(run: Run) -> ET.Element:
    return badge(PASS if run.final else INCOMPLETE, run.state if run.final else f"{run.state}, no result")


def _run(anchor: str, run: Run, point: str | None, *, opened: bool) -> ET.Element:
    return el(
        "details",
        el("summary", el("h3", run.name), _state(run), el("span", f" {point or 'in no point'}", class_="muted")),
        None
        if run.final
        else el("div", el("p", el("strong", "No result: "), run.why_not_final or run.state), class_="note bad"),
        el("div", bullets(run.warnings), class_="note") if run.warnings else None,
        _figures(run),
        _statistics(run),
        _numbers(run),
        _ranks(run),
        _devices(run),
        [_profile(profile) for profile in run.profiles],
        _record(run),
        id=anchor,
        class_="run",
        open=opened,
    )


# --- series -------------------------------------------------------------------------------------------------


def _figures(run: Run) -> Child:
    median = run.times.median_s if run.final and run.times is not None else None
    made = []
    if (drawn := plots.step_times(run.name, run.steps, median)) is not None:
        made.append(figure(drawn, "Step time" + ("" if run.final else ", as far as recorded: no result"), _legend(run)))
    if (drawn := plots.losses(run.name, run.steps)) is not None:
        made.append(figure(drawn, "Loss, as logged (reduced_train_loss)"))
    return el("div", made, class_="figures") if made else el("p", "No training step was recorded.")


def _legend(run: Run) -> str:
    reasons = Counter(run.steps.excluded)
    counts = reasons.pop(None, 0)
    texts = [f"● {plural(counts, 'step')} {_verb(counts) if run.final else 'undisturbed'}"]
    texts += [
        f"{plots.glyph(reason)} {number:,} left out: {reason}{' (shaded)' if reason in plots.SHADED else ''}"
        for reason, number in reasons.items()
        if reason
    ]
    return " · ".join(texts) + "."


def _verb(number: int) -> str:
    return "counts" if number == 1 else "count"


# --- numbers ------------------------------------------------------------------------------------------------


def _statistics(run: Run) -> Child:
    t = run.times
    if not run.final or t is None:
        return None
    columns = (
        Column("step time", "s"),
        *(Column(name, number=True) for name in ("median", "mean", "p95", "min", "max", "spread")),
        Column("95% interval", "of the mean", number=True),
        Column("drift", "2nd half to 1st", number=True),
    )
    interval = " to ".join(four(end) for end in t.mean.interval) if t.mean else NONE
    times = [four(each) for each in (t.median_s, t.mean_s, t.p95_s, t.min_s, t.max_s)]
    cells = ["steps that count", *times, f"{t.spread:.1%}", interval, f"{t.drift:+.2%}"]
    method = f" (from {t.mean.degrees_of_freedom + 1} batches of steps)" if t.mean else ""
    return table(f"Step times: {counted(t)}{method}", columns, [el("tbody", row(columns, cells))])


def _numbers(run: Run) -> Child:
    if not run.final or run.numbers is None:
        return None
    unit = f"a {unit_name(run)}"
    columns = (
        Column("computed at"),
        Column("step time", "s", number=True),
        Column("tokens/s", number=True),
        Column("tokens/s", unit, number=True),
        Column("TFLOP/s", unit, number=True),
        Column("TFLOP/s causal", unit, number=True),
        Column("MFU", number=True),
        Column("MFU causal", number=True),
        Column(f"days to {tokens_text(run.numbers.total_tokens)}", "tokens", number=True),
    )
    rows = [row(columns, _cells("the mean", run.numbers))]
    if run.numbers is not None and run.times is not None:
        rows.append(row(columns, _cells("the last step (the recipe's)", run.numbers.at(run.times.last_s))))
    peak = run.numbers.peak_tflops
    told = f"; peak {four(peak)} TFLOP/s ({run.numbers.peak_source})" if peak is not None else ""
    return table(f"What follows from the step time{told}", columns, [el("tbody", rows)])


def _cells(name: str, n: Numbers) -> list[Child]:
    return [
        name,
        four(n.step_time_s),
        whole(n.tokens_per_s),
        whole(n.tokens_per_s_per_gpu),
        four(n.tflops_per_gpu),
        four(n.tflops_per_gpu_causal),
        percent(n.mfu),
        percent(n.mfu_causal),
        decimals(n.days_to_train),
    ]


def _ranks(run: Run) -> Child:
    """The ranks beside each other: stragglers first, the slowest first."""
    if not run.ranks:
        return None
    columns = (
        Column("rank", number=True),
        Column("measure"),
        Column("this rank", number=True),
        Column("median of the others", number=True),
        Column("slower by", number=True),
        Column("straggler"),
    )
    ordered = sorted(run.ranks, key=lambda rank: (not rank.straggler, -(rank.slower or 0)))
    rows = [
        row(
            columns,
            [
                str(each.rank),
                each.measure,
                four(each.value),
                four(each.others),
                NONE if each.slower is None else f"{each.slower:+.1%}",
                badge(INCOMPLETE, "straggler") if each.straggler else "no",
            ],
        )
        for each in ordered[:SHOWN_RANKS]
    ]
    stragglers = sum(rank.straggler for rank in run.ranks)
    told = f"Ranks beside each other: {plural(stragglers, 'straggler') if stragglers else 'no straggler'}"
    if len(run.ranks) > SHOWN_RANKS:
        told += f"; the slowest {SHOWN_RANKS} of {len(run.ranks):,}"
    return table(told, columns, [el("tbody", rows)])


def _profile(profile: StepProfile) -> Child:
    """The time by kernel class of one rank."""
    columns = (
        Column("class"),
        Column("time", "ms a step", number=True),
        Column("of the step", number=True),
        Column("sum", "ms a step", number=True),
        Column("kernels", "a step", number=True),
        Column("most of it", "ms a step"),
    )
    rows = []
    for each in profile.classes:
        top = ", ".join(f"{kernel.name} {four(kernel.total_ms)}" for kernel in each.top[:SHOWN_KERNELS])
        numbers = [four(each.ms), percent(each.share, 1), four(each.total_ms), f"{each.count:,.0f}"]
        rows.append(row(columns, [each.name, *numbers, top]))
    for name, ms in (("idle", profile.idle_ms), ("step", profile.step_ms)):
        rows.append(row(columns, [name, four(ms), percent(ms / profile.step_ms, 1), NONE, NONE, ""]))
    notes = [note for note in (step_profile.communication(profile), *profile.notes) if note]
    return [
        table(f"Profile of {step_profile.title(profile)}", columns, [el("tbody", rows)], "wordy"),
        el("p", "; ".join(notes), class_="muted") if notes else None,
    ]


def _devices(run: Run) -> Child:
    """The GPUs that were measured: those held back first."""
    used = [each for each in run.devices if each.power_w is not None or each.sm_clock_mhz is not None]
    if not used:
        return None
    columns = (
        Column("rank", number=True),
        Column("host"),
        Column("power", "W", number=True),
        Column("SM clock", "MHz", number=True),
        Column("lowest", "MHz", number=True),
        Column("temperature", "°C, highest", number=True),
        Column("peak memory", "GiB", number=True),
        Column("clocks held back", "share of its steps"),
    )

    def blamed(each: DeviceUse) -> float:
        return max((share for reason, share in each.throttled.items() if reason != "sw_power_cap"), default=0.0)

    ordered = sorted(used, key=lambda each: (-blamed(each), each.sm_clock_mhz or 0))
    rows = [
        row(
            columns,
            [
                str(each.rank),
                each.host or NONE,
                whole(each.power_w),
                whole(each.sm_clock_mhz),
                whole(each.sm_clock_min_mhz),
                whole(each.temperature_max_c),
                NONE if each.peak_memory_gib is None else f"{each.peak_memory_gib:.1f}",
                ", ".join(f"{reason.replace('_', ' ')} {share:.0%}" for reason, share in each.throttled.items())
                or "no",
            ],
        )
        for each in ordered[:SHOWN_RANKS]
    ]
    told = "GPUs while they trained" + (f"; {SHOWN_RANKS} of {len(used):,}" if len(used) > SHOWN_RANKS else "")
    return table(told, columns, [el("tbody", rows)])


# --- the record ---------------------------------------------------------------------------------------------


def _record(run: Run) -> ET.Element:
    git = run.record.git or {}
    modified = ", modified" if git.get("modified") else ""
    loss = _loss(run)
    peak = None if run.peak_memory_gib is None else f"{run.peak_memory_gib:.1f} GiB, of one {unit_name(run)}"
    return facts(
        [
            ("model", run.model),
            ("precision", run.precision),
            (f"{unit_name(run)}s" if unit_name(run) == "GPU" else "processes", whole(run.gpus) if run.gpus else None),
            ("nodes", whole(run.nodes) if run.nodes else None),
            ("device", " · ".join(dict.fromkeys(text for text in (run.gpu, run.gpu_reported) if text))),
            ("global batch", whole(run.global_batch_size) if run.global_batch_size else None),
            ("sequence", f"{whole(run.seq_length)} tokens" if run.seq_length else None),
            ("layout", " ".join(f"{key}={value}" for key, value in run.layout.items())),
            ("software", " · ".join(text for text in (run.version, run.entrypoint) if text)),
            ("container", run.container),
            ("data", run.data),
            ("steps", f"{len(run.steps):,} recorded" + (f" of {run.max_steps:,}" if run.max_steps else "")),
            ("loss", f"{loss} (first step, mean of the last {LAST_LOSSES})" if loss else None),
            ("peak memory", peak),
            ("started", moment(run.record.started_at)),
            ("ended", moment(run.record.ended_at)),
        ],
        long=[
            ("command", el("code", run.record.command) if run.record.command else None),
            ("this project", el("code", f"{git.get('revision')}{modified}") if git else None),
            (run.source, el("code", run.path)),
            ("known from", ", ".join(f"{key}: {source}" for key, source in run.identified.items())),
            ("events", _events(run)),
        ],
    )


def _events(run: Run) -> Child:
    if len(run.record.events) > SHOWN_EVENTS:
        return ", ".join(
            f"{number:,} x {name}" for name, number in Counter(str(e["event"]) for e in run.record.events).items()
        )
    told = []
    for event in run.record.events:
        text = str(event["event"])
        if event.get("after_step") is not None:
            text += f" after step {event['after_step']}"
        if event.get("time") is not None:
            text += time.strftime(" at %H:%M:%S UTC", time.gmtime(event["time"]))
        told.append(text)
    return "; ".join(told)
