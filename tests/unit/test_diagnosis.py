"""Failures explained with the run's own numbers (memory, collectives), and what a failed run's user reads."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from nemo_bench.cluster.processes import Outcome
from nemo_bench.config import TrainConfig, load
from nemo_bench.entrypoints.nemo2 import Nemo2
from nemo_bench.errors import BenchError, RunFailed
from nemo_bench.files import write_json
from nemo_bench.launch import point
from nemo_bench.launch.diagnosis import diagnose, explain, failure_text
from nemo_bench.record.folder import EXIT, RunFolder, Status, timestamp

from ..composing import PROJECT, composed

FOUR_LAYERS = PROJECT / "benchmarks/results/h200/bf16_4layers_77b5/config.yaml"

# torch 2.6 to 2.11
MEMORY_STATE = (
    "GPU 0 has a total capacity of 79.11 GiB of which 1.02 GiB is free. Including non-PyTorch memory, this process has "
    "78.07 GiB memory in use. Of the allocated memory 68.10 GiB is allocated by PyTorch, and 8.35 GiB is reserved by "
    "PyTorch but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
OUT_OF_MEMORY = f"CUDA out of memory. Tried to allocate 3.91 GiB. {MEMORY_STATE}  See documentation"
WATCHDOG = (
    "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=2635, OpType=ALLREDUCE, NumelIn=1259621, "
    "NumelOut=1259621, Timeout(ms)=600000) ran for 600024 milliseconds before timing out."
)
TIME_OUT = "NCCL time-out: ALLREDUCE, number 2635 of its process group, did not end within 600000 ms"


def timed_out(rank: int, *, group_rank: int | None = None) -> str:
    """Return a rank's log as torch 2.6 and later write it."""
    inner = rank if group_rank is None else group_rank
    source = f"[rank{rank}]:[E1118 20:32:23.955028747 ProcessGroupNCCL.cpp:"
    where = f"[PG ID 0 PG GUID 0(default_pg) Rank {inner}]"
    lines = [
        "[NeMo I 2026-11-18 20:22:20 nemo_logging:393] Training epoch 0, iteration 12/49",
        f"{source}629] [Rank {inner}] {WATCHDOG}",
        f"{source}1895] {where} Process group watchdog thread terminated with exception: [Rank {inner}] {WATCHDOG}",
        "Exception raised from checkTimeout at ProcessGroupNCCL.cpp:632 (most recent call first):",
        *(f"frame #{number}: c10d::ProcessGroupNCCL::watchdogHandler() + 0x5e7 (0x7f8)" for number in range(60)),
        "terminate called after throwing an instance of 'c10::DistBackendError'",
    ]
    return "\n".join(lines)


TOLD = (
    "reading shard 7\n[rank5]:[E703 21:51:54.112142364 ProcessGroupNCCL.cpp:1987] [PG ID 0 PG GUID 0(default_pg) "
    "Rank 5] Received a dump signal due to a collective timeout from  rank 2 and we will try our best to dump the "
    "debug info. Last enqueued NCCL work: 2634, last completed NCCL work: 2634.\n"
    "terminate called after throwing an instance of 'c10::DistBackendError'\n"
)
READING = "[NeMo I 2026-11-18 20:22:20 nemo_logging:393] Training epoch 0, iteration 12/49\nreading shard 7\n"
ALL_ALIKE = "all ranks reported it: the network or a GPU is a likelier cause than one process"


@pytest.fixture(scope="module")
def four_layers() -> TrainConfig:
    """As that run was, whatever the defaults are by now."""
    cfg = load(FOUR_LAYERS)
    vars(cfg.model).update(cross_entropy_fusion_impl="native")
    vars(cfg.model.optim).update(use_precision_aware_optimizer=False)
    return cfg


@pytest.fixture(scope="module")
def eight() -> TrainConfig:
    return composed("scale=8gpu", "model=8b", "data=mock")


def explained(cfg: TrainConfig, text: str, logs: dict[int, str] | None = None) -> list[str]:
    lines = explain(cfg, text, logs or {})
    assert lines is not None
    return lines


def test_out_of_memory_says_what_there_was_what_is_needed_and_what_helps(four_layers: TrainConfig) -> None:
    headline, needed, less = explained(four_layers, f"OutOfMemoryError: {OUT_OF_MEMORY}\nnext line")
    assert headline == f"out of GPU memory: asked for 3.91 GiB. {MEMORY_STATE}"
    assert needed.startswith("needed by this configuration, estimated: 102.9 GiB on a GPU of pipeline stage 0 (")
    for part in ("parameters 10.3", "gradients 10.3", "optimizer 61.7", "activations ", "logits "):
        assert part in needed
    # one GPU has no room for a parallel size: twice the GPUs are named with it
    assert "trainer.devices=2 model.tensor_model_parallel_size=2 (51 GiB)" in less
    assert less.index("tensor") < less.index("pipeline") < less.index("context") < less.index("num_layers=2")
    overrides = re.findall(r"((?:model|trainer)\.\w+)=(\w+)", less)
    composed(*(f"{key}={value}" for key, value in overrides))  # all of them exist


def test_what_takes_less_is_what_the_checks_let_through() -> None:
    less = explained(composed("scale=64gpu", "data=mock"), OUT_OF_MEMORY)[-1]
    assert "model.tensor_model_parallel_size=8 (" in less and "model.context_parallel_size=4 (" in less
    assert "trainer." not in less and "micro_batch_size" not in less
    larger = composed("scale=64gpu", "data=mock", "model.micro_batch_size=4")
    assert "model.micro_batch_size=2" in explained(larger, OUT_OF_MEMORY)[-1]


