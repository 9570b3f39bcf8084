"""How each number of a report is computed: a table of words, for whoever shows one."""

from __future__ import annotations

from typing import NamedTuple

from nemo_bench.report.numbers import LAST_LOSSES
from nemo_bench.report.statistics import MIN_STEADY_STEPS


class Method(NamedTuple):
    """How one number is computed, in words."""

    name: str
    unit: str
    how: str


METHODS = (
    Method(
        "step time",
        "s",
        "train_step_timing as the program logs it, synchronised with the device; the mean of the steps that count. "
        "The median and the last step, which the recipe reads, are shown with it.",
    ),
    Method(
        "steps that count",
        "",
        "Left out are the warm-up (leading steps before the first within three spreads, and never less than 2%, of the "
        "second half's median: at most a fifth of all; the same after a restart), the step after a validation, a "
        "checkpoint or a profile, and steps at another global batch size. "
        f"Fewer than {MIN_STEADY_STEPS} steps are no result.",
    ),
    Method("spread", "", "from the 5% to the 95% quantile of the steps that count"),
    Method(
        "confidence interval",
        "s",
        "95%, Student's t. Of several repeats: over their means. Of one run: over the means of about sqrt(n) batches "
        "of about sqrt(n) consecutive steps, since neighbouring steps depend on each other; it says nothing about how "
        "runs differ.",
    ),
    Method("tokens/s", "1/s", "sequence length x global batch size / mean step time"),
    Method(
        "model FLOPs",
        "",
        "a sequence, forward and backward: S (12 L h^2 (1 + g/a + S/h) + 18 L f h + 6 V h), the recipe's convention "
        "(S tokens, L layers, h hidden size, f FFN size, a heads, g query groups, V vocabulary): 3.94e15 for the 70B "
        "at 8192. The causal convention (Megatron-LM's) halves the attention core S/h: the recipe's is 7.2% more.",
    ),
    Method("TFLOP/s a GPU", "TFLOP/s", "global batch size x model FLOPs / step time / GPUs / 1e12"),
    Method("MFU", "", "TFLOP/s a GPU / dense peak of the GPU in the run's number format, which is named beside it"),
    Method(
        "pipeline bubble",
        "of a step",
        "((PP - 1) / VP) / (GA + (PP - 1) / VP), GA micro-batches for each copy of the model: what the layout leaves "
        "idle where all stages have equal work (Narayanan et al. 2021)",
    ),
    Method("days to train", "days", "tokens / (tokens/s) / 86400"),
    Method("last loss", "", f"mean of the last {LAST_LOSSES} steps"),
    Method(
        "verdict",
        "",
        "Published step time / measured step time, by the published table's own statistic: PASS within the tolerance "
        "of 1, FAIL below, FASTER above. It takes the same model sizes, GPUs, precision, sequence length and batch as "
        "published, else NOT COMPARABLE; layout, software, data and environment may differ, and are named. UNDECIDED "
        "where mean, median and last step disagree, the mean exceeds the median or the interval the mean by more than "
        "the tolerance, or more than a fifth of the steps would be warm-up. INVALID where the numbers cannot be right.",
    ),
    Method(
        "comparison",
        "",
        "ratio of tokens/s with Welch's 95% interval: SLOWER or FASTER where that leaves out 1, else NO DIFFERENCE. "
        "The noise is how the repeats of a point differ, pooled over all points of the model that were repeated; where "
        "none was, it comes from the steps of the runs.",
    ),
    Method("parallel efficiency", "", "tokens/s a GPU / tokens/s a GPU at the fewest GPUs of the curve"),
)
