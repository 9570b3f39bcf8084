"""What a report is made of, and `results.json`: the same objects, field by field, as JSON.

Reading one (`from_json`) gives the objects back; `Report.schema_version` is raised when a field changes its meaning or
goes away, and a file of another version is refused. Times are in seconds and end in `_s`, fractions are 0 to 1 (an MFU
of 0.54 is 54%), moments are ISO 8601 in UTC, sizes of memory are GiB (2^30 bytes), peaks and rates of one GPU are
TFLOP/s (10^12 a second). None (JSON null) means "not known" or "does not apply". A number that is not finite, such as a
loss, is the string "nan", "inf" or "-inf" in JSON.

`Report`
    `runs` are all that was found, good and bad; `points` gather the repeats of one configuration, and hold the
    verdicts; `references` are the published tables; `scaling` the curves of throughput over the number of GPUs,
    measured and published; `comparisons` come with `baseline=` only. `assumptions` and `methods` say what the numbers
    rest on.
`Run`
    One run folder, or one log file of somebody else's run. A run that is not `final` has no `numbers`: whoever shows it
    shows `why_not_final` instead. Its `steps` and `times` are there as far as they were recorded.
`Point`
    Repeats of one configuration on one number of GPUs. Its numbers are at the mean of the runs' median step times.
"""

from __future__ import annotations

import json
import math
import types
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from nemo_bench.errors import BenchError
from nemo_bench.flops import Architecture, pipeline_bubble
from nemo_bench.report.profile import StepProfile
from nemo_bench.report.statistics import Interval, StepTimes

T = TypeVar("T")

SCHEMA_VERSION = 1

# Verdicts of a point against published numbers.
PASS = "PASS"
FAIL = "FAIL"
FASTER = "FASTER THAN PUBLISHED"  # by more than the tolerance: also worth a look
INCOMPLETE = "INCOMPLETE"  # there is a published number, and no finished run to hold against it
NOT_COMPARABLE = "NOT COMPARABLE"  # another model size or sequence length under the same name
NO_REFERENCE = "NO REFERENCE"

# Verdicts of a comparison with a baseline.
SLOWER = "SLOWER"
QUICKER = "FASTER"
NO_DIFFERENCE = "NO DIFFERENCE"  # smaller than the noise
UNDECIDED = "UNDECIDED"  # too little was measured to know the noise


@dataclass(frozen=True)
class Steps:
    """The training steps of a run, in columns of equal length, in order of `step`.

    Attributes:
        step: the optimizer step's number as it was logged (NeMo counts from 0).
        time_s: NeMo's `train_step_timing`.
        loss: `reduced_train_loss`.
        grad_norm: global gradient norm before clipping.
        excluded: why the step is left out of the statistics: None (it counts), "warm-up", "validation", "checkpoint",
            "profile", "restart" (first steps after a restart), "no time" (none recorded, or no positive number).
    """

    step: tuple[int, ...]
    time_s: tuple[float | None, ...]
    loss: tuple[float | None, ...]
    grad_norm: tuple[float | None, ...]
    excluded: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True)
class Numbers:
    """What follows from one step time.

    Attributes:
        step_time_s: the step time that all others follow from.
        tokens_per_s: of the whole job: sequence length * global batch size / step time.
        tokens_per_s_per_gpu: the same a GPU (a process, on CPU).
        tflops_per_gpu: model TFLOP/s a GPU, the recipe's convention (attention in full).
        tflops_per_gpu_causal: the same, attention counted causally (Megatron-LM's convention).
        peak_tflops: dense peak of one GPU in the run's number format.
        peak_source: where that peak comes from.
        mfu: tflops_per_gpu / peak_tflops, the recipe's MFU.
        mfu_causal: tflops_per_gpu_causal / peak_tflops.
        flops_per_sequence: model FLOPs to train on one sequence, the recipe's convention.
        total_tokens: token budget behind `days_to_train`.
        days_to_train: total_tokens / tokens_per_s / 86400.
    """

    step_time_s: float
    tokens_per_s: float
    tokens_per_s_per_gpu: float
    tflops_per_gpu: float | None
    tflops_per_gpu_causal: float | None
    peak_tflops: float | None
    peak_source: str | None
    mfu: float | None
    mfu_causal: float | None
    flops_per_sequence: float | None
    total_tokens: float
    days_to_train: float


@dataclass(frozen=True)
class RankTimes:
    """What one rank did beside the others, where the record or the log tells the ranks apart.

    Attributes:
        rank: its global rank.
        measure: what is compared: "step time (s)", "matrix rate (TFLOP/s)" or "NVIDIA's straggler detection".
        value: of this rank, its median over the run; None where only the straggler itself is named.
        others: the median of the other ranks; None as above.
        slower: how much slower than that median, as a fraction (0.2: 20% slower; negative: faster).
        straggler: whether that is more than the others' spread explains (or the log itself says so).
    """

    rank: int
    measure: str
    value: float | None
    others: float | None
    slower: float | None
    straggler: bool


