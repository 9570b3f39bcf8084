"""The estimate of a point: a step's time and what makes it up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_bench.config import TrainConfig
from nemo_bench.estimate.data_parallel import DataParallel, StepEnd
from nemo_bench.estimate.layer import HeadTime, LayerTime, head_time, layer_times
from nemo_bench.estimate.network import Network
from nemo_bench.estimate.rates import Rates, constant, layer_shape, load_rates, piecewise
from nemo_bench.estimate.schedule import Pipeline, Timeline
from nemo_bench.estimate.tensor_parallel import slowest_of

# The power that a GPU has left follows from the share of the step that it works in, and the other way round.
_ROUNDS = 3
_CONVERGED = 3e-4


@dataclass(frozen=True)
class Estimate:
    """What a point should take."""

    step_time_s: float
    low_s: float  # the range that the errors of published rows give
    high_s: float
    breakdown_s: dict[str, float]  # sums to the step time
    critical_stage: int  # whose work the breakdown is
    stage_busy: tuple[float, ...]  # share of the step in which each stage works
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
    """Return the estimate of a point whose layout has passed the checks.

    Raises:
        BenchError: the rates of its GPU kind were never measured.
    """
    return _Point(cfg, load_rates(cfg.gpu.name)).estimate()


def bound_s(cfg: TrainConfig) -> float:
    """Return a step's time by the busiest stage and the bubble of equal stages, without a schedule: to rank layouts."""
    point = _Point(cfg, load_rates(cfg.gpu.name))
    pipeline = point.pipeline([1.0] * point.stages)
    busiest = max(pipeline.busy_ms(stage) for stage in range(point.stages))
    waiting = (pipeline.stages - 1) / pipeline.chunks / pipeline.micro_batches
    return (busiest * (1 + waiting) + point.data_parallel.optimizer_ms()) / 1e3


def layers_of_chunks(cfg: TrainConfig) -> list[list[float]]:
    """Return the number of layers by stage and chunk."""
    m = cfg.model
    stages, chunks = m.pipeline_model_parallel_size, m.virtual_pipeline_model_parallel_size or 1
    first = getattr(m, "account_for_embedding_in_pipeline_split", False)
    last = getattr(m, "account_for_loss_in_pipeline_split", False)
    each = (m.num_layers + first + last) / (stages * chunks)
    layers = [[each] * chunks for _ in range(stages)]
    layers[0][0] -= first
    layers[-1][-1] -= last
    return layers


