"""What a report is made of, and `results.json`: the same objects, field by field, as JSON.

Times are in seconds (`_s`), fractions are 0 to 1, moments ISO 8601 in UTC, memory is in GiB (2^30 bytes), rates of a
GPU are in TFLOP/s. None (null) means "not known" or "does not apply".
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_bench.flops import Architecture
from nemo_bench.report.profile import StepProfile
from nemo_bench.report.references import Reference, ReferencePoint
from nemo_bench.report.statistics import Mean, Steps, StepTimes

SCHEMA_VERSION = 4  # rises when a field changes its meaning or goes away

# Verdicts of a point against a published number.
PASS = "PASS"
FAIL = "FAIL"
FASTER = "FASTER"  # by more than the tolerance: also worth a look
UNDECIDED = "UNDECIDED"  # the interval is wider than the tolerance, or mean, median and last step disagree
INVALID = "INVALID"  # its numbers cannot be right: NaN gradients, more than the GPU can do, a contradiction
INCOMPLETE = "INCOMPLETE"  # no run of it has finished
NOT_COMPARABLE = "NOT COMPARABLE"  # it differs from the published run in what must agree, or that is not known
NO_REFERENCE = "NO REFERENCE"
SUCCESSES = (PASS, FASTER, NO_REFERENCE)  # report.py ends with 0 where every point has one of these

# Verdicts of a comparison with a baseline; also FASTER, and UNDECIDED where too little was measured to know the noise.
SLOWER = "SLOWER"
NO_DIFFERENCE = "NO DIFFERENCE"  # smaller than the noise


@dataclass(frozen=True)
class Numbers:
    """What follows from one step time."""

    step_time_s: float
    tokens_per_s: float  # of the whole job: sequence length * global batch size / step time
    tokens_per_s_per_gpu: float  # a GPU, or a process on CPU
    tflops_per_gpu: float | None  # model TFLOP/s, the recipe's convention (attention in full)
    tflops_per_gpu_causal: float | None  # attention counted causally (Megatron-LM's convention)
    peak_tflops: float | None  # dense peak of one GPU in the run's number format
    peak_source: str | None
    mfu: float | None  # the recipe's: tflops_per_gpu / peak_tflops
    mfu_causal: float | None
    total_tokens: float  # the budget behind days_to_train
    days_to_train: float

    def at(self, step_time_s: float) -> Numbers:
        """Return the same at another step time."""
        names = ("tokens_per_s", "tokens_per_s_per_gpu", "tflops_per_gpu", "tflops_per_gpu_causal", "mfu", "mfu_causal")
        scale = self.step_time_s / step_time_s
        scaled: dict[str, Any] = {name: (getattr(self, name) or 0) * scale or None for name in names}
        return replace(self, step_time_s=step_time_s, days_to_train=self.days_to_train / scale, **scaled)


@dataclass(frozen=True)
class RankTimes:
    """What one rank did compared with the others, where the record or the log tells the ranks apart."""

    rank: int  # global
    measure: str  # "step time (s)" or "matrix rate (TFLOP/s)"
    value: float  # its median over the run
    others: float  # the median of the other ranks
    slower: float  # than that median, as a fraction (0.2: 20% slower; negative: faster)
    straggler: bool  # slower by more than the others' spread explains


@dataclass(frozen=True)
class DeviceUse:
    """What one rank's device did over its steps, without the first few; None for what was not measured."""

    rank: int  # global
    steps: int  # that the numbers are of
    host: str | None = None
    step_time_median_s: float | None = None  # as this rank saw it; ranks that wait for each other see nearly the same
    own_time_s: float | None = None  # median of a step's time in which it did not wait for other ranks
    matrix_tflops: float | None = None  # rate of a bf16 matrix product of this GPU alone, before the training
    power_w: float | None = None  # mean over the steps
    sm_clock_mhz: float | None = None  # mean over the steps
    sm_clock_min_mhz: float | None = None
    temperature_max_c: float | None = None
    peak_memory_gib: float | None = None
    # Share of the steps in which the driver named each reason to hold clocks back (sw_power_cap, hw_slowdown, ...).
    throttled: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """What a run folder says beside its steps, without secrets; empty for a bare log."""

    started_at: str | None = None
    ended_at: str | None = None
    command: str | None = None  # the command line
    overrides: tuple[str, ...] = ()  # what was chosen on it
    git: dict[str, Any] | None = None  # {"revision": ..., "modified": ...} of this project
    config: dict[str, Any] | None = None  # the composed configuration, nested
    packages: dict[str, str] = field(default_factory=dict)  # package -> version
    hardware: dict[str, Any] = field(default_factory=dict)  # host, cpu, cpu_cores, memory_gib, gpus, system, python
    environment: dict[str, str] = field(default_factory=dict)
    # What happened beside the steps: {"event", "after_step" or None, "time" in seconds since 1970 or None}.
    events: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What was run; None where nothing tells."""

    model: str | None = None  # 70b, 8b, tiny, ...
    precision: str | None = None  # bf16, fp8, fp32
    gpus: int | None = None  # GPUs (processes, on CPU) of the job
    nodes: int | None = None
    gpu: str | None = None  # the device's name in conf/gpu: h100, h200, cpu, ...
    global_batch_size: int | None = None  # sequences a step
    seq_length: int | None = None  # tokens a sequence
    layout: dict[str, int] = field(default_factory=dict)  # parallel sizes: TP, PP, VP, CP, DP, MBS, GA
    software: str | None = None  # what trained, by the record: "nemo-2.7.3", "24.09"
    entrypoint: str | None = None  # the program that trained (conf/entrypoint)
    data: str | None = None  # conf/data's name; "mock" is random tokens


@dataclass(frozen=True, kw_only=True)
class Run(Identity):
    """One run: a run folder, or one log file of anybody's run."""

    name: str  # unique in the report: the folder's or the file's name, with as much of its path as it takes
    path: str
    source: str  # "run folder" or "log"
    # completed, failed, killed, interrupted, running, submitted; of a log: completed, incomplete or unknown
    state: str = "unknown"
    why_not_final: str | None = None  # why its numbers may not be shown as results; None: they may
    invalid: str | None = None  # why its numbers cannot be right; part of why_not_final
    gpu_reported: str | None = None  # the driver's name of it: "NVIDIA H100 80GB HBM3"; all, where a node has several
    architecture: Architecture | None = None  # the model's sizes
    version: str | None = None  # the folder's name under results/ ("nemo-2.7.3", "24.09"), which anybody may choose
    container: str | None = None  # the image that it ran in; None: bare on the machine, or not known
    identified: dict[str, str] = field(default_factory=dict)  # field -> "run record", "path", "log", "command line"
    # what it did
    max_steps: int | None = None  # steps it was meant to reach
    steps: Steps = field(default_factory=Steps)
    times: StepTimes | None = None  # of the steps that count; None where there is none
    numbers: Numbers | None = None  # at the mean step time; None unless final
    first_loss: float | None = None
    last_loss: float | None = None  # mean of the last 5 steps
    peak_memory_gib: float | None = None  # largest allocation of a GPU, as far as it was logged
    ranks: tuple[RankTimes, ...] = ()
    devices: tuple[DeviceUse, ...] = ()
    profiles: tuple[StepProfile, ...] = ()  # where the time of profiled steps went, one a profiled rank
    record: Record = field(default_factory=Record)
    remarks: tuple[str, ...] = ()  # what a reader of its verdict should know
    warnings: tuple[str, ...] = ()  # what a reader of its record should know

    @property
    def final(self) -> bool:
        return self.why_not_final is None

    @property
    def unit(self) -> str:
        """What one of its `gpus` is."""
        return "process" if self.gpu == "cpu" else "GPU"

    @property
    def identity_known(self) -> bool:
        return None not in (self.model, self.precision, self.gpus)

    @property
    def point(self) -> str:
        return point_name(self.model, self.precision, self.gpus, self.record.overrides)


