"""The schema of every configuration: names (Megatron's), types, ranges and what they mean; `conf/` holds the values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import nemo_bench.composition  # noqa: F401  registers the resolvers that conf/ uses
from nemo_bench.errors import BenchError, ConfigurationRefused
from nemo_bench.fields import PATH, choice, field_problems, kernel, normalise, number, settings
from nemo_bench.flops import Architecture

T = TypeVar("T")


@dataclass
class OptimConfig:
    """Adam and its schedule; the defaults are the 24.09 recipe's."""

    lr: float = number(3e-4, least=0, most=10)
    min_lr: float = number(3e-5, least=0, most=10)  # reached at trainer.max_steps by cosine annealing
    warmup_steps: int = number(2000, least=0, most=10**9)  # linear
    weight_decay: float = number(0.1, least=0, most=10)
    adam_beta1: float = number(0.9, least=0, below=1)
    adam_beta2: float = number(0.95, least=0, below=1)
    adam_eps: float = number(1e-8, least=0, most=1)
    clip_grad: float = number(1.0, least=0)  # global gradient norm
    use_distributed_optimizer: bool = True  # shard optimizer state over the data-parallel ranks
    use_megatron_fsdp: bool = kernel(False)  # Megatron-FSDP in its place, which shards what the next key says
    data_parallel_sharding_strategy: str = choice("optim_grads_params", "optim_grads", "optim")
    fsdp_double_buffer: bool = False  # keep the memory of two gathered layers, instead of allocating it each time
    suggested_communication_unit_size: int | None = number(None, least=1, most=2**40)  # parameters gathered ahead
    overlap_grad_reduce: bool = True  # reduce gradients while the backward pass goes on
    overlap_param_gather: bool = True  # gather parameters while the next forward pass goes on
    overlap_param_gather_with_optimizer_step: bool | None = None  # of the first chunk; null: where NVIDIA does so
    grad_reduce_in_fp32: bool = False  # the recipe reduces gradients in bf16
    use_precision_aware_optimizer: bool | None = kernel(None)  # null: see TrainConfig.precision_aware_optimizer
    store_param_remainders: bool = False  # with it: of a main weight only the 16 bits that the bf16 parameter lacks
    exp_avg_dtype: str = choice("fp32", "bf16")  # with it: bf16 halves the first moment
    exp_avg_sq_dtype: str = choice("fp32", "bf16")  # and the second
    bucket_size: int | None = number(134217728, least=1, most=2**40)  # parameters; null: Megatron's choice