@dataclass(frozen=True)
class DeviceUse:
    """What one rank's device did over its steps, without the first few; None for what was not measured.

    Attributes:
        rank: its global rank.
        host: where it ran.
        gpu_name, gpu_uuid: the driver's name of the GPU, and its identity.
        steps: steps that the numbers are of.
        step_time_median_s, step_time_max_s: NeMo's `train_step_timing` as this rank saw it. Ranks that wait for each
            other see nearly the same.
        matrix_tflops: rate of a bf16 matrix product of this GPU by itself, before the training.
        power_w: mean over the steps.
        sm_clock_mhz, sm_clock_min_mhz: mean over the steps, and the smallest sample.
        temperature_max_c: of the GPU.
        peak_memory_gib, reserved_memory_gib: largest allocation, and what PyTorch held.
        throttled: share of the steps in which the driver named each reason to hold clocks back (sw_power_cap,
            hw_slowdown, sync_boost, sw_thermal, hw_thermal, hw_power_brake).
    """

    rank: int
    host: str | None
    gpu_name: str | None
    gpu_uuid: str | None
    steps: int
    step_time_median_s: float | None
    step_time_max_s: float | None
    matrix_tflops: float | None
    power_w: float | None
    sm_clock_mhz: float | None
    sm_clock_min_mhz: float | None
    temperature_max_c: float | None
    peak_memory_gib: float | None
    reserved_memory_gib: float | None
    throttled: dict[str, float]


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: unique in the report: the run folder's or the log file's name, with as much of its path as it takes.
        path: the run folder or the log file.
        source: "run folder" or "log".
        state: completed, failed, killed, interrupted, running, submitted; of a log: completed, incomplete (it ends
            before its last step) or unknown.
        state_reason: the recorded reason of a failure.
        final: whether its numbers may be shown as results.
        why_not_final: the reasons in one line, where they may not.
        model: 70b, 8b, tiny, ...; None where nothing names it.
        precision: bf16, fp8, fp32.
        gpus: GPUs (processes, on CPU) of the job.
        nodes: number of nodes.
        gpu: the device's name in conf/gpu: h100, h200, cpu, ...
        gpu_reported: the device's own name, as the driver gave it ("NVIDIA H100 80GB HBM3").
        global_batch_size: sequences a step.
        seq_length: tokens a sequence.
        layout: parallel sizes by their short names: TP, PP, VP, CP, DP, MBS, GA.
        architecture: num_layers, hidden_size, ... (flops.Architecture), where it is known.
        version: the software's name under results/ ("nemo-2.7.3", "24.09").
        entrypoint: the program that trained (conf/entrypoint).
        container: the image that it ran in; None: bare on the machine, or not known.
        data: conf/data's name, "mock" being random tokens.
        identified: where each part of the identity comes from: field -> "run record", "path", "log", "command line".
        started_at: when it started.
        ended_at: when it ended.
        max_steps: steps it was meant to reach.
        steps: its steps; empty columns where none was recorded.
        times: statistics of the step times; None where there is none that counts.
        numbers: at the median step time; None unless `final`.
        numbers_last: at the last step's time, as the recipe computes them; None unless `final`.
        first_loss: of the first step.
        last_loss: mean of the last 5 steps.
        peak_memory_gib: largest allocation of a GPU, as far as it was logged.
        ranks: ranks beside each other; empty where the record does not tell them apart.
        command: the command line.
        overrides: what was chosen on it.
        git: {"revision": ..., "modified": ...} of this project.
        config: the composed configuration, nested; None for a log.
        packages: version of each package.
        hardware: host, cpu, cpu_cores, memory_gib, gpus, system, python, as the record has them.
        environment: environment variables, without secrets.
        profiles: where the time of profiled steps went, one a profiled rank.
        events: what happened beside the steps: {"event", "after_step" or None, "time" in seconds since 1970 or None}.
        warnings: what a reader should know about this run's record.
        devices: what each rank's device did; empty where nothing measured it.
    """

    name: str
    path: str
    source: str
    state: str
    state_reason: str | None
    final: bool
    why_not_final: str | None
    model: str | None
    precision: str | None
    gpus: int | None
    nodes: int | None
    gpu: str | None
    gpu_reported: str | None
    global_batch_size: int | None
    seq_length: int | None
    layout: dict[str, int]
    architecture: Architecture | None
    version: str | None
    entrypoint: str | None
    container: str | None
    data: str | None
    identified: dict[str, str]
    started_at: str | None
    ended_at: str | None
    max_steps: int | None
    steps: Steps
    times: StepTimes | None
    numbers: Numbers | None
    numbers_last: Numbers | None
    first_loss: float | None
    last_loss: float | None
    peak_memory_gib: float | None
    ranks: tuple[RankTimes, ...]
    command: str | None
    overrides: tuple[str, ...]
    git: dict[str, Any] | None
    config: dict[str, Any] | None
    packages: dict[str, str]
    hardware: dict[str, Any]
    environment: dict[str, str]
    events: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]
    devices: tuple[DeviceUse, ...] = ()
    profiles: tuple[StepProfile, ...] = ()


@dataclass(frozen=True)
class ReferencePoint:
    """A published number, as printed, with what follows from it.

    Attributes:
        reference: name of the table it stands in (`Reference.name`).
        model, precision, gpus, gpu, global_batch_size, seq_length: the configuration.
        step_time_s: printed; the statistic is the table's (`Reference.statistic`).
        tokens_per_s: printed throughput.
        mfu: printed MFU; None where none is printed.
        days_to_1t_tokens: printed.
        tokens_per_s_from_step_time: computed from the printed step time: what verdicts are held against.
        notes: contradictions in what was printed.
    """

    reference: str
    model: str
    precision: str
    gpus: int
    gpu: str
    global_batch_size: int
    seq_length: int
    step_time_s: float
    tokens_per_s: float
    mfu: float | None
    days_to_1t_tokens: float
    tokens_per_s_from_step_time: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Reference:
    """A published table.

    Attributes:
        name: what `reference=` chooses it by.
        title: for people.
        source: who published it, where.
        version: of the recipe and its container.
        date: of publication, as exactly as is known.
        hardware: what it was measured on.
        statistic: what the printed step times are ("last step").
        container: the image.
        layout: parallel sizes that all its points share, by their short names.
        data: what it trained on.
        notes: what is inconsistent in it, or missing.
        architecture: sizes of each model in it, by name.
        points: its rows.
    """

    name: str
    title: str
    source: str
    version: str
    date: str
    hardware: str
    statistic: str
    container: str
    layout: dict[str, int]
    data: str
    notes: tuple[str, ...]
    architecture: dict[str, dict[str, int]]
    points: tuple[ReferencePoint, ...]


@dataclass(frozen=True)
class Verdict:
    """A point held against a published number.

    Attributes:
        value: PASS, FAIL, FASTER THAN PUBLISHED, INCOMPLETE, NOT COMPARABLE or NO REFERENCE.
        ratio: measured tokens/s divided by the published ones (1: equal, 0.9: 10% slower); None where not judged.
        ratio_last: the same by the last steps' times, as the recipe reads them.
        tolerance: PASS lies between 1 - tolerance and 1 + tolerance.
        why: the verdict in a sentence.
        reasons: what is visible in the record that may explain a difference, or that a reader should know.
    """

    value: str
    ratio: float | None
    ratio_last: float | None
    tolerance: float
    why: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """Repeats of one configuration.

    Attributes:
        name: unique in the report: "70b bf16 64gpu", with what tells it from others of that name.
        model, precision, gpus, gpu, nodes, version, entrypoint, global_batch_size, seq_length, layout, data: see `Run`.
        runs: names of all its runs.
        final_runs: names of those that its numbers come from.
        numbers: at the mean of the final runs' median step times; None where no run is final.
        step_time_interval: confidence interval of that mean: over the repeats where there are two or more, else over
            the steps of the one run (which says nothing about the next run); None where too little was measured.
        reference: the published number; None where there is none.
        verdict: against it.
    """

    name: str
    model: str
    precision: str
    gpus: int
    gpu: str | None
    nodes: int | None
    version: str | None
    entrypoint: str | None
    global_batch_size: int | None
    seq_length: int | None
    layout: dict[str, int]
    data: str | None
    runs: tuple[str, ...]
    final_runs: tuple[str, ...]
    numbers: Numbers | None
    step_time_interval: Interval | None
    reference: ReferencePoint | None
    verdict: Verdict

    @property
    def pipeline_bubble(self) -> float | None:
        """The share of a step that the pipeline's bubble takes by the layout alone; None without a pipeline."""
        return bubble_of(self.layout)


