"""Builds NVIDIA's performance recipes of an installed Megatron-Bridge 0.6 and our experiments of the same names.

Prints, as JSON, each experiment's settings that differ: {experiment: {setting: [ours, NVIDIA's]}}. No GPU, no network.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import tempfile
import typing
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import typing_extensions

# The GPUs of NVIDIA's recipe for each size on H100 and B200, and its words for number formats.
GPUS = {"8b": (8, 8), "70b": (64, 64), "405b": (1024, 128)}
PRECISIONS = {"bf16": "bf16", "fp8": "fp8cs", "mxfp8": "fp8mx", "nvfp4": "nvfp4"}
# What Hugging Face's gated repositories say of an architecture: layers, hidden size, MLP, heads.
SIZES = {"8B": (32, 4096, 14336, 32), "70B": (80, 8192, 28672, 64), "405B": (126, 16384, 53248, 128)}
# Imported by the recipes of other models.
OTHERS = "diffusers qwen_vl_utils open_clip timm flash_attn imageio av fla mamba_ssm cv2 causal_conv1d nv_grouped_gemm"
OTHERS += " webdataset decord easydict ftfy torchvision triton megatron.energon transformer_engine"


def import_recipes() -> None:
    """Import Bridge with stand-ins for what it does not need here, and without the recipes of all other models."""
    from nemo_bench.training import cpu_device, incompatibilities

    # Bridge 0.4 and later want Python 3.12, for this alone.
    typing.override = typing_extensions.override  # type: ignore[attr-defined]
    cpu_device.install()
    if importlib.util.find_spec("triton") is None:
        sys.meta_path.append(incompatibilities.StandIns(("triton",)))
    incompatibilities.resiliency_version()
    incompatibilities.transformer_engine_absent()
    absent = tuple(name for name in OTHERS.split() if importlib.util.find_spec(name) is None)
    sys.meta_path.append(incompatibilities.StandIns(absent))
    import megatron.bridge

    for package in ("recipes", "perf_recipes"):
        bare = ModuleType(f"megatron.bridge.{package}")
        bare.__path__ = [str(Path(megatron.bridge.__file__).parent / package)]
        sys.modules[bare.__name__] = bare
        setattr(megatron.bridge, package, bare)
    bridge = megatron.bridge.AutoBridge
    load = bridge.from_hf_pretrained.__func__
    bridge.from_hf_pretrained = classmethod(lambda cls, name, **more: load(cls, repository(name), **more))


def repository(name: str) -> str:
    layers, hidden, ffn, heads = next(sizes for size, sizes in SIZES.items() if size in name)
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": heads}
    llama = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    rest = {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "max_position_embeddings": 8192}
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(llama | sizes | rest))
    return str(folder)


def flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Give every setting below `value` with its name, in what JSON can say."""
    if is_dataclass(value):
        for field in fields(value):
            yield from flat(getattr(value, field.name, None), f"{name}.{field.name}".lstrip("."))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        yield name, [dict(flat(item, "item")).get("item") for item in value]
    else:
        named = value.name if isinstance(value, Enum) else value.__name__ if isinstance(value, FunctionType) else value
        yield name, named if named is None or type(named) in (bool, int, float, str) else str(named)


def differences(experiment: str, recipe: Any) -> dict[str, list[Any]]:
    import torch
    from megatron.bridge.training import comm_overlap, mixed_precision

    from nemo_bench.entrypoints import entrypoint_of
    from nemo_bench.training.megatron_bridge import build_container
    from tests.composing import composed

    size, gpu = experiment.split("_")[1], experiment.split("_")[3]
    cfg = composed(f"experiment=dgxc_26_06/{experiment}", f"scale={GPUS[size][gpu == 'b200']}gpu")
    comm_overlap.HAVE_TE, mixed_precision.is_te_min_version = True, lambda *_: True
    torch.cuda.get_device_capability = lambda: (int(cfg.gpu.compute_capability or 0), 0)
    container = build_container(cfg)
    for settings in (container, recipe):  # as Bridge does before it trains
        settings.mixed_precision.finalize()
        settings.mixed_precision.setup(settings.model, settings.optimizer, settings.ddp)
        if settings.comm_overlap is not None:
            settings.comm_overlap.finalize()
            settings.comm_overlap.data_parallel_size = cfg.data_parallel_size
            settings.comm_overlap.setup(settings.model, settings.optimizer, settings.ddp)
            settings.comm_overlap = None  # what it does stands in the others now
    ours, theirs = dict(flat(container, "")), dict(flat(recipe, ""))
    ours |= {f"env.{name}": value for name, value in entrypoint_of(cfg).environment(cfg).items()}
    theirs |= {f"env.{name}": str(theirs.pop(f"env_vars.{name}")) for name in recipe.env_vars}
    names = sorted(ours.keys() | theirs.keys())
    return {name: [ours.get(name), theirs.get(name)] for name in names if ours.get(name) != theirs.get(name)}


def main() -> None:
    compared = {}
    with redirect_stdout(sys.stderr):
        import_recipes()
        for size, counts in GPUS.items():
            name = "llama31" if size == "405b" else "llama3"
            for gpu, count in zip(("h100", "b200"), counts):
                module = importlib.import_module(f"megatron.bridge.perf_recipes.llama.{gpu}.{name}")
                for ours, theirs in PRECISIONS.items():
                    recipe = getattr(module, f"{name}_{size}_pretrain_{count}gpu_{gpu}_{theirs}_config", None)
                    if recipe is not None:
                        experiment = f"llama31_{size}_{ours}_{gpu}"
                        compared[experiment] = differences(experiment, recipe())
    print(json.dumps(compared))


if __name__ == "__main__":
    main()