# Keys of the configuration that no step time depends on; of `cluster`, all but the environment and the container.
BESIDE_PERFORMANCE = re.compile(
    r"(stage_path|results_version|total_tokens|launch|repeats|logger\.kind|cluster|hydra[./].*|checkpoint\..*"
    r"|cluster\.(?!env\.|container\.image|srun_args|setup).*|trainer\.(max_steps|seed|limit_val_batches)"
    r"|data\.(folder|paths|tokenizer)|gpu\.source|entrypoint\.(container|image|version))$"
)
_SAID_BY_THE_NAME = ("model", "precision", "scale", "experiment", "trainer.num_nodes", "trainer.devices")
SHORT_NAMES = {
    "tensor_model_parallel_size": "TP",
    "pipeline_model_parallel_size": "PP",
    "virtual_pipeline_model_parallel_size": "VP",
    "context_parallel_size": "CP",
    "micro_batch_size": "MBS",
    "global_batch_size": "GBS",
}


def point_name(model: str | None, precision: str | None, gpus: int | None, overrides: Sequence[str] = ()) -> str:
    """Return `70b fp8 64gpu` and what else was chosen for it: the same name in every report and listing."""
    chosen = dict(override.lstrip("+~").partition("=")[::2] for override in overrides)
    texts = []
    for key, value in chosen.items():
        if key not in _SAID_BY_THE_NAME and not BESIDE_PERFORMANCE.match(key):
            name = key.rpartition(".")[2]
            size = "1" if value == "null" else value
            texts.append(f"{SHORT_NAMES[name]}{size}" if name in SHORT_NAMES else f"{name}={value}")
    return " ".join([f"{model} {precision} {gpus}gpu", *texts])