def bubble_of(layout: dict[str, int]) -> float | None:
    """As `Point.pipeline_bubble`, of a layout by its short names."""
    if layout.get("PP", 1) == 1 or not layout.get("GA"):
        return None
    return pipeline_bubble(pipeline_stages=layout["PP"], virtual_stages=layout["VP"], micro_batches=layout["GA"])


@dataclass(frozen=True)
class ScalingCurve:
    """Throughput over the number of GPUs, of points that differ in nothing else.

    Attributes:
        label: "70b bf16 h100" and what else tells it from the others.
        model, precision, gpu: as in `Run`.
        published: whether it is a published table's.
        gpus: ascending.
        tokens_per_s: one a number of GPUs.
        efficiency: parallel efficiency: tokens/s a GPU divided by that of the fewest GPUs of the curve; 1 at the first.
    """

    label: str
    model: str
    precision: str
    gpu: str | None
    published: bool
    gpus: tuple[int, ...]
    tokens_per_s: tuple[float, ...]
    efficiency: tuple[float, ...]


@dataclass(frozen=True)
class Change:
    """What is called `key` is `before` in the baseline and `after` in the runs; None: not there."""

    key: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Comparison:
    """A point beside the baseline's point of the same model, precision and number of GPUs.

    Attributes:
        point: `Point.name` in `Report.points`.
        baseline: `Point.name` in `Report.baseline_points`.
        ratio: tokens/s divided by the baseline's (1: equal, 0.9: 10% slower); None where one has no numbers.
        low, high: 95% confidence interval of the ratio; None where the noise is not known.
        verdict: SLOWER, FASTER, NO DIFFERENCE (smaller than the noise) or UNDECIDED.
        regression: slower than the noise explains, and by more than the tolerance.
        why: the verdict in a sentence, with how the noise was estimated.
        configuration, packages, environment, hardware: what changed.
    """

    point: str
    baseline: str
    ratio: float | None
    low: float | None
    high: float | None
    verdict: str
    regression: bool
    why: str
    configuration: tuple[Change, ...]
    packages: tuple[Change, ...]
    environment: tuple[Change, ...]
    hardware: tuple[Change, ...]


