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
    optimizer: float  # gradient norm, Adam, zeroed gradients

    @property
    def total(self) -> float:
        return self.reduction + self.gathering + self.optimizer


@dataclass(frozen=True)
class DataParallel:
    """A point's parameters on each stage, and the group that shares them (data and context parallel ranks)."""

    cfg: TrainConfig
    rates: Rates
    network: Network
    layers: Sequence[Sequence[float]]  # by stage, chunk

    @property
    def ranks(self) -> int:
        return self.cfg.data_parallel_size * self.cfg.model.context_parallel_size

    @property
    def embedding(self) -> float:
        """Parameters of the embedding, and of the output layer, on one rank."""
        m = self.cfg.model
        return self.cfg.padded_vocab_size * m.hidden_size / m.tensor_model_parallel_size

    def parameters(self, stage: int, chunk: int) -> float:
        """Return the parameters of a chunk on one rank."""
        m = self.cfg.model
        attention = m.hidden_size**2 * (2 + 2 * m.num_query_groups / m.num_attention_heads)
        layer = (attention + 3 * m.hidden_size * m.ffn_hidden_size) / m.tensor_model_parallel_size
        last_stage, last_chunk = len(self.layers) - 1, len(self.layers[0]) - 1
        ends = ((stage, chunk) == (0, 0)) + ((stage, chunk) == (last_stage, last_chunk))
        return self.layers[stage][chunk] * layer + ends * self.embedding

    def stage_parameters(self, stage: int) -> float:
        return sum(self.parameters(stage, chunk) for chunk in range(len(self.layers[stage])))

    def _ring_ms(self, parameters: float, bytes_each: float) -> float:
        messages = max(1, math.ceil(parameters / (self.cfg.model.optim.bucket_size or 40_000_000)))
        return self.network.ring_ms(
            parameters * bytes_each, self.ranks, self.cfg.model.tensor_model_parallel_size, messages
        )

    def reduction_ms(self, parameters: float) -> float:
        """Return the time of a reduce-scatter of gradients, or of an all-reduce without the distributed optimizer."""
        o = self.cfg.model.optim
        rings = 1 if o.use_distributed_optimizer else 2
        return rings * self._ring_ms(parameters, 4 if o.grad_reduce_in_fp32 else 2)

    def gathering_ms(self, parameters: float) -> float:
        """Return the time of an all-gather of updated parameters."""
        if not self.cfg.model.optim.use_distributed_optimizer:
            return 0.0
        return self._ring_ms(parameters, 1 if self.cfg.precision.fp8 and self.cfg.precision.fp8_param_gather else 2)

    def step_end(self, timeline: Timeline) -> StepEnd:
        """Return what is left when the passes are done."""
        stages = range(len(self.layers))
        if self.ranks == 1:
            return StepEnd(0.0, 0.0, self.optimizer_ms())
        ends = [self._reduced_at(timeline, stage) for stage in stages]
        reduction = max(end for end, _ in ends) - timeline.end_ms
        gathered = max(self.gathering_ms(self.stage_parameters(stage)) for stage in stages)
        gathering = self._exposed_gathering(gathered, timeline)
        # Hidden collectives slow the products beside them; about half of them run beside the critical stage's.
        hidden = max(time for _, time in ends) - reduction + gathered - gathering
        slowdowns = self.rates.tables["layer_beside_held_sms"]["fp8" if self.cfg.precision.fp8 else "bf16"]
        sms = sorted((int(number), slowdown) for number, slowdown in slowdowns.items())
        beside = piecewise(sms, constant("gather_sms")["data_parallel"]) * max(0.0, hidden) / 2
        return StepEnd(reduction + beside, gathering, self.optimizer_ms())

    def _reduced_at(self, timeline: Timeline, stage: int) -> tuple[float, float]:
        """Return when a stage's gradients are reduced, and how long that takes in all."""
        end, overlaps = timeline.stage_ends_ms[stage], self.cfg.model.optim.overlap_grad_reduce
        chunks = range(len(self.layers[stage]))
        backward = timeline.pipeline.backward_ms[stage]
        if not overlaps or (len(self.layers) == 1 and len(chunks) == 1):
            total = self.reduction_ms(self.stage_parameters(stage))
            # Bucket by bucket behind the last micro-batch's backward pass; the embedding's comes at its end.
            left = max(total - backward[0], self.reduction_ms(self.embedding)) if overlaps else total
            return end + left, total
        # A chunk's reduction begins `stage` passes after its last backward pass, so that all stages begin at once.
        last, total, time = timeline.last_backward_ms(stage), 0.0, 0.0
        one_pass = sum(backward) / len(backward)
        for chunk in sorted(chunks, key=lambda chunk: last[chunk]):
            tail = end - max(last) if chunk == 0 else 0.0  # deferred weight gradients run behind the last pass
            start = min(last[chunk] + stage * one_pass, end) if chunk else end - tail
            reduction = self.reduction_ms(self.parameters(stage, chunk))
            time, total = max(time, start) + reduction, total + reduction
        return max(time, end), total

    def _exposed_gathering(self, gathered: float, timeline: Timeline) -> float:
        o, forward = self.cfg.model.optim, timeline.pipeline.forward_ms
        if not o.overlap_param_gather:
            return gathered
        if len(self.layers) == 1 and len(self.layers[0]) == 1:
            return max(self.gathering_ms(self.embedding), gathered - forward[0][0])
        if getattr(o, "overlap_param_gather_with_optimizer_step", False):
            return 0.0
        return self.gathering_ms(self.parameters(0, 0))

    def optimizer_ms(self) -> float:
        """Return gradient norm, Adam and what else passes over the parameters once a step, by bytes moved."""
        o, rates, scaling = self.cfg.model.optim, self.rates, constant("scaling_gb_s")
        parameters = max(self.stage_parameters(stage) for stage in range(len(self.layers)))
        own = parameters / (self.ranks if o.use_distributed_optimizer else 1)
        moments = sum({"fp32": 8, "bf16": 4}[dtype] for dtype in (o.exp_avg_dtype, o.exp_avg_sq_dtype))
        # Main weights read and written, moments, gradients read, parameters written.
        adam = own * (8 + moments + 4) / rates.gb_s("adam")
        norm = own * 6 / scaling["norm"] * rates.most_slowdown
        zero = parameters * 2 / rates.gb_s("fill")
        transposed = cast = 0.0
        if self.cfg.precision.fp8:
            transposed = (parameters - self.embedding) * 2 / scaling["transpose"] * rates.most_slowdown
            if self.cfg.precision.fp8_param_gather:
                share = own / parameters
                cast = (parameters - self.embedding) * share / 1e9 * constant("fp8_cast_ms") * rates.most_slowdown
        wait = constant("gradient_norm_ms")["one_node" if self.cfg.trainer.num_nodes == 1 else "more_nodes"]
        return float((adam + norm + zero + transposed) / 1e6 + cast + wait)