def flatten(config: Any, prefix: str = "") -> dict[str, str]:
    """Return a nested configuration as dotted keys with their values as text."""
    if not isinstance(config, dict) or (prefix and not config):
        return {prefix: "null" if config is None else str(config)}
    texts: dict[str, str] = {}
    for name, item in config.items():
        texts |= flatten(item, f"{prefix}.{name}" if prefix else str(name))
    return texts


@dataclass(frozen=True)
class Change:
    """What is called `key` is `before` in a published run or a baseline, and `after` in the runs; None: not known."""

    key: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Verdict:
    """A point judged by a published number."""

    value: str = NO_REFERENCE
    why: str = "nothing is published for it"  # the verdict in a sentence
    ratio: float | None = None  # published step time / the measured one (1: equal, 0.9: 10% slower); None: not judged
    statistic: str | None = None  # the step time that was judged: the reference's own ("last step", ...), else the mean
    must_agree: tuple[Change, ...] = ()  # what makes it comparable: what was published, and what was run
    differences: tuple[str, ...] = ()  # from the published run, which leave the verdict standing
    remarks: tuple[str, ...] = ()  # what the record shows that may explain it, or that a reader should know

    @property
    def text(self) -> str:
        """The verdict in a table's cell: "PASS, 3 differences"."""
        number = len(self.differences)
        judged = self.value in (PASS, FAIL, FASTER, UNDECIDED)
        return f"{self.value}, {number} difference{'s'[: number > 1]}" if judged and number else self.value

    @property
    def line(self) -> str:
        """The verdict in a line, with its reason and the differences."""
        return f"{self.text}: {'; '.join((self.why, *self.differences))}"


@dataclass(frozen=True, kw_only=True)
class Point(Identity):
    """Repeats of one configuration on one number of GPUs."""

    name: str  # `point_name`; where two points of a report share it, the second is called "... #2"
    runs: tuple[str, ...]  # names of all its runs
    final_runs: tuple[str, ...]  # names of those that its numbers come from
    numbers: Numbers | None = None  # at the mean of the final runs' mean step times; None where no run is final
    # Over the repeats, or over the steps of a single run, which says nothing about the next; None: too few steps.
    step_time: Mean | None = None
    median_s: float | None = None  # mean of the final runs' medians
    last_s: float | None = None  # mean of the final runs' last steps
    reference: ReferencePoint | None = None  # the published number
    estimate_s: float | None = None  # step time by estimate.py; None: no rates of its GPU, or no configuration recorded
    verdict: Verdict = field(default_factory=Verdict)


