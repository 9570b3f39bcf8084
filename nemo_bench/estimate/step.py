"""The estimate of a point: a step's time and what makes it up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_bench.config import TrainConfig
from nemo_bench.estimate.data_parallel import DataParallel
from nemo_bench.estimate.layer import COMMUNICATION, KERNELS, Layer, head_times, pass_ms, slowest_of
from nemo_bench.estimate.network import Network
from nemo_bench.estimate.rates import Rates, constant, load_rates, piecewise
from nemo_bench.estimate.schedule import Pipeline, Timeline
from nemo_bench.pipeline import layers_of_chunks

# The power that a GPU has left follows from the share of the step that it works in, and the other way round.
_ROUNDS = 3
_CONVERGED = 3e-4
_HEAD = "embedding, output layer, loss"


@dataclass(frozen=True)
class Estimate:
    """What a point should take."""

    step_time_s: float
    error: float  # half of the range that the errors of published rows give, as a share
    breakdown_s: dict[str, float]  # sums to the step time
    critical_stage: int  # whose work the breakdown is
    layer_gpu_ms: float  # a layer's forward and backward pass
    layer_host_ms: float | None  # what the host needs to launch them; None: with CUDA graphs
    measured_shape: bool  # else the layer's rates are interpolated
    rates: Rates
    timeline: Timeline

    @property
    def host_is_limit(self) -> bool:
        """Whether launching the kernels takes longer than the kernels."""
        return self.layer_host_ms is not None and self.layer_host_ms > self.layer_gpu_ms


def estimate_of(cfg: TrainConfig) -> Estimate:
    """Return the estimate of a point whose layout has passed the checks; BenchError for a GPU without rates."""
    return _Point(cfg).estimate()


def bound_s(cfg: TrainConfig) -> float:
    """Return a step's time by the busiest stage and the bubble of equal stages, without a schedule: to rank layouts."""
    point = _Point(cfg)
    pipeline = point.pipeline([1.0] * point.stages)
    busiest = max(pipeline.busy_ms(stage) for stage in range(point.stages))
    waiting = (pipeline.stages - 1) / pipeline.chunks / pipeline.micro_batches
    return (busiest * (1 + waiting) + point.data_parallel.optimizer_ms()) / 1e3


class _Point:
    """A configuration, and all that its estimate is made of."""

    def __init__(self, cfg: TrainConfig) -> None:
        m, rates = cfg.model, load_rates(cfg.gpu.name, cfg.gpu.matrix_tflops)
        network = Network(cfg, rates)
        layer = Layer(cfg, rates, network)
        self.cfg, self.rates, self.shape = cfg, rates, layer.shape
        self.number, self.layers = cfg.num_micro_batches, layers_of_chunks(m)
        self.stages, self.lag = len(self.layers), constant("gpu_spread") * slowest_of(cfg.world_size)
        if cfg.gpu.matrix_tflops and cfg.gpu.slowest_matrix_tflops:
            self.lag = cfg.gpu.matrix_tflops / cfg.gpu.slowest_matrix_tflops - 1
        self.passes = layer.times(self.lag)
        self.head = head_times(cfg, rates, network, self.shape.tokens)
        self.data_parallel = DataParallel(cfg, rates, network, self.layers)
        stride = cfg.world_size // self.stages  # between neighbours in the pipeline
        self.amax = network.amax_ms(stride) if self.shape.precision == "fp8" else 0.0
        sent = self.shape.tokens * m.hidden_size * 2 / (m.tensor_model_parallel_size if m.sequence_parallel else 1)
        self.p2p = network.p2p_ms(sent, stride) if self.stages > 1 else 0.0

    def estimate(self) -> Estimate:
        curve, following = self.rates.tables["power"][self.shape.number_format], [1.0] * self.stages
        for _ in range(_ROUNDS):
            speed = following  # of kernels, over their time at the power limit: less where GPUs idle
            timeline = self.pipeline(speed).run()
            end_ms, host_ms = self.data_parallel.step_end_ms(timeline), constant("step_idle_ms")
            behind = sum(end_ms.values())
            work = [self._work_ms(stage, speed[stage]) for stage in range(self.stages)]
            busy = [(sum(parts.values()) + behind) / (timeline.end_ms + behind + host_ms) for parts in work]
            following = [piecewise(curve, share) for share in busy]
            if max(abs(a - b) for a, b in zip(following, speed)) < _CONVERGED:
                break
        stage = max(range(self.stages), key=timeline.pipeline.busy_ms)
        breakdown = work[stage]
        breakdown[_HEAD] += self.number * (2 * (stage == 0) + (stage == self.stages - 1)) * self.head["exchange"]
        breakdown["fp8 scaling factors"] = 2 * self.number * len(self.layers[stage]) * self.amax
        # A sum of differences in floating point: without a pipeline it is nothing, or a little less.
        breakdown["pipeline bubble and p2p"] = max(0.0, timeline.end_ms - sum(breakdown.values()))
        breakdown |= {**end_ms, "host": host_ms}
        key, table = (self.shape.precision, min(self.shape.context_parallel, 2)), self.rates.tables["host_ms_a_layer"]
        launch_ms = next(row["ms"] for row in table if (row["precision"], row["context_parallel"]) == key)
        return Estimate(
            step_time_s=sum(breakdown.values()) / 1e3,
            error=constant("error")[self.shape.number_format],
            breakdown_s={name: ms / 1e3 for name, ms in breakdown.items()},
            critical_stage=stage,
            layer_gpu_ms=sum(pass_ms(time, speed[stage]) for time in self.passes),
            layer_host_ms=launch_ms if self.cfg.model.cuda_graph_impl == "none" else None,
            measured_shape=self.shape in self.rates.layers,
            rates=self.rates,
            timeline=timeline,
        )

    def pipeline(self, speed: Sequence[float]) -> Pipeline:
        slow, head, m = [factor * (1 + self.lag) for factor in speed], self.head, self.cfg.model
        forward, backward = (
            [[n * pass_ms(time, factor) + self.amax for n in chunks] for factor, chunks in zip(slow, self.layers)]
            for time in self.passes
        )
        forward[0][0] += head["embedding_forward"] * slow[0] + head["exchange"]
        backward[0][0] += head["embedding_backward"] * slow[0] + head["exchange"]
        forward[-1][-1] += head["forward"] * slow[-1] + head["exchange"]
        backward[-1][-1] += head["backward"] * slow[-1]
        deferred = min(m.wgrad_deferral_limit or self.number, self.number) if self.cfg.defers_embedding_wgrad else 0
        sizes = self.stages, len(self.layers[0]), self.number
        return Pipeline(*sizes, forward, backward, self.p2p, deferred, head["weight_gradient"] * slow[-1])

    def _work_ms(self, stage: int, speed: float) -> dict[str, float]:
        """Return what draws power in a stage's passes of a step; the slowest GPU's lag counts as waits of others."""
        layers, head = sum(self.layers[stage]), self.head
        parts = {name: self.number * layers * sum(time[name] for time in self.passes) for name in self.passes[0]}
        ends = (head["embedding_forward"] + head["embedding_backward"]) * (stage == 0)
        ends += (head["forward"] + head["backward"]) * (stage == self.stages - 1)
        kernels = {name: parts[name] * speed for name in KERNELS} | {_HEAD: self.number * ends * speed}
        communication = {name: parts[name] for name in COMMUNICATION}
        communication["waits in lockstep"] += sum(kernels.values()) * self.lag
        return kernels | communication