@dataclass(frozen=True)
class Assumptions:
    """What was chosen: `tolerance` (fraction), `total_tokens`, `confidence` (0.95) and `references` (names)."""

    tolerance: float
    total_tokens: float
    confidence: float
    references: tuple[str, ...]


@dataclass(frozen=True)
class Method:
    """How one number is computed: its `name`, its `unit`, and the formula and its conventions in words (`how`)."""

    name: str
    unit: str
    how: str


@dataclass(frozen=True)
class Report:
    """Everything in `results.json`.

    Attributes:
        schema_version: 1.
        generated_at: when.
        generator: name and version of the program.
        inputs: what `runs=` named.
        verdict: of the whole: PASS, FAIL, INCOMPLETE or NO REFERENCE (none to judge).
        exit_code: what `report.py` ends with: 0, or 1 where a point fails, is incomplete or regressed.
        runs, points, references, scaling: see the module.
        baseline_inputs, baseline_runs, baseline_points, comparisons: empty without `baseline=`.
        assumptions, methods: what the numbers rest on.
        warnings: what could not be read, and what was left out.
    """

    schema_version: int
    generated_at: str
    generator: str
    inputs: tuple[str, ...]
    verdict: str
    exit_code: int
    runs: tuple[Run, ...]
    points: tuple[Point, ...]
    references: tuple[Reference, ...]
    scaling: tuple[ScalingCurve, ...]
    baseline_inputs: tuple[str, ...]
    baseline_runs: tuple[Run, ...]
    baseline_points: tuple[Point, ...]
    comparisons: tuple[Comparison, ...]
    assumptions: Assumptions
    methods: tuple[Method, ...]
    warnings: tuple[str, ...]


def to_json(report: Report) -> str:
    """The report as the text of `results.json`."""
    return json.dumps(_plain(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str) -> Report:
    """The report that `to_json` wrote.

    Raises:
        BenchError: it is no report, or one of another schema version.
    """
    try:
        content = json.loads(text)
        version = content["schema_version"]
    except (ValueError, TypeError, KeyError):
        raise BenchError("this is no results.json of report.py") from None
    if version != SCHEMA_VERSION:
        raise BenchError(
            f"results.json has schema version {version}, and this program reads version {SCHEMA_VERSION}: "
            "make the report anew with python report.py runs=..."
        )
    try:
        report = _typed(content, Report)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BenchError(f"results.json is damaged ({type(error).__name__}: {error})") from None
    assert isinstance(report, Report)
    return report


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _typed(value: Any, kind: Any) -> Any:
    """The value of JSON as an object of type `kind`."""
    if kind is Any or value is None:
        return value
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):  # only `X | None` is used
        return _typed(value, next(item for item in get_args(kind) if item is not type(None)))
    if origin is tuple:
        return tuple(_typed(item, get_args(kind)[0]) for item in value)
    if origin is dict:
        return {key: _typed(item, get_args(kind)[1]) for key, item in value.items()}
    if is_dataclass(kind) and isinstance(kind, type):
        # A field with a default was added after reports had been written without it.
        known = [field.name for field in fields(kind) if field.name in value or field.default is MISSING]
        return kind(**{name: _typed(value[name], _hints(kind)[name]) for name in known})
    return float(value) if kind is float else value