@dataclass(frozen=True)
class ScalingCurve:
    """Throughput over the number of GPUs, of points that differ in nothing else."""

    label: str  # "70b bf16 h100" and what else tells it from the others
    model: str | None
    published: bool
    gpus: tuple[int, ...]  # ascending
    tokens_per_s: tuple[float, ...]  # one a number of GPUs
    efficiency: tuple[float, ...]  # tokens/s a GPU over that of the fewest GPUs of the curve; 1 at the first


@dataclass(frozen=True)
class Comparison:
    """A point beside the baseline's point of the same model, precision and number of GPUs."""

    point: str  # `Point.name` in `Report.points`
    baseline: str  # `Point.name` in `Report.baseline_points`
    ratio: float | None  # tokens/s over the baseline's (1: equal, 0.9: 10% slower); None where one has no numbers
    interval: tuple[float, float] | None  # 95% confidence interval of the ratio; None where the noise is not known
    verdict: str  # SLOWER, FASTER, NO DIFFERENCE or UNDECIDED
    regression: bool  # slower than the noise explains, and by more than the tolerance
    why: str  # the verdict in a sentence, with how the noise was estimated
    changes: dict[str, tuple[Change, ...]]  # what changed, by kind: configuration, packages, environment, hardware


@dataclass(frozen=True)
class Term:
    """A part of a step, or what no evidence explains of it; None: not known."""

    name: str  # of the estimate's terms, several where the evidence cannot tell them apart
    expected_s: float | None
    measured_s: float | None = None
    evidence: str = "no evidence"

    @property
    def more_s(self) -> float:
        """What is known to have taken longer than expected."""
        return 0.0 if self.expected_s is None or self.measured_s is None else self.measured_s - self.expected_s


@dataclass(frozen=True)
class Attribution:
    """The way from an expected step time to the measured one: their difference is what the terms took more."""

    point: str  # `Point.name`
    source: str  # "published" or "estimate", or the baseline's point
    expected_s: float
    measured_s: float
    terms: tuple[Term, ...]  # the last: unexplained
    findings: tuple[str, ...]  # what else the evidence says

    @property
    def summary(self) -> str:
        """The way in a line: the largest differences, and the rest."""
        *known, rest = self.terms
        known = sorted((term for term in known if term.more_s), key=lambda term: -abs(term.more_s))
        parts = [f"{term.name} {1e3 * term.more_s:+,.0f} ms" for term in (*known[:4], rest)]
        head = f"{self.measured_s / self.expected_s - 1:+.1%} on {self.expected_s:.4g} s"
        return f"{head}: {', '.join(parts)} ({rest.evidence})"


@dataclass(frozen=True)
class Report:
    """Everything in `results.json`."""

    generated_at: str
    inputs: tuple[str, ...]  # what `runs=` named
    verdict: str  # of the whole: the gravest of its points'
    exit_code: int  # what `report.py` ends with: 1 where there are failures
    failures: tuple[str, ...]  # points with another verdict than SUCCESSES or regressed; what is not known enough
    runs: tuple[Run, ...]  # all that was read, good and bad
    points: tuple[Point, ...]
    references: tuple[Reference, ...]
    scaling: tuple[ScalingCurve, ...]  # measured and published
    tolerance: float  # of a verdict, as a fraction
    total_tokens: float  # the budget behind days to train
    warnings: tuple[str, ...] = ()  # what could not be read, and what was left out
    attributions: tuple[Attribution, ...] = ()  # where the seconds of measured points went
    machine_checks: tuple[str, ...] = ()  # the last of each cluster in the runs' stage folders
    # with `baseline=` only
    baseline_inputs: tuple[str, ...] = ()
    baseline_runs: tuple[Run, ...] = ()
    baseline_points: tuple[Point, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    schema_version: int = SCHEMA_VERSION


def to_json(report: Report) -> str:
    """Return the report as strict JSON: a number that is not finite is the string "NaN", "Infinity" or "-Infinity"."""
    plain = json.loads(json.dumps(report, default=vars), parse_constant=str)
    return json.dumps(plain, indent=1, ensure_ascii=False) + "\n"
