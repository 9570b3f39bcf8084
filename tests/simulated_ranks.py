"""Ranks of a machine check that answer what a machine with faults would measure: `PORT FIRST LAST FAULTS`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
from typing import Any

from nemo_bench.machine.coordination import BEAT_S, as_line

DEVICES = 8
GPU = {"serial": "16540", "uncorrected_ecc": 0, "row_remap_pending": False, "pcie": [5, 16], "max_pcie": [5, 16]}
NODE = {"driver": "580", "hca_ports": {"mlx5_0/1": "ACTIVE, 400 Gb/sec"}, "xids": [], "stage_read_gb_s": 2.0}


def answer(rank: int, task: str, argument: Any, faults: dict[str, Any]) -> Any:
    """Return what a rank would; GPUs differ by 0.7%, links by 2%."""
    spread = random.Random(f"{rank} {task} {argument}").gauss
    slow = 0.7 if rank == faults.get("slow GPU") else 1.0
    if task == "compute":
        rates = {f"{name}_tflops": tflops * spread(1, 0.007) * slow for name, tflops in (("bf16", 660), ("fp8", 1240))}
        gpu = {**GPU, **(faults["states"] if rank == faults.get("sick GPU") else {})}
        return {"rates": {**rates, "memory_gb_s": 4200.0, "to_device_gb_s": 50.0}, "clocks": {}, "gpu": gpu}
    if task == "pair":
        link = {rank, argument} == set(faults.get("slow link", ())) or rank == faults.get("slow NIC")
        link = link or argument == faults.get("slow NIC")
        usual = 350 if argument is not None and rank // DEVICES == argument // DEVICES else 46
        is_slow = link and usual == 46
        return (
            None if argument is None else {"gb_s": usual * spread(1, 0.02) * (0.5 if is_slow else 1), "latency_us": 9.0}
        )
    if task == "facts":
        node = {**NODE, **(faults["node"] if rank == faults.get("other node") else {})}
        return {"environment": {"NCCL_NVLS_ENABLE": "0"}, "node": node if argument else None}
    return {"join": faults.get("networks", ["IB"]), "group": {"all-gather 256 MiB": 300.0}}[task]


async def sit(rank: int, port: int, faults: dict[str, Any]) -> None:
    """Do as coordination.Seat does, without a thread for each of thousands."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    writer.write(as_line({"rank": rank, "result": f"n{rank // DEVICES + 1}"}))
    beating = asyncio.create_task(beat(writer))
    with contextlib.suppress(ConnectionError):
        while line := await reader.readline():
            content = json.loads(line)
            result = answer(rank, content["task"], content["argument"], faults)
            writer.write(as_line({"result": result}))
    beating.cancel()


async def beat(writer: asyncio.StreamWriter) -> None:
    while True:
        await asyncio.sleep(BEAT_S)
        writer.write(as_line({}))


async def main(port: int, first: int, last: int, faults: dict[str, Any]) -> None:
    await asyncio.gather(*(sit(rank, port, faults) for rank in range(first, last)))


if __name__ == "__main__":
    port, first, last = map(int, sys.argv[1:4])
    asyncio.run(main(port, first, last, json.loads(sys.argv[4])))