@dataclass
class ModelConfig:
    """Architecture, parallel layout and fusions of a Llama 3.1."""

    name: str = MISSING
    # architecture
    num_layers: int = number(least=1, most=10_000)
    hidden_size: int = number(least=1, most=2**20)
    ffn_hidden_size: int = number(least=1, most=2**22)
    num_attention_heads: int = number(least=1, most=2**16)
    num_query_groups: int = number(least=1, most=2**16)  # key/value heads
    seq_length: int = number(least=1, most=2**27)  # tokens
    vocab_size: int = number(least=1, most=2**24)  # the tokenizer's; see TrainConfig.padded_vocab_size
    make_vocab_size_divisible_by: int = number(128, least=1, most=2**16)
    rotary_base: int = number(500000, least=1, most=2**40)
    rope_scaling: bool = True  # Llama 3.1's, by a factor of 8; Llama 3 has none
    init_method_std: float = number(0.02, above=0, most=10)
    layernorm_epsilon: float = number(1e-5, above=0, most=1)
    # parallel layout
    tensor_model_parallel_size: int = number(1, least=1, most=10_000)
    pipeline_model_parallel_size: int = number(1, least=1, most=10_000)
    virtual_pipeline_model_parallel_size: int | None = number(None, least=1, most=10_000)
    context_parallel_size: int = number(1, least=1, most=10_000)
    sequence_parallel: bool = False  # no effect at tensor_model_parallel_size=1
    micro_batch_size: int = number(1, least=1, most=2**20)  # sequences
    global_batch_size: int = number(least=1, most=2**24)  # sequences
    attention_backend: str = choice("fused", "flash", "unfused", "local", "auto")  # Megatron's; fused: cuDNN's
    # fusions
    apply_rope_fusion: bool = kernel(True)
    bias_activation_fusion: bool = True
    bias_dropout_fusion: bool = True
    masked_softmax_fusion: bool = kernel(True)
    cross_entropy_loss_fusion: bool = True
    cross_entropy_fusion_impl: str = choice("te", "native")  # Transformer Engine's kernel; native: Megatron's own
    persist_layer_norm: bool = kernel(True)
    fused_single_qkv_rope: bool = kernel(False)  # RoPE on queries, keys and values in place, without splitting them
    use_transformer_engine_op_fuser: bool = kernel(False)  # the MLP as Transformer Engine's fused operations
    gradient_accumulation_fusion: bool = kernel(True)  # the weight gradient's product adds to the step's gradient
    # communication and the pipeline
    defer_embedding_wgrad_compute: bool | None = None  # null: see TrainConfig.defers_embedding_wgrad
    account_for_embedding_in_pipeline_split: bool = False  # it stands in the place of a layer on its stage
    account_for_loss_in_pipeline_split: bool = False
    pipeline_model_parallel_layout: str | None = None  # every layer's chunk, in Megatron's grammar: "Et*2|(t*2|)*3,tL"
    wgrad_deferral_limit: int = number(22, least=0, most=2**24)  # micro-batches deferred at most; 0: all
    tp_comm_overlap: bool = kernel(False)  # tensor-parallel communication under the matrix products (user buffers)
    tp_comm_overlap_cfg: str | None = "auto"  # NeMo's table of user buffers; auto: by sizes; null: the defaults
    # memory and launch overhead
    recompute_granularity: str | None = choice(None, "selective", "full")  # selective: recompute_modules; full: layers
    recompute_modules: list[str] = field(
        default_factory=lambda: ["core_attn"], metadata={"valid": ["core_attn", "mlp", "layernorm"]}
    )
    recompute_method: str | None = choice(None, "uniform", "block")  # of full
    recompute_num_layers: int | None = number(None, least=1, most=10_000)  # of full
    cpu_offloading_num_layers: int = number(0, least=0, most=10_000)  # whose activations wait in the host's memory
    cuda_graph_impl: str = choice("none", "local")  # local: Megatron records what cuda_graph_scope says, and replays it
    cuda_graph_scope: str = choice("full", "full_iteration")  # each layer, or a step's forward and backward passes
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass
class PrecisionConfig:
    """Number formats of the training step."""

    name: str = MISSING  # fp32, bf16 or fp8
    trainer_precision: str = choice(MISSING, "32", "bf16-mixed")  # Lightning's words
    fp8: str | None = choice(None, "hybrid", "e4m3")  # Transformer Engine's; hybrid: e4m3 forward, e5m2 backward
    fp8_recipe: str = choice("delayed", "tensorwise", "blockwise", "mxfp8")  # scaling factors
    fp4: str | None = choice(None, "e2m1")  # matrix products in NVFP4, in place of fp8
    fp8_margin: int = number(0, least=0, most=64)
    fp8_amax_history_len: int = number(1024, least=1, most=2**20)
    fp8_amax_compute_algo: str = choice("max", "most_recent")
    fp8_param_gather: bool = False  # keep and gather parameters in fp8
    fp8_dot_product_attention: bool = False  # attention's products in fp8 too
    first_last_layers_bf16: bool = False  # not with delayed scaling
    num_layers_at_start_in_bf16: int = number(1, least=0, most=10_000)
    num_layers_at_end_in_bf16: int = number(1, least=0, most=10_000)


@dataclass
class TrainerConfig:
    """Lightning's trainer: how many processes, how many steps."""

    num_nodes: int = number(least=1, most=100_000)
    devices: int = number(least=1, most=4096)  # processes (one a GPU) on each node
    max_steps: int = number(50, least=1, most=10**9)
    seed: int = number(1234, least=0, most=2**32 - 1)  # of the data's order; NeMo gives the weights a fixed seed
    gc_interval: int = number(100, least=1, most=10**9)  # steps between manual, synchronised Python garbage collections
    limit_val_batches: int = number(0, least=0, most=10**9)  # global batches validated after the last step
    time_collectives: bool = True  # on GPUs by two events around each, so that a rank slower than its peers is named