@pytest.mark.parametrize(
    ("logs", "lines"),
    [
        (
            {rank: READING if rank == 5 else timed_out(rank) for rank in range(8)},
            [
                "reported by ranks 0, 1, 2, 3, 4, 6, 7",
                "not reported by rank 5, for",
                "  rank5.out ends: reading shard 7",
            ],
        ),
        # Ranks within a tensor-parallel group count from 0: whose log it is tells the rank.
        (
            {4: timed_out(4, group_rank=0), 6: timed_out(6, group_rank=2)},
            ["reported by ranks 4, 6", "not reported by ranks 0, 1, 2, 3, 5, 7, for", "  rank0.out ends: (nothing)"],
        ),
        # A rank that was only told of it reported nothing.
        (
            {rank: TOLD if rank == 5 else timed_out(rank) for rank in range(8)},
            ["reported by ranks 0, 1, 2, 3, 4, 6, 7", "not reported by rank 5,", "  rank5.out ends: reading shard 7"],
        ),
        ({rank: timed_out(rank) for rank in range(8)}, ["reported by ranks 0, 1, 2, 3, 4, 5, 6, 7", ALL_ALIKE]),
    ],
)
def test_a_time_out_names_the_rank_to_look_at_first(logs: dict[int, str], lines: list[str], eight: TrainConfig) -> None:
    text = next((log for log in logs.values() if log == TOLD), list(logs.values())[-1])
    headline, *own, advice = explained(eight, text, logs)
    assert headline == TIME_OUT and "NCCL_DEBUG=INFO" in advice
    assert all(line.startswith(start) for line, start in zip(own, lines, strict=False)) and len(own) >= len(lines)


def test_many_ranks_are_counted_and_an_exception_that_holds_the_time_out_needs_no_log() -> None:
    cfg = composed("scale=2048gpu", "data=mock")
    lines = explained(cfg, f"DistBackendError: {timed_out(0)}", {rank: timed_out(rank) for rank in range(2000)})
    assert lines[1] == "reported by ranks 0, 1, 2, 3, 4, 5, 6, 7 and 1992 more"
    assert explained(cfg, f"DistBackendError: {timed_out(0)}")[1].startswith("not reported by ranks 0, 1, 2")


@pytest.fixture
def run(tmp_path: Path, eight: TrainConfig) -> RunFolder:
    eight.stage_path = str(tmp_path)
    return point.new_run(eight, [])


def message_of(run: RunFolder, cfg: TrainConfig, rank: int, exit_code: int, error: BaseException | None = None) -> str:
    """Return what the user reads of a run of which `rank` failed first, and had that exception."""
    if error is not None:
        run.write_rank_error(rank, error)
    return point.record_failure(cfg, run, Outcome(rank, exit_code, seen_at=time.time()))


def test_the_watchdogs_abort_is_explained_from_the_logs(run: RunFolder, eight: TrainConfig) -> None:
    for rank in range(8):
        run.log(rank).write_text("step 12\n" if rank == 5 else timed_out(rank))
    # an exception that another rank had because of it
    run.write_rank_error(5, RuntimeError("Connection closed by peer"))
    lines = message_of(run, eight, 2, -6).splitlines()
    assert lines[0] == f"rank 2 of 8 failed: killed by SIGABRT: {TIME_OUT}"
    assert lines[2] == "  not reported by rank 5, for which the others may have waited: look there first"
    assert f"the last lines of {run.log(2)}:" in lines
    status = run.status()
    assert status.state == "killed" and "NCCL time-out" in (status.reason or "")


LOG_END = "the last lines of {log}:\n  | one\n  | two"


@pytest.mark.parametrize(
    ("exit_code", "error", "message"),
    [
        (1, BenchError("NVIDIA A100 has no fp8\nuse precision=bf16"), "NVIDIA A100 has no fp8\n  use precision=bf16"),
        (1, ValueError("no such thing\nat all"), f"ValueError: no such thing\n{LOG_END}"),
        (-9, None, f"killed by SIGKILL (from outside, or by the kernel for want of memory: `dmesg` says)\n{LOG_END}"),
        (3, None, f"exit status 3\n{LOG_END}"),
    ],
)
def test_what_is_not_explained_keeps_its_own_words(
    exit_code: int, error: BaseException | None, message: str, run: RunFolder, eight: TrainConfig
) -> None:
    run.log(1).write_text("one\ntwo\n")
    assert message_of(run, eight, 1, exit_code, error) == f"rank 1 of 8 failed: {message.format(log=run.log(1))}"


def test_a_job_that_left_no_exception_is_explained_from_its_logs(run: RunFolder, eight: TrainConfig) -> None:
    """A rank that a signal ended in a Slurm job: only the logs tell which one it was."""
    for rank in (0, None):
        assert diagnose(eight, run, rank, None) == ("", [])
    for rank in range(8):
        run.log(rank).write_text("step 12\n" if rank == 0 else timed_out(rank))
    run.set_status(Status("submitted"))
    write_json(run.path / EXIT, {"exit_code": 134, "ended_at": timestamp()})
    text = failure_text(run.path)
    assert text.startswith("NCCL time-out: ALLREDUCE") and "not reported by rank 0" in text


def test_ranks_that_end_with_0_before_the_last_step_have_failed(
    run: RunFolder, eight: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Nemo2, "rank_command", lambda *_: ["/bin/true"])
    run.write_step({"step": 3, "train_step_timing_s": 1.0})
    with pytest.raises(RunFailed, match="not complete: its ranks ended with exit status 0 at step 4 of 50"):
        point.execute(eight, run, lambda: None)
    assert run.status().state == "failed"