class _Point:
    """A configuration, and all that its estimate is made of."""

    def __init__(self, cfg: TrainConfig, rates: Rates) -> None:
        self.cfg, self.rates, self.network = cfg, rates, Network.of(cfg)
        self.lag: float = constant("gpu_spread") * slowest_of(cfg.world_size)
        self.layers = layers_of_chunks(cfg)
        shape = layer_shape(cfg)
        self.rate = rates.layer(shape)
        self.forward, self.backward = layer_times(cfg, rates, self.rate, self.network, self.lag)
        self.head = head_time(cfg, rates, self.network, shape.tokens)
        self.data_parallel = DataParallel(cfg, rates, self.network, self.layers)
        self.amax = 0.0
        if shape.precision == "fp8":
            self.amax = self.network.amax_ms(cfg.world_size // cfg.model.pipeline_model_parallel_size)
        m, micro_batches = cfg.model, cfg.num_micro_batches
        limit = m.wgrad_deferral_limit or micro_batches
        self.deferred = min(limit, micro_batches) if cfg.defers_embedding_wgrad else 0
        stride = cfg.world_size // m.pipeline_model_parallel_size
        size = shape.tokens * m.hidden_size * 2 / (m.tensor_model_parallel_size if m.sequence_parallel else 1)
        self.p2p = self.network.p2p_ms(size, stride) if m.pipeline_model_parallel_size > 1 else 0.0

    @property
    def stages(self) -> int:
        return len(self.layers)

    def estimate(self) -> Estimate:
        speed = [1.0] * self.stages  # of kernels, over their time at the power limit: less where GPUs idle
        for number in range(_ROUNDS):
            timeline = self.pipeline(speed).run()
            end = self.data_parallel.step_end(timeline)
            step = timeline.end_ms + end.total + constant("step_idle_ms")
            busy = [(self._working_ms(stage, speed[stage]) + end.total) / step for stage in range(self.stages)]
            curve = self.rates.tables["power"]["fp8" if self.cfg.precision.fp8 else "bf16"]
            following = [piecewise(curve, share) for share in busy]
            if number == _ROUNDS - 1 or max(abs(a - b) for a, b in zip(following, speed)) < _CONVERGED:
                break
            speed = following
        return self._result(timeline, end, speed, busy)

    def pipeline(self, speed: Sequence[float]) -> Pipeline:
        chunks = len(self.layers[0])
        forward = [[self._pass_ms(self.forward, s, c, speed[s]) for c in range(chunks)] for s in range(self.stages)]
        backward = [[self._pass_ms(self.backward, s, c, speed[s]) for c in range(chunks)] for s in range(self.stages)]
        forward[0][0] += self._embedding(self.head.embedding_forward, speed[0])
        backward[0][0] += self._embedding(self.head.embedding_backward, speed[0])
        forward[-1][-1] += self._output(self.head.forward, speed[-1]) + self.head.exchange
        backward[-1][-1] += self._output(self.head.backward, speed[-1])
        return Pipeline(
            self.stages,
            chunks,
            self.cfg.num_micro_batches,
            forward,
            backward,
            self.p2p,
            self.deferred,
            self._output(self.head.weight_gradient, speed[-1]),
        )

    def _pass_ms(self, time: LayerTime, stage: int, chunk: int, speed: float) -> float:
        return self.layers[stage][chunk] * (time.kernels * speed * (1 + self.lag) + time.communication) + self.amax

    def _embedding(self, time_ms: float, speed: float) -> float:
        return time_ms * speed * (1 + self.lag) + self.head.exchange

    def _output(self, time_ms: float, speed: float) -> float:
        return time_ms * speed * (1 + self.lag)

    def _head_ms(self, stage: int) -> float:
        """Return the work of the model's ends on a stage, in one micro-batch."""
        head, total = self.head, 0.0
        if stage == 0:
            total += head.embedding_forward + head.embedding_backward
        if stage == self.stages - 1:
            total += head.forward + head.backward
        return total

    def _working_ms(self, stage: int, speed: float) -> float:
        """Return how long a stage's passes draw power: collectives and waits in lockstep leave none to spare."""
        layers = sum(self.layers[stage])
        kernels = layers * (self.forward.kernels + self.backward.kernels) + self._head_ms(stage)
        communication = layers * (self.forward.communication + self.backward.communication)
        return self.cfg.num_micro_batches * (kernels * speed * (1 + self.lag) + communication)

    def _result(self, timeline: Timeline, end: StepEnd, speed: Sequence[float], busy: Sequence[float]) -> Estimate:
        stage = max(range(self.stages), key=timeline.pipeline.busy_ms)
        breakdown = self._breakdown(stage, speed[stage])
        # A sum of differences in floating point: without a pipeline it is nothing, or a little less.
        breakdown["pipeline bubble and p2p"] = max(0.0, timeline.end_ms - sum(breakdown.values()))
        breakdown |= {
            "gradient reduction": end.reduction,
            "parameter gathering": end.gathering,
            "optimizer": end.optimizer,
            "host": constant("step_idle_ms"),
        }
        step_s = sum(breakdown.values()) / 1e3
        error = constant("error")["fp8" if self.cfg.precision.fp8 else "bf16"]
        layer = [time.kernels * speed[stage] + time.communication for time in (self.forward, self.backward)]
        return Estimate(
            step_time_s=step_s,
            low_s=step_s * (1 - error),
            high_s=step_s * (1 + error),
            breakdown_s={name: ms / 1e3 for name, ms in breakdown.items()},
            critical_stage=stage,
            stage_busy=tuple(busy),
            layer_gpu_ms=sum(layer),
            layer_host_ms=self._host_ms(),
            measured_shape=self.rate.measured,
            rates=self.rates,
            timeline=timeline,
        )

    def _breakdown(self, stage: int, speed: float) -> dict[str, float]:
        """Return a stage's work in a step (ms); the slowest GPU's lag counts as waits, since all others wait for it."""
        number = self.cfg.num_micro_batches
        passes = number * sum(self.layers[stage])

        def of_layers(name: str) -> float:
            return passes * float(getattr(self.forward, name) + getattr(self.backward, name))

        head: HeadTime = self.head
        exchanges = 2 * (stage == 0) + (stage == self.stages - 1)
        kernels = of_layers("kernels") + number * self._head_ms(stage)
        return {
            "matrix products": of_layers("products") * speed,
            "attention": of_layers("attention") * speed,
            "other kernels": of_layers("other") * speed,
            "recomputation": of_layers("recomputed") * speed,
            "embedding, output layer, loss": number * (self._head_ms(stage) * speed + exchanges * head.exchange),
            "tensor parallel": of_layers("tensor_parallel"),
            "waits in lockstep": of_layers("wait") + kernels * speed * self.lag,
            "context parallel": of_layers("context_parallel"),
            "fp8 scaling factors": 2 * number * len(self.layers[stage]) * self.amax,
        }

    def _host_ms(self) -> float | None:
        if self.cfg.model.cuda_graph_impl != "none":
            return None
        shape = self.rate.shape
        entries = [entry for entry in self.rates.tables["host_ms_a_layer"] if entry["precision"] == shape.precision]
        parts = min(shape.context_parallel, 2)
        return next(float(entry["ms"]) for entry in entries if entry["context_parallel"] == parts)