@dataclass
class DataConfig:
    """Where the tokens come from."""

    name: str = MISSING
    kind: str = choice(MISSING, "mock", "local", "megatron")  # random, this Python's library, .bin/.idx files
    paths: list[str] = field(default_factory=list, metadata=PATH)  # kind=megatron: prefixes, without .bin/.idx
    weights: list[float] = field(default_factory=list, metadata={"least": 0})  # one a path; empty: all equal
    tokenizer: str | None = field(default=None, metadata=PATH)  # kind=megatron: folder of a Hugging Face tokenizer
    split: str = "99,1,0"  # train, validation, test
    num_workers: int = number(2, least=0, most=1024)  # data loading processes a rank
    folder: str | None = field(default=None, metadata=PATH)  # of prepared files and Megatron's index mappings
    corpus_bytes: int = number(6_000_000, least=1, most=10**12)  # kind=local: about this much text


@dataclass
class GpuConfig:
    """What the device can do; peaks are DENSE TFLOP/s (no sparsity) per number format."""

    name: str = MISSING
    device: str = choice("cuda", "cpu")
    driver_name: str | None = None  # what the driver calls it; a report does not take another for it
    memory_gib: float | None = number(None, above=0)
    gpus_per_node: int = number(8, least=1, most=4096)  # of the systems it comes in
    compute_capability: float | None = number(None, least=1, below=100)  # CUDA's: 9.0 is Hopper, 10.0 Blackwell
    peak_tflops: dict[str, float | None] = field(default_factory=dict, metadata={"above": 0})  # null: is measured
    sustained_tflops: dict[str, float] = field(default_factory=dict, metadata={"above": 0})  # for seconds on end
    memory_gb_s: float | None = number(None, above=0)
    power_limit_w: float | None = number(None, above=0)
    # What an estimate takes for an average GPU of this cluster in bf16, and for its slowest; null: constants.yaml's.
    matrix_tflops: float | None = number(None, above=0)
    slowest_matrix_tflops: float | None = number(None, above=0)
    source: str = ""  # where the peaks come from


@dataclass
class ContainerConfig:
    """How srun starts a container (NVIDIA's PyXis plugin with enroot)."""

    image: str = MISSING  # a squash file, or an image name that enroot can import
    mounts: list[str] = field(default_factory=list)  # besides the stage folder and the project, which always are
    writable: bool = True
    mount_home: bool = False
    python: str = "python3"  # the container's interpreter, which has NeMo


@dataclass
class ClusterConfig:
    """The machine or cluster that runs the job; null leaves an option out of the request."""

    name: str = MISSING
    scheduler: str = choice(MISSING, "none", "slurm")  # none: this machine starts the ranks itself; slurm
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    nodelist: str | None = None
    exclude: str | None = None
    time: str | None = "01:00:00"  # limit, in one of sbatch's forms
    exclusive: bool = True
    mem: str | None = "0"  # 0: all of a node's memory
    gpus_per_node: str | None = None  # in sbatch's words, 8 or h100:8; null where the cluster refuses such requests
    gres: str | None = None  # in its place where the cluster wants --gres=gpu:8
    cpus_per_task: int | None = number(None, least=1, most=10_000)
    nvlink_gpus: int | None = number(None, least=1, most=10_000)  # joined by NVLink: 72 on NVL72; null: a node's
    nvlink_gb_s: float | None = number(None, above=0)  # between two GPUs, one direction; null: a DGX H100's
    nic_gb_s: float | None = number(None, above=0)  # one NIC (one a GPU), in a ring over two nodes
    dependency: str | None = None
    comment: str | None = None
    signal_s: int = number(120, least=1, most=65_535)  # SIGUSR1 this long before the time limit, for a last checkpoint
    additional_parameters: dict[str, Any] = field(default_factory=dict)  # any other sbatch option: value
    srun_args: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)  # shell lines before srun
    vboost: bool = False  # let the GPUs boost the rest of the chip's clock, as NVIDIA does: nvidia-smi boost-slider
    numa_gpus: int | None = number(None, least=1, most=4096)  # GPUs of a NUMA node: ranks keep to its CPUs (numactl)
    tp_comm_overlap: bool = False  # whether points use user buffers: NVLink multicast objects, which may outlive a kill
    env: dict[str, str] = field(default_factory=dict)  # environment of the ranks, over entrypoint.env
    container: ContainerConfig | None = None  # null: bare on the nodes, with this interpreter


