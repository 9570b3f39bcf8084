"""The end of a step: gradients reduced, the optimizer, parameters gathered; what of it the passes do not hide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_bench.config import TrainConfig
from nemo_bench.estimate.network import Network
from nemo_bench.estimate.rates import Rates, constant, piecewise
from nemo_bench.estimate.schedule import Timeline


@dataclass(frozen=True)
class StepEnd:
    """What comes behind the last backward pass (ms)."""

    reduction: float  # of gradients, exposed
    gathering: float  # of parameters, exposed
    optimizer: float

    @property
    def total(self) -> float:
        return self.reduction + self.gathering + self.optimizer


@dataclass(frozen=True)
class DataParallel:
    """A point's parameters on each stage, and the data- and context-parallel ranks that share them."""

    cfg: TrainConfig
    rates: Rates
    network: Network
    layers: Sequence[Sequence[int]]  # by stage, chunk

    @property
    def ranks(self) -> int:
        return self.cfg.data_parallel_size * self.cfg.model.context_parallel_size

    @property
    def embedding(self) -> float:
        """Parameters of the embedding, and of the output layer, on one rank."""
        return self.cfg.padded_vocab_size * self.cfg.model.hidden_size / self.cfg.model.tensor_model_parallel_size

    def parameters(self, stage: int) -> list[float]:
        """Return the parameters of each chunk of a stage on one rank."""
        m = self.cfg.model
        attention = m.hidden_size**2 * (2 + 2 * m.num_query_groups / m.num_attention_heads)
        layer = (attention + 3 * m.hidden_size * m.ffn_hidden_size) / m.tensor_model_parallel_size
        chunks = [number * layer for number in self.layers[stage]]
        chunks[0] += self.embedding * (stage == 0)
        chunks[-1] += self.embedding * (stage == len(self.layers) - 1)
        return chunks

    def _ring_ms(self, parameters: float, bytes_each: float) -> float:
        messages = max(1, math.ceil(parameters / (self.cfg.model.optim.bucket_size or 40_000_000)))
        stride = self.cfg.model.tensor_model_parallel_size
        return self.network.ring_ms(parameters * bytes_each, self.ranks, stride, messages)

    def reduction_ms(self, parameters: float) -> float:
        """Return the time of a reduce-scatter of gradients, or of an all-reduce without the distributed optimizer."""
        o = self.cfg.model.optim
        rings = 1 if o.use_distributed_optimizer else 2
        return rings * self._ring_ms(parameters, 4 if o.grad_reduce_in_fp32 else 2)

    def gathering_ms(self, parameters: float) -> float:
        """Return the time of an all-gather of updated parameters."""
        p, gathers = self.cfg.precision, self.cfg.model.optim.use_distributed_optimizer
        return self._ring_ms(parameters, 1 if p.fp8 and p.fp8_param_gather else 2) if gathers else 0.0

    def step_end(self, timeline: Timeline) -> StepEnd:
        """Return what is left when the passes are done."""
        if self.ranks == 1:
            return StepEnd(0.0, 0.0, self.optimizer_ms())
        ends = [self._reduced_at(timeline, stage) for stage in range(len(self.layers))]
        reduction = max(end for end, _ in ends) - timeline.end_ms
        gathered = max(self.gathering_ms(sum(self.parameters(stage))) for stage in range(len(self.layers)))
        gathering = self._exposed_gathering(gathered, timeline.pipeline.forward_ms[0])
        # Hidden collectives slow the products beside them; about half of them run beside the critical stage's.
        hidden = max(time for _, time in ends) - reduction + gathered - gathering
        slowdowns = self.rates.tables["layer_beside_held_sms"]["fp8" if self.cfg.precision.fp8 else "bf16"]
        by_sms = sorted((int(number), slowdown) for number, slowdown in slowdowns.items())
        beside = piecewise(by_sms, constant("gather_sms")["data_parallel"]) * max(0.0, hidden) / 2
        return StepEnd(reduction + beside, gathering, self.optimizer_ms())

    def _reduced_at(self, timeline: Timeline, stage: int) -> tuple[float, float]:
        """Return when a stage's gradients are reduced, and how long that takes in all."""
        end, parameters = timeline.stage_ends_ms[stage], self.parameters(stage)
        backward, overlaps = timeline.pipeline.backward_ms[stage], self.cfg.model.optim.overlap_grad_reduce
        if not overlaps or len(self.layers) == len(parameters) == 1:
            total = self.reduction_ms(sum(parameters))
            # Bucket by bucket behind the last micro-batch's backward pass; the embedding's comes at its end.
            return end + (max(total - backward[0], self.reduction_ms(self.embedding)) if overlaps else total), total
        # A chunk's reduction begins `stage` passes after its last backward pass, so that all stages begin at once.
        last, total, time = timeline.last_backward_ms(stage), 0.0, 0.0
        for chunk in sorted(range(len(last)), key=lambda chunk: last[chunk]):
            start = min(last[chunk] + stage * sum(backward) / len(backward), end) if chunk else max(last)
            reduction = self.reduction_ms(parameters[chunk])
            time, total = max(time, start) + reduction, total + reduction
        return max(time, end), total

    def _exposed_gathering(self, gathered: float, first_forward_ms: Sequence[float]) -> float:
        o = self.cfg.model.optim
        if not o.overlap_param_gather:
            return gathered
        if len(self.layers) == len(first_forward_ms) == 1:
            return max(self.gathering_ms(self.embedding), gathered - first_forward_ms[0])
        # The first chunk's; where that begins within the optimizer's step, behind Adam of the other chunks.
        first, *others = self.parameters(0)
        hidden = self._adam_ms(sum(others)) if self.cfg.gathers_with_optimizer_step else 0.0
        return max(0.0, self.gathering_ms(first) - hidden)

    @property
    def _share(self) -> float:
        """Share of the parameters that one rank updates."""
        return 1 / self.ranks if self.cfg.model.optim.use_distributed_optimizer else 1.0

    def _adam_ms(self, parameters: float) -> float:
        o = self.cfg.model.optim
        moments = sum({"fp32": 8, "bf16": 4}[dtype] for dtype in (o.exp_avg_dtype, o.exp_avg_sq_dtype))
        # Main weights read and written, moments, gradients read, parameters written.
        return parameters * self._share * (8 + moments + 4) / self.rates.gb_s("adam") / 1e6

    def optimizer_ms(self) -> float:
        """Return gradient norm, Adam and what else passes over the parameters once a step, by bytes moved."""
        p, rates, scaling = self.cfg.precision, self.rates, constant("scaling_gb_s")
        parameters = max(sum(self.parameters(stage)) for stage in range(len(self.layers)))
        norm = parameters * self._share * 6 / scaling["norm"] * rates.most_slowdown
        total = norm + parameters * 2 / rates.gb_s("fill")  # and gradients zeroed
        if p.fp8:
            in_fp8 = (parameters - self.embedding) * rates.most_slowdown
            total += in_fp8 * 2 / scaling["transpose"]
            total += in_fp8 * self._share * constant("fp8_cast_ms") / 1e3 if p.fp8_param_gather else 0.0
        wait = constant("gradient_norm_ms")["one_node" if self.cfg.trainer.num_nodes == 1 else "more_nodes"]
        return float(self._adam_ms(parameters) + total / 1e6 + wait)
