"""Failed runs by their logs: the first error and its file, and the known causes that a user can add to."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_bench.config import TrainConfig
from nemo_bench.launch.diagnosis import CAUSES, Diagnosis, diagnose, explain, read_causes
from nemo_bench.record.first_error import first_error
from nemo_bench.record.folder import EXIT, RunFolder

from ..composing import composed

BOOST = "[NeMo W 2026-11-18 20:22:20 nemo_logging:393] error_if_no_checkpoint: false\n"
TRACEBACK = 'Traceback (most recent call last):\n  File "rank.py", line 3, in <module>\n    train(cfg)\n'
# What srun adds once a rank has failed.
AFTER = (
    "srun: error: n1: task 0: Exited with exit code 1\nsrun: Terminating StepId=12.0\n"
    "slurmstepd: error: *** STEP 12.0 ON n1 CANCELLED AT 2026-11-28T10:00:00 ***\n"
)

# What a job's log says, and a part of the cause that is named for it.
IN_THE_JOBS_LOG = [
    # Debian's Slurm, which can run several nodes on a machine, adds the node's name.
    ("slurmstepd-n1: error: execve(): /opt/venv/bin/python: No such file or directory", "/opt/venv/bin/python"),
    ("slurmstepd: error: pyxis: failed to import docker image: nvcr.io/x:1", "imported: nvcr.io/x:1"),
    ("slurmstepd: error: pyxis: failed to create container filesystem for image: /a.sqsh", "imported: /a.sqsh"),
    ("slurmstepd: error: pyxis: --container-mounts: source path does not exist: /data", "the node does not have /data"),
    (
        "slurmstepd: error: pyxis: child 77 failed with error code: 1\n"
        "slurmstepd: error: pyxis: failed to create container filesystem for image: /lustre/b.sqsh",
        "imported: /lustre/b.sqsh",
    ),
    ("slurmstepd: error: pyxis: container start failed with error code: 1", "could not be started"),
    ("srun: unrecognized option '--container-image=/lustre/a.sqsh'", "starts no containers"),
    (
        "srun: error: Unable to create step for job 12: Invalid generic resource (gres) specification",
        "srun asks for other GPUs than the job has",
    ),
    (
        "srun: error: Unable to create step for job 12: Requested node configuration is not available",
        "could not start the ranks: Requested node",
    ),
    ("srun: error: Couldn't find the specified plugin name for mpi/pmix looking at all files", "no MPI plugin pmix"),
    ("PMIX ERROR: UNREACHABLE in file client/pmix_client.c at line 224", "PMIx"),
    (
        "slurmstepd: error: Detected 2 oom_kill events in StepId=12.0. Some of the step tasks have been OOM Killed.",
        "out of the node's memory",
    ),
    ("srun: error: n1: tasks 1-3: Out Of Memory", "out of the node's memory"),
    ("srun: error: n2: task 1: Killed", "rank 1 on n2 was killed"),
    ("slurmstepd: error: *** JOB 12 ON n1 CANCELLED AT 2026-11-28T10:00:00 DUE TO TIME LIMIT ***", "time limit"),
    (
        "slurmstepd: error: *** JOB 12 ON n1 CANCELLED AT 2026-11-28T10:00:00 DUE TO NODE FAILURE, SEE SLURMCTLD LOG",
        "a node of the job failed",
    ),
]
IN_A_RANKS_LOG = [
    (
        "AssertionError: Device compute capability 8.9 or higher required for FP8 execution.",
        "cannot compute in this fp8",
    ),
    (
        "/usr/bin/python3: Error while finding module specification for 'nemo_bench.training.rank' "
        "(ModuleNotFoundError: No module named 'nemo_bench')",
        "no module nemo_bench",
    ),
    (
        TRACEBACK + "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network "
        "address. port: 10012, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use",
        "port where the ranks meet is taken",
    ),
    (
        TRACEBACK + "FileNotFoundError: [Errno 2] No such file or directory: "
        "'/tmp/index/0f3a-GPTDataset-train-document_index.npy'",
        "cannot see the index that rank 0 wrote: /tmp/index/0f3a",
    ),
    (TRACEBACK + "OSError: [Errno 30] Read-only file system: '/opt/x'", "cannot write '/opt/x'"),
    (
        TRACEBACK + "RuntimeError: Unexpected result nan (message='found NaN in local grad norm for bucket #1 in "
        "backward pass before data-parallel communication collective')",
        "a gradient was NaN",
    ),
    (
        TRACEBACK + "RuntimeError: /TransformerEngine/common/gemm/cublaslt_gemm.cu:321 in function cublas_gemm: "
        "Assertion failed: ret.lda % 16 == 0",
        "a size that fp8 does not take",
    ),
    ("SM 1 [7]:expecting 1 got 0", "user buffers"),
    (TRACEBACK + "RuntimeError: CUDA error: device-side assert triggered", "outside the vocabulary"),
    (
        "[rank1]:[E1111 17:10:53.1 ProcessGroupNCCL.cpp:1536] [PG ID 0 PG GUID 0(default_pg) Rank 1] "
        "ProcessGroupNCCL's watchdog got stuck for 480 seconds without making progress",
        "hangs on rank 1: NCCL's watchdog stood still for 480 s",
    ),
]
KNOWN = [("slurm-12.out", *row) for row in IN_THE_JOBS_LOG] + [("rank0.out", *row) for row in IN_A_RANKS_LOG]

# An exception's message, and the start of its cause.
EXCEPTIONS = [
    (
        "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be",
        "torch, Transformer Engine or another library has no kernels for this GPU",
    ),
    (
        "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver",
        "the GPU driver is too old for this torch: it offers CUDA 12.4",
    ),
    (
        "CUDA error: CUDA driver version is insufficient for CUDA runtime version",
        "the GPU driver is too old for a library's CUDA",
    ),
    ("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU", "CUDA sees no GPU"),
    ("CUDA error: uncorrectable ECC error encountered", "the GPU's memory has an uncorrectable error"),
    ("CUDA error: an illegal memory access was encountered", "a kernel read or wrote outside its memory"),
    (
        "CUDA error: device-side assert triggered",
        "a kernel's assertion failed: often a token id outside the vocabulary; this model has 128,256 of them",
    ),
    (
        "NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1970, remote process exited or there was a "
        "network error, NCCL version 2.19.3\n"
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.\n"
        "Last error:\nNET/IB : Got completion from peer 10.42.0.2<47534> with error 5, opcode 48, vendor err 244",
        "NCCL lost the connection to another rank: that rank ended, or the network did (ncclRemoteError): NET/IB : ",
    ),
    ("index out of range in self", "a token id outside the vocabulary; this model has 128,256 of them"),
    ("ncclInvalidUsage: This usually reflects invalid usage of NCCL library.", "NCCL was used in a wrong way"),
    ("AssertionError: an unspecified launch failure of ours", None),
    ("ValueError: no", None),
    ("", None),
    ("[NeMo W] NCCL 2.28", None),
]


@pytest.fixture(scope="module")
def cfg() -> TrainConfig:
    return composed("scale=8gpu", "model=8b", "data=mock")


@pytest.mark.parametrize(("text", "cause"), EXCEPTIONS, ids=[str(cause) for _, cause in EXCEPTIONS])
def test_a_known_exception_is_explained(text: str, cause: str | None, cfg: TrainConfig) -> None:
    lines = explain(cfg, text, {0: text})
    if cause is None:
        assert lines is None
    else:
        assert lines is not None and len(lines) == 2 and lines[0].startswith(cause) and not lines[0].endswith(":")


def diagnosed(cfg: TrainConfig, folder: Path) -> Diagnosis:
    cfg.stage_path = str(folder)
    return diagnose(cfg, RunFolder(folder), None, None)


@pytest.mark.parametrize(("log", "text", "cause"), KNOWN, ids=[cause for _, _, cause in KNOWN])
def test_a_known_cause_is_named_with_the_first_errors_line_and_file(
    log: str, text: str, cause: str, cfg: TrainConfig, tmp_path: Path
) -> None:
    (tmp_path / "rank0.out").write_text(BOOST)
    (tmp_path / log).write_text(BOOST + text + "\n")
    with open(tmp_path / "slurm-12.out", "a") as job_log:
        job_log.write(AFTER)
    diagnosis = diagnosed(cfg, tmp_path)
    assert diagnosis.cause is not None and cause in diagnosis.cause and "$" not in diagnosis.cause
    assert len(diagnosis.advice) >= 2 and "$" not in diagnosis.advice[0]
    assert diagnosis.advice[-1] == f"first error, in {tmp_path / log}: {text.splitlines()[-1].removeprefix('[rank1]:')}"


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        ({"rank3.out": TRACEBACK + "ValueError: odd\n", "slurm-12.out": AFTER}, "ValueError: odd"),
        ({"slurm-12.out": "slurm_script: line 20: module: command not found\n" + AFTER}, "command not"),
        ({"rank0.out": "/opt/python3: 2: exec: /venv/bin/python: not found\n", "slurm-12.out": AFTER}, "not found"),
        ({"slurm-12.out": AFTER}, "srun: error: n1: task 0: Exited with exit code 1"),
        (
            {
                "rank0.out": TRACEBACK + "KeyError: 'a'\n\nDuring handling of the above exception, another exception "
                "occurred:\n\n" + TRACEBACK + "ValueError: second\n"
            },
            "KeyError: 'a'",
        ),
        (
            {"rank0.out": TRACEBACK + "KeyError: handled\nstep 1\n" + TRACEBACK + "ValueError: fatal\n"},
            "ValueError: fatal",
        ),
        (
            {"rank1.out": "".join(f"[rank1]: {line}\n" for line in (TRACEBACK + "ValueError: odd").splitlines())},
            "ValueError: odd",
        ),
        # Of the start before a requeue nothing counts.
        (
            {
                "slurm-12.out": "srun: error: n1: task 0: Killed\nslurmstepd: error: *** JOB 12 ON n1 CANCELLED AT "
                "2026-11-28T10:00:00 DUE TO PREEMPTION ***\nsrun: error: n2: task 5: Aborted\n"
            },
            "srun: error: n2: task 5: Aborted",
        ),
    ],
)
def test_an_unknown_cause_keeps_its_own_words(
    logs: dict[str, str], line: str, cfg: TrainConfig, tmp_path: Path
) -> None:
    for name, text in logs.items():
        (tmp_path / name).write_text(BOOST + text)
    diagnosis = diagnosed(cfg, tmp_path)
    assert diagnosis.cause is None and line in diagnosis.error_line
    assert diagnosis.advice == [f"first error, in {tmp_path / next(iter(logs))}: {diagnosis.error_line}"]


def test_a_killed_rank_comes_before_the_exceptions_that_it_caused(cfg: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "rank0.out").write_text(TRACEBACK + "RuntimeError: Connection closed by peer\n")
    (tmp_path / "slurm-12.out").write_text("srun: error: n2: task 1: Killed\n" + AFTER)
    cfg.stage_path = str(tmp_path)
    error = {"rank": 0, "type": "RuntimeError", "message": "Connection closed by peer"}
    assert (diagnose(cfg, RunFolder(tmp_path), 0, error).cause or "").startswith("rank 1 on n2 was killed")


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("", "exit status 2"),
        ("slurmstepd: error: execve(): python: No such file or directory\n", "exit status 2: slurmstepd: error: exec"),
        ("srun: error: n2: task 3: Killed\n", "srun: error: n2: task 3: Killed"),
    ],
)
def test_a_jobs_state_comes_with_its_first_error(log: str, reason: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.create(config_yaml="{}\n", command=["train.py"], overrides=[], state="submitted")
    (tmp_path / "slurm-12.out").write_text(log)
    (tmp_path / EXIT).write_text('{"exit_code": 2, "job_id": "12", "ended_at": "2026-11-28T10:00:00Z"}')
    status = run.status()
    assert (status.reason or "").startswith(reason) and status.rank == (3 if "task 3" in log else None)


def test_a_log_without_an_error_names_none(tmp_path: Path) -> None:
    (tmp_path / "rank0.out").write_text(BOOST + "step 50 of 50\n")
    assert first_error(tmp_path) is None


@pytest.mark.parametrize(
    ("table", "cause", "advice"),
    [
        ("- pattern: 'execve.*(?P<file>/x\\S+):'\n  meaning: site says $file\n", "site says /x/python", "first error"),
        ("- pattern: '('\n  meaning: x\n", "the node has no /x/python", "causes.yaml is not a table of causes"),
        ("- meaning: x\n", "the node has no /x/python", "causes.yaml is not a table of causes"),
        ("a: b: c\n", "the node has no /x/python", "causes.yaml is not a table of causes"),
        ("- 3\n", "the node has no /x/python", "causes.yaml is not a table of causes"),
    ],
)
def test_a_user_adds_causes_that_come_first_and_a_bad_table_hides_nothing(
    table: str, cause: str, advice: str, cfg: TrainConfig, tmp_path: Path
) -> None:
    (tmp_path / "slurm-12.out").write_text("slurmstepd: error: execve(): /x/python: No such file or directory\n")
    (tmp_path / "causes.yaml").write_text(table)
    diagnosis = diagnosed(cfg, tmp_path)
    assert (diagnosis.cause or "").startswith(cause) and any(advice in line for line in diagnosis.advice)


def test_every_entry_says_what_to_do_and_where_it_comes_from() -> None:
    causes = read_causes(CAUSES)
    assert all(cause.meaning and cause.source and (cause.remedy or cause.numbers) for cause in causes)
    assert len({cause.pattern for cause in causes}) == len(causes)