@dataclass
class EntrypointConfig:
    """The program that trains, and its container."""

    name: str = MISSING
    stack: str = "nemo2"  # the module of entrypoints/ that knows it
    version: str = MISSING  # default folder name under results/
    container: str = ""  # registry reference of its container image
    image: str = MISSING  # file name of its container image in the stage folder
    program: str | None = None  # nemo_24_09: path of its program, inside the container; nemo2 is a module of ours
    env: dict[str, str | None] = field(default_factory=dict)  # environment of every rank; null: not set
    settings: dict[str, Any] = field(default_factory=dict)  # nemo_24_09: NeMo 1's own keys; they win over all others


@dataclass
class CheckpointConfig:
    """Off by default: a performance benchmark writes none."""

    every_n_steps: int | None = number(None, least=1, most=10**9)
    resume_from: str | None = field(default=None, metadata=PATH)  # a run, or one checkpoint: all of its state
    weights_from: str | None = field(default=None, metadata=PATH)  # weights alone


@dataclass
class ProfileConfig:
    """Which steps are profiled, where, and with what."""

    kind: str = choice("none", "torch", "nsys")  # torch: PyTorch's profiler; nsys: NVIDIA Nsight Systems
    start_step: int = number(10, least=0, most=10**9)  # from 0; the step before it warms the profiler up
    end_step: int = number(12, least=0, most=10**9)  # last profiled step
    ranks: list[int] = field(default_factory=lambda: [0], metadata={"least": 0, "most": 10**9})
    record_shapes: bool = False  # kind=torch; these three make the trace larger and the profiled steps slower
    with_stack: bool = False  # Python's call stacks
    profile_memory: bool = False
    trace: str = "cuda,nvtx"  # kind=nsys: its --trace
    nsys_args: list[str] = field(default_factory=list)  # further options of `nsys profile`


@dataclass
class LoggerConfig:
    """Where each step's numbers go besides the run folder."""

    kind: str = choice("none", "tensorboard", "wandb", "mlflow")


