"""The end of a step: gradients reduced, the optimizer, parameters gathered; what of it the passes do not hide."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nemo_bench.config import TrainConfig
from nemo_bench.estimate.network import Network
from nemo_bench.estimate.rates import Rates, constant, piecewise
from nemo_bench.estimate.schedule import Timeline


class DataParallel:
    """A point's parameters on each stage, and the data- and context-parallel ranks that share them."""

    def __init__(self, cfg: TrainConfig, rates: Rates, network: Network, layers: Sequence[Sequence[int]]) -> None:
        m = cfg.model
        self.cfg, self.optim, self.rates, self.network = cfg, m.optim, rates, network
        self.tensor_parallel, self.ranks = m.tensor_model_parallel_size, cfg.weight_copies
        # Parameters of the embedding, and of the output layer, on one rank.
        self.embedding = cfg.padded_vocab_size * m.hidden_size / self.tensor_parallel
        attention = m.hidden_size**2 * (2 + 2 * m.num_query_groups / m.num_attention_heads)
        layer = (attention + 3 * m.hidden_size * m.ffn_hidden_size) / self.tensor_parallel
        # Parameters on one rank, by stage and chunk.
        self.parameters = [[number * layer for number in chunks] for chunks in layers]
        self.parameters[0][0] += self.embedding
        self.parameters[-1][-1] += self.embedding
        self.most_parameters = max(map(sum, self.parameters))
        # Share of the parameters that one rank updates.
        self.share = 1 / self.ranks if self.optim.use_distributed_optimizer else 1.0

    def step_end_ms(self, timeline: Timeline) -> dict[str, float]:
        """Return what comes behind the last backward pass, by part of the breakdown."""
        reduction, gathering = self._exposed_ms(timeline) if self.ranks > 1 else (0.0, 0.0)
        optimizer = self.optimizer_ms()
        return {"gradient reduction": reduction, "parameter gathering": gathering, "optimizer": optimizer}

    def _exposed_ms(self, timeline: Timeline) -> tuple[float, float]:
        """Return what the passes do not hide of reducing gradients and of gathering parameters."""
        ends = [self._reduced_at(timeline, stage) for stage in range(len(self.parameters))]
        reduction = max(end for end, _ in ends) - timeline.end_ms
        gathered = self._gathering_ms(self.most_parameters)
        gathering = self._exposed_gathering(gathered, timeline.pipeline.forward_ms[0])
        # Hidden collectives slow the products beside them; about half of them run beside the critical stage's.
        hidden = max(time for _, time in ends) - reduction + gathered - gathering
        slowdowns = self.rates.tables["layer_beside_held_sms"]["fp8" if self.cfg.precision.fp8 else "bf16"]
        by_sms = sorted((int(number), slowdown) for number, slowdown in slowdowns.items())
        beside = piecewise(by_sms, constant("gather_sms")["data_parallel"]) * max(0.0, hidden) / 2
        return reduction + beside, gathering

    def _ring_ms(self, parameters: float, parameter_bytes: float) -> float:
        messages = max(1, math.ceil(parameters / (self.optim.bucket_size or 40_000_000)))
        return self.network.ring_ms(parameters * parameter_bytes, self.ranks, self.tensor_parallel, messages)

    def _reduction_ms(self, parameters: float) -> float:
        """Return the time of a reduce-scatter of gradients, or of an all-reduce without the distributed optimizer."""
        rings = 1 if self.optim.use_distributed_optimizer else 2
        return rings * self._ring_ms(parameters, 4 if self.optim.grad_reduce_in_fp32 else 2)

    def _gathering_ms(self, parameters: float) -> float:
        """Return the time of an all-gather of updated parameters."""
        p, gathers = self.cfg.precision, self.optim.use_distributed_optimizer
        return self._ring_ms(parameters, 1 if p.fp8 and p.fp8_param_gather else 2) if gathers else 0.0

    def _reduced_at(self, timeline: Timeline, stage: int) -> tuple[float, float]:
        """Return when a stage's gradients are reduced, and how long that takes in all."""
        end, parameters = timeline.stage_ends_ms[stage], self.parameters[stage]
        backward, overlaps = timeline.pipeline.backward_ms[stage], self.optim.overlap_grad_reduce
        if not overlaps or len(self.parameters) == len(parameters) == 1:
            total = self._reduction_ms(sum(parameters))
            # Bucket by bucket behind the last micro-batch's backward pass; the embedding's comes at its end.
            return end + (max(total - backward[0], self._reduction_ms(self.embedding)) if overlaps else total), total
        # A chunk's reduction begins `stage` passes after its last backward pass, so that all stages begin at once.
        last, total, time = timeline.last_backward_ms(stage), 0.0, 0.0
        for chunk in sorted(range(len(last)), key=lambda chunk: last[chunk]):
            start = min(last[chunk] + stage * sum(backward) / len(backward), end) if chunk else max(last)
            reduction = self._reduction_ms(parameters[chunk])
            time, total = max(time, start) + reduction, total + reduction
        return max(time, end), total

    def _exposed_gathering(self, gathered: float, first_forward_ms: Sequence[float]) -> float:
        if not self.optim.overlap_param_gather:
            return gathered
        first, *others = self.parameters[0]
        if len(self.parameters) == 1 and not others:
            return max(self._gathering_ms(self.embedding), gathered - first_forward_ms[0])
        # The first chunk's; where that begins within the optimizer's step, behind Adam of the other chunks.
        hidden = self._adam_ms(sum(others)) if self.cfg.gathers_with_optimizer_step else 0.0
        return max(0.0, self._gathering_ms(first) - hidden)

    def _adam_ms(self, parameters: float) -> float:
        moments = sum(8 if d == "fp32" else 4 for d in (self.optim.exp_avg_dtype, self.optim.exp_avg_sq_dtype))
        # Main weights read and written, moments, gradients read, parameters written.
        return parameters * self.share * (8 + moments + 4) / self.rates.gb_s("adam") / 1e6

    def optimizer_ms(self) -> float:
        """Return gradient norm, Adam and what else passes over the parameters once a step, by bytes moved."""
        p, rates, scaling, parameters = self.cfg.precision, self.rates, constant("scaling_gb_s"), self.most_parameters
        norm = parameters * self.share * 6 / scaling["norm"] * rates.most_slowdown
        total = norm + parameters * 2 / rates.gb_s("fill")  # and gradients zeroed
        if p.fp8:
            in_fp8 = (parameters - self.embedding) * rates.most_slowdown
            total += in_fp8 * 2 / scaling["transpose"]
            total += in_fp8 * self.share * constant("fp8_cast_ms") / 1e3 if p.fp8_param_gather else 0.0
        wait = constant("gradient_norm_ms")["one_node" if self.cfg.trainer.num_nodes == 1 else "more_nodes"]
        return float(self._adam_ms(parameters) + total / 1e6 + wait)
