"""The estimate of a point: a step's time and what makes it up."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_bench.config import TrainConfig
from nemo_bench.estimate.data_parallel import DataParallel, StepEnd
from nemo_bench.estimate.layer import head_time, layer_times
from nemo_bench.estimate.network import Network
from nemo_bench.estimate.rates import Rates, constant, layer_shape, load_rates, piecewise
from nemo_bench.estimate.schedule import Pipeline, Timeline
from nemo_bench.estimate.tensor_parallel import slowest_of
from nemo_bench.pipeline import chunks_of

# The power that a GPU has left follows from the share of the step that it works in, and the other way round.
_ROUNDS = 3
_CONVERGED = 3e-4


@dataclass(frozen=True)
class Estimate:
    """What a point should take."""

    step_time_s: float
    error: float  # half of the range that the errors of published rows give, as a share
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


def layers_of_chunks(cfg: TrainConfig) -> list[list[int]]:
    """Return the number of layers by stage and chunk."""
    m = cfg.model
    stages, chunks = m.pipeline_model_parallel_size, m.virtual_pipeline_model_parallel_size or 1
    if m.pipeline_model_parallel_layout is not None:
        parts = [chunk.count("t") for chunk in chunks_of(m.pipeline_model_parallel_layout)]
        return [parts[stage::stages] for stage in range(stages)]
    first, last = m.account_for_embedding_in_pipeline_split, m.account_for_loss_in_pipeline_split
    layers = [[(m.num_layers + first + last) // (stages * chunks)] * chunks for _ in range(stages)]
    layers[0][0] -= first
    layers[-1][-1] -= last
    return layers


class _Point:
    """A configuration, and all that its estimate is made of."""

    def __init__(self, cfg: TrainConfig, rates: Rates) -> None:
        m, shape, network = cfg.model, layer_shape(cfg), Network.of(cfg)
        self.cfg, self.rates, self.rate = cfg, rates, rates.layer(shape)
        self.lag: float = constant("gpu_spread") * slowest_of(cfg.world_size)
        self.layers, self.number = layers_of_chunks(cfg), cfg.num_micro_batches
        self.passes = layer_times(cfg, rates, self.rate, network, self.lag)
        self.head = head_time(cfg, rates, network, shape.tokens)
        self.data_parallel = DataParallel(cfg, rates, network, self.layers)
        stride = cfg.world_size // m.pipeline_model_parallel_size  # between neighbours in the pipeline
        self.amax = network.amax_ms(stride) if shape.precision == "fp8" else 0.0
        deferred = min(m.wgrad_deferral_limit or self.number, self.number)
        self.deferred = deferred if cfg.defers_embedding_wgrad else 0
        sent = shape.tokens * m.hidden_size * 2 / (m.tensor_model_parallel_size if m.sequence_parallel else 1)
        self.p2p = network.p2p_ms(sent, stride) if m.pipeline_model_parallel_size > 1 else 0.0

    @property
    def stages(self) -> int:
        return len(self.layers)

    def estimate(self) -> Estimate:
        curve = self.rates.tables["power"]["fp8" if self.cfg.precision.fp8 else "bf16"]
        speed = [1.0] * self.stages  # of kernels, over their time at the power limit: less where GPUs idle
        for round_number in range(_ROUNDS):
            timeline = self.pipeline(speed).run()
            end = self.data_parallel.step_end(timeline)
            step = timeline.end_ms + end.total + constant("step_idle_ms")
            busy = [(self._working_ms(stage, speed[stage]) + end.total) / step for stage in range(self.stages)]
            following = [piecewise(curve, share) for share in busy]
            moved = max(abs(a - b) for a, b in zip(following, speed))
            if moved < _CONVERGED or round_number == _ROUNDS - 1:
                break
            speed = following
        return self._result(timeline, end, speed, busy)

    def pipeline(self, speed: Sequence[float]) -> Pipeline:
        slow, head = [one * (1 + self.lag) for one in speed], self.head
        forward, backward = (
            [
                [layers * (time.kernels * slow[stage] + time.communication) + self.amax for layers in chunks]
                for stage, chunks in enumerate(self.layers)
            ]
            for time in self.passes
        )
        forward[0][0] += head.embedding_forward * slow[0] + head.exchange
        backward[0][0] += head.embedding_backward * slow[0] + head.exchange
        forward[-1][-1] += head.forward * slow[-1] + head.exchange
        backward[-1][-1] += head.backward * slow[-1]
        deferred_ms = head.weight_gradient * slow[-1]
        chunks = len(self.layers[0])
        return Pipeline(self.stages, chunks, self.number, forward, backward, self.p2p, self.deferred, deferred_ms)

    def _of_layers(self, stage: int, name: str) -> float:
        """Return the time of a part of a layer (LayerTime), of all layers of a stage in a step (ms)."""
        return self.number * sum(self.layers[stage]) * sum(float(getattr(time, name)) for time in self.passes)

    def _of_head(self, stage: int) -> float:
        """Return the work of the model's ends on a stage in a step (ms)."""
        head = self.head
        embedding = (head.embedding_forward + head.embedding_backward) * (stage == 0)
        return self.number * (embedding + (head.forward + head.backward) * (stage == self.stages - 1))

    def _working_ms(self, stage: int, speed: float) -> float:
        """Return how long a stage's passes draw power: collectives and waits in lockstep leave none to spare."""
        kernels = self._of_layers(stage, "kernels") + self._of_head(stage)
        return kernels * speed * (1 + self.lag) + self._of_layers(stage, "communication")

    def _result(self, timeline: Timeline, end: StepEnd, speed: Sequence[float], busy: Sequence[float]) -> Estimate:
        stage = max(range(self.stages), key=timeline.pipeline.busy_ms)
        breakdown = self._breakdown(stage, speed[stage])
        # A sum of differences in floating point: without a pipeline it is nothing, or a little less.
        breakdown["pipeline bubble and p2p"] = max(0.0, timeline.end_ms - sum(breakdown.values()))
        breakdown |= {"gradient reduction": end.reduction, "parameter gathering": end.gathering}
        breakdown |= {"optimizer": end.optimizer, "host": constant("step_idle_ms")}
        step_s = sum(breakdown.values()) / 1e3
        return Estimate(
            step_time_s=step_s,
            error=constant("error")["fp8" if self.cfg.precision.fp8 else "bf16"],
            breakdown_s={name: ms / 1e3 for name, ms in breakdown.items()},
            critical_stage=stage,
            stage_busy=tuple(busy),
            layer_gpu_ms=sum(time.kernels * speed[stage] + time.communication for time in self.passes),
            layer_host_ms=self._host_ms(),
            measured_shape=self.rate.measured,
            rates=self.rates,
            timeline=timeline,
        )

    def _breakdown(self, stage: int, speed: float) -> dict[str, float]:
        """Return a stage's work in a step (ms); the slowest GPU's lag counts as waits, since all others wait for it."""
        of_layers, of_head = functools.partial(self._of_layers, stage), self._of_head(stage)
        exchanges = self.number * (2 * (stage == 0) + (stage == self.stages - 1))
        return {
            "matrix products": of_layers("products") * speed,
            "attention": of_layers("attention") * speed,
            "other kernels": of_layers("other") * speed,
            "recomputation": of_layers("recomputed") * speed,
            "embedding, output layer, loss": of_head * speed + exchanges * self.head.exchange,
            "tensor parallel": of_layers("tensor_parallel"),
            "waits in lockstep": of_layers("wait") + (of_layers("kernels") + of_head) * speed * self.lag,
            "context parallel": of_layers("context_parallel"),
            "fp8 scaling factors": 2 * self.number * len(self.layers[stage]) * self.amax,
        }

    def _host_ms(self) -> float | None:
        shape = self.rate.shape
        known = {
            (entry["precision"], entry["context_parallel"]): entry["ms"]
            for entry in self.rates.tables["host_ms_a_layer"]
        }
        launched = self.cfg.model.cuda_graph_impl == "none"
        return float(known[shape.precision, min(shape.context_parallel, 2)]) if launched else None