@dataclass
class TrainConfig:
    """One benchmark point."""

    model: ModelConfig = field(default_factory=ModelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    gpu: GpuConfig = field(default_factory=GpuConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    entrypoint: EntrypointConfig = field(default_factory=EntrypointConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    launch: str = choice("run", "dry")  # dry: compose, check, print what would run; run nothing
    repeats: int = number(1, least=1, most=1000)  # runs of the point, each a job of its own
    stage_path: str = field(default=MISSING, metadata=PATH)
    results_version: str = MISSING
    check_memory: bool = True  # refuse a point whose estimated memory exceeds the GPU's by more than 5%
    total_tokens: float = number(1e12, above=0, most=1e18)  # the budget behind "days to train"

    @property
    def world_size(self) -> int:
        """Processes in the job, one a GPU."""
        return self.trainer.num_nodes * self.trainer.devices

    @property
    def model_parallel_size(self) -> int:
        """GPUs that hold one copy of the model and share its sequences: TP * PP * CP."""
        m = self.model
        return m.tensor_model_parallel_size * m.pipeline_model_parallel_size * m.context_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Copies of the model (DP)."""
        return self.world_size // self.model_parallel_size

    @property
    def weight_copies(self) -> int:
        """GPUs that hold the same weights, over which Megatron shards: data- and context-parallel ones."""
        return self.data_parallel_size * self.model.context_parallel_size

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches each copy of the model works through in a step (gradient accumulation, GA)."""
        return self.model.global_batch_size // (self.model.micro_batch_size * self.data_parallel_size)

    @property
    def defers_embedding_wgrad(self) -> bool:
        """Whether the output layer's weight gradients wait for the end of a step (`defer_embedding_wgrad_compute`).

        Gradients reduced meanwhile lose what is deferred (Megatron-LM's issue 1012); `true` has the recipe's timing.
        """
        m, wanted = self.model, self.model.defer_embedding_wgrad_compute
        reduced_meanwhile = m.optim.overlap_grad_reduce and self.weight_copies > 1
        possible = m.pipeline_model_parallel_size > 1 and m.gradient_accumulation_fusion
        return possible and (not reduced_meanwhile if wanted is None else wanted)

    @property
    def precision_aware_optimizer(self) -> bool:
        """Whether Adam reads gradients in the format they are reduced in (`optim.use_precision_aware_optimizer`).

        Not with fp8 parameters: after the first step their layers got hardly any gradient (H200, megatron-core 0.15.3).
        """
        o, wanted = self.model.optim, self.model.optim.use_precision_aware_optimizer
        possible = o.use_distributed_optimizer and not o.use_megatron_fsdp and not self.precision.fp8_param_gather
        return (possible and self.gpu.device == "cuda") if wanted is None else wanted

    @property
    def gathers_with_optimizer_step(self) -> bool:
        """Whether parameters are gathered during the optimizer's step (`overlap_param_gather_with_optimizer_step`)."""
        o, wanted = self.model.optim, self.model.optim.overlap_param_gather_with_optimizer_step
        chunks = self.model.virtual_pipeline_model_parallel_size or 1
        possible = o.overlap_param_gather and chunks > 1 and self.checkpoint.every_n_steps is None
        usual = possible and self.gpu.device == "cuda" and self.data_parallel_size > 1
        return usual if wanted is None else wanted

    @property
    def architecture(self) -> Architecture:
        """The sizes that decide the number of parameters and the FLOPs."""
        return Architecture(**{size.name: getattr(self.model, size.name) for size in fields(Architecture)})

    @property
    def padded_vocab_size(self) -> int:
        """Vocabulary as Megatron lays it out: padded so that each tensor-parallel rank gets an equal, aligned share."""
        multiple = self.model.make_vocab_size_divisible_by * self.model.tensor_model_parallel_size
        return math.ceil(self.model.vocab_size / multiple) * multiple


@dataclass(frozen=True)
class ComposedPoint:
    """One point of a sweep as Hydra composed it, and the overrides that made it."""

    config: DictConfig
    overrides: list[str]

    @property
    def name(self) -> str:
        return " ".join(self.overrides) or "the defaults"


ConfigStore.instance().store(name="train_schema", node=TrainConfig)


def typed(cfg: DictConfig) -> TrainConfig:
    """Return a benchmark point as an object; the checks report its values together with every other problem."""
    return _object(TrainConfig, cfg)


def typed_as(schema: type[T], cfg: DictConfig) -> T:
    """Return the composed configuration of another script; raise ConfigurationRefused for values out of their range."""
    result = _object(schema, cfg)
    if problems := field_problems(result):
        raise ConfigurationRefused(problems)
    return result


def load(path: Any) -> TrainConfig:
    """Return the configuration in a run folder (`config.yaml`); raise BenchError if the file is damaged."""
    try:
        return typed(DictConfig(OmegaConf.load(path)))
    except (OmegaConfBaseException, YAMLError, OSError) as error:
        raise BenchError(f"{path} holds no configuration: {str(error).splitlines()[0]}") from None


def _object(schema: type[T], cfg: DictConfig) -> T:
    result = OmegaConf.to_object(cfg)
    if not isinstance(result, schema) or any(len(vars(owner)) > len(fields(owner)) for _, owner, _ in settings(result)):
        # A file, or a key that `+key=value` forced in: slower, and refuses such a key.
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.to_container(cfg, resolve=True))
        result = OmegaConf.to_object(merged)
    assert isinstance(result, schema)
    normalise(result)
    return result
