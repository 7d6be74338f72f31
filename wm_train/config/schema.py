"""The run configuration as frozen dataclasses. Everything after `launch.py` sees these, never a
DictConfig (design §7).

One tree: `RunConfig`. A key that is not a field here is an error, so this file is the reference of
every key a user may set. Rules that types cannot state (finite, positive, divisible, existing path)
are in `validate.py`, which reports all problems at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised; `name` is a key of `wm_train.objectives.OBJECTIVES`."""

    name: str = "flow_matching"
    sigma_mean: float = 0.0  # logit-normal: sigma = sigmoid(mean + std * normal), then shifted
    sigma_std: float = 1.0
    flow_shift: float = 1.0  # sigma -> shift * sigma / (1 + (shift - 1) * sigma)
    # only noise levels of this range, after the shift, are drawn: as the untruncated ones fall
    # inside it
    sigma_min: float = 0.0
    sigma_max: float = 1.0
    image_condition: float = (
        1.0  # share of clips that see their first latent frame clean (sigma 0, no loss)
    )
    camera_dropout: float = 0.0
    text_dropout: float = 0.0
    # of chunk_mixture: shares of one sigma, rising from any chunk, rising to the last chunk, clean
    # past
    chunk_mixture: tuple[float, float, float, float] = (0.1, 0.4, 0.4, 0.1)


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule; every schedule is a pure function of the step."""

    # adamw | normuon (matrices of the blocks at lr, AdamW at lr * adamw_lr_scale for the rest)
    name: str = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01  # on weights with two or more dimensions only
    momentum: float = 0.95  # of normuon
    adamw_lr_scale: float = (
        0.1  # of normuon: Waypoint-1.5 uses 1e-3 for matrices and 1e-4 for the rest
    )
    warmup_steps: int = 10
    schedule: str = "constant"  # constant | cosine (to 10 % of lr at the stage's last step)
    clip_norm: float = 1.0
    ema_decay: float = 0.99  # 0 = no EMA


@dataclass(frozen=True)
class StageModel:
    """What a stage changes of the run's model; null: as `model` says. Parameters go on by name, new
    ones start as initialised."""

    softmax_every: int | None = None
    camera: bool | None = None
    causal: bool | None = None


@dataclass(frozen=True)
class StageParallel:
    """What a stage changes of the run's mesh and precision; null: as `parallel` says."""

    dp_replicate: int | None = None
    dp_shard: int | None = None
    cp: int | None = None
    ulysses: int | None = None
    ring: int | None = None
    precision: str | None = None


@dataclass(frozen=True)
class SamplerConfig:
    """How a stage turns noise into clips. Levels reach the model as they are, sigma from 1 to 0."""

    # euler (the whole clip at once) | stream (chunk by chunk, the past clean and in a state: what a
    # chunk-causal model is deployed with, and the only choice for one)
    name: str = "euler"
    # how many Euler steps, spaced by the objective's flow_shift; or the sigmas where they start,
    # falling from 1, the last step going to 0; null: trainer.sample_steps
    levels: int | tuple[float, ...] | None = None
    # condition -> weight: plain + weight * (with the condition - plain), at twice the cost; 1 = off
    guidance: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StageConfig:
    """One step of the curriculum. `frames` are raw video frames, 8k+1 for a codec of temporal
    stride 8.

    Weights are handed on by parameter name. A name that the source does not have is refused unless
    the stage's own model adds it or a pattern of `new` covers it; patterns are shell globs over
    names: `blocks.*.attn.qkv.*`.
    """

    index: int
    frames: int
    steps: int  # the stage ends here at the latest
    global_batch: int
    # it ends earlier at the first held-out loss (trainer.validate_every) of at most this; 0 = no
    # such gate
    until_loss: float = 0.0
    inherit: str | None = (
        # "previous" | a checkpoint directory, ours or a diffusers one | null: start from the seed
        None
    )
    inherit_weights: str = "ema"  # ema | raw
    inherit_optimizer: bool = (
        False  # also take the optimizer's moments; false: they start from zero
    )
    new: tuple[str, ...] = ()  # parameters that the source lacks: they start as initialised
    reinitialise: tuple[
        str, ...
    ] = ()  # parameters that start as initialised although the source has them
    frozen: tuple[str, ...] = ()  # parameters that this stage does not train
    parallel: StageParallel = field(default_factory=StageParallel)
    chunk_frames: int = (
        0  # latent frames of a chunk, the first holds one more; 0 = one chunk, bidirectional
    )
    model: StageModel = field(default_factory=StageModel)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)


@dataclass(frozen=True)
class RecipeConfig:
    """An ordered mapping stage name -> stage; `index` gives the order and what `stage=3` means."""

    name: str
    stages: dict[str, StageConfig]


@dataclass(frozen=True)
class ModelConfig:
    """Backbone shape; `name` is a key of `wm_train.models.MODELS`. `latent_channels` must equal the
    data set's."""

    name: str = "sana_wm"
    latent_channels: int = 48
    depth: int = 4
    width: int = 128
    heads: int = 4
    softmax_every: int = (
        4  # block i is softmax when (i + 1) % softmax_every == 0, else frame-wise GDN; 0 = none is
    )
    ffn_ratio: float = 3.0
    conv_kernel: int = 4  # K short convolution of a GDN block, in latent frames
    patch_size: int = 1
    camera: bool = True
    # raymaps of all raw frames after each attention; False: only an up/latitude map at the input
    plucker: bool = True
    text_width: int = 0  # 0 = no text conditioning
    causal: bool = False  # chunk-causal variant
    window_chunks: int = (
        0  # chunk-causal softmax looks this many chunks back, its own included; 0 = the whole past
    )
    sink_frames: int = 1  # first latent frames that stay visible when the window has moved on
    # none | block (recompute blocks in backward) | selective (all but products and attention)
    activation_checkpointing: str = "none"


@dataclass(frozen=True)
class DataConfig:
    """`path` is the data set whose codec decodes and whose statistics normalise; held-out clips are
    its own."""

    path: str = "???"
    mixture: dict[str, float] = field(
        default_factory=dict
    )  # data sets to train on, path -> weight; empty: `path` alone
    buckets: tuple[
        int, ...
        # raw frames below a stage's `frames` that shorter clips are cut to; a step's clips have one
        # length
    ] = ()
    pack: bool = False  # rows of the stage's `frames` filled with several clips of any length
    selection: tuple[
        str, ...
        # files that `data_shards.filter` wrote: of the data set that each was made for, only what it
        # keeps
    ] = ()
    prefetch: int = 2  # batches read ahead
    readers: int = 2  # clips read at the same time
    # fail | quarantine: leave the shard out on all processes and draw other clips in its place
    on_bad_shard: str = "fail"
    bad_shard_budget: int = 8  # quarantined shards before the run stops all the same
    # how long a read that storage does not answer is tried again before all processes start anew
    retry_s: float = 60.0
    cache: str | None = (
        # a folder on a local disk that keeps what was read from shards, for all processes of a
        # node; null: none
        None
    )
    cache_gb: float = 50.0  # 10^9 bytes that it may take


@dataclass(frozen=True)
class ParallelConfig:
    """world = dp_replicate x dp_shard x ring x ulysses. null asks for the derived value, see
    parallel/degrees.py."""

    dp_replicate: int = 1
    dp_shard: int | None = None  # null: whatever the worker count leaves
    cp: int | None = None  # processes that share a clip; null: ulysses x ring, so 1 without them
    ulysses: int | None = None  # at most the heads; null: cp / ring, without ring gcd(heads, cp)
    ring: int | None = None  # null: cp / ulysses
    # native | deepspeed | xfuser: whose softmax attention runs over the sequence group
    attention: str = "native"
    precision: str = "fp32"  # fp32 | bf16 (bf16 compute, fp32 master weights and reduction)
    compile: bool = False  # torch.compile of each block, between its collectives
    offload_activations: bool = False  # what backward needs waits in host memory
    sharding: str = "fsdp"  # fsdp | zero3 (DeepSpeed; over all processes, AdamW only)
    # none | cpu (weights, gradients and optimizer in host memory, where the update runs) | nvme
    # (zero3: master weights and optimizer on a disk; an average, ema_decay, makes each step read
    # the state once more)
    offload_state: str = "none"
    nvme_path: str | None = None  # a folder on each node's own disk, for offload_state=nvme


@dataclass(frozen=True)
class BackendConfig:
    name: str = "auto"  # auto, one of wm_train/backends, or one that an installed package adds
    # auto | triton | reference: what computes the GDN layers; auto falls back with a log line
    kernels: str = "auto"
    attention: str = (
        "auto"  # auto, or one engine of wm_train/kernels/attention/choose.py for the softmax blocks
    )
    threads: int = 1  # CPU threads per worker; a fixed number makes CPU runs repeat to the bit
    collective_timeout_s: float = 120.0


@dataclass(frozen=True)
class SlurmConfig:
    """What the batch script asks SLURM for; null leaves it to the cluster's defaults."""

    submit: bool = False  # false: write the script only
    runner: str = "torchrun"  # torchrun | ray: who starts the workers inside the job
    # dependency | array: several stages as jobs that wait for each other, or as the tasks of one
    # array
    chain: str = "dependency"
    account: str | None = None
    partition: str | None = None
    time: str | None = None  # as sbatch takes it: 1-12:00:00
    devices: str | None = None  # --gres of each node: gpu:8
    container: tuple[
        str, ...
    ] = ()  # words put before the command on every node: [apptainer, exec, image.sif]
    srun: tuple[str, ...] = ()  # further srun options: [--container-image=image.sqsh] with pyxis
    setup: tuple[str, ...] = ()  # shell lines run before anything else: [module load compilers]
    options: tuple[str, ...] = ()  # further sbatch options: [--exclusive]
    signal_s: int = (
        120  # seconds before the time limit at which the run saves, leaves and is queued again
    )
    requeue: bool = True


@dataclass(frozen=True)
class KubernetesConfig:
    """What the RayJob asks Kubernetes for."""

    submit: bool = False  # false: write the manifest only
    image: str | None = None  # holds this package and its dependencies
    claim: str | None = None  # persistent volume claim that holds `data.path` and `out`
    mount: str = (
        "/shared"  # where it is mounted, in the pods and on the machine that runs this command
    )
    namespace: str = "default"
    memory: str = "16Gi"  # of each node
    devices: str | None = None  # of each node, as resource:count
    environment_from: str | None = (
        None  # a Secret whose keys become environment variables: credentials of an object store
    )


@dataclass(frozen=True)
class LauncherConfig:
    name: str = "ray"  # ray | torchrun | slurm | kubernetes | inline
    workers: int = 2  # over all nodes
    cpus_per_worker: int = 1
    address: str | None = (
        None  # null: join the cluster of RAY_ADDRESS or of `ray job submit`, else start one
    )
    max_restarts: int = 3
    place_s: float = (
        60.0  # ray: how long to wait for free resources, also for a lost node to come back
    )
    min_workers: int | None = (
        # ray: after a loss go on with as many as there is room for, down to this; null: with all or
        # not at all
        None
    )
    # ray: with fewer, the least time between a start and growing again, once a lost node is back
    grow_s: float = 60.0
    preflight: bool = True  # check every node before the first step
    # torchrun: machines, each of which starts the same command; slurm, kubernetes: nodes of the job
    nodes: int = 1
    endpoint: str | None = None  # torchrun: host:port of one of them, where they meet
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)


@dataclass(frozen=True)
class TrackerConfig:
    name: str = "mlflow"  # mlflow | none
    uri: str | None = None  # null: sqlite file in `out`
    experiment: str = "wm_train"
    parent: str | None = (
        None  # id of the run that this one is part of; the launcher sets it for pools
    )


@dataclass(frozen=True)
class TrainerConfig:
    checkpoint_every: int = 50  # steps
    checkpoint_to: str | None = (
        None  # a folder, or a store: s3://bucket/prefix; null: each stage's own folder under `out`
    )
    async_checkpoint: bool = True  # training waits for the copy to host buffers only
    keep_last: int = 2
    keep_every: int = 0  # checkpoints of every n-th step are kept for good; 0 = none
    keep_best: int = 0  # checkpoints with the lowest held-out loss that are kept besides; 0 = none
    on_bad_step: str = (
        "stop"  # stop | skip: what to do with a loss or gradient that is not finite, or spikes
    )
    bad_step_budget: int = 10  # skipped steps before the run goes back, or stops
    # how often it goes back to the checkpoint before them, to leave out all batches since; then it
    # stops
    rewinds: int = 1
    spike_factor: float = 0.0  # a loss above this many times the recent median is bad; 0 = no limit
    skip_steps: tuple[int, ...] = ()  # steps (from 1) whose batch is left out
    sdc_every: int = (
        100  # steps between comparisons of replicated state, also before each checkpoint; 0 = none
    )
    straggler_factor: float = (
        1.5  # a rank whose own work takes this many times the others' median is named; 0 = none is
    )
    profile: str | None = None  # steps of which rank 0 writes a trace: 10-15
    accumulate: int = 1  # micro-batches per step
    validate_every: int = 50  # steps between held-out losses; 0 = at the end only
    validation_clips: int = 8  # 0 = no held-out loss
    samples: int = 2  # validation clips rolled out at the end of a stage; 0 = none
    sample_steps: int = 20  # Euler steps of a rollout, where a stage's sampler has no levels


@dataclass(frozen=True)
class PoolConfig:
    """One of several groups of workers that train together, each its own model: MoWorld's experts
    for high and low noise (§3.4.1)."""

    # The noise levels that this pool learns: in each stage the part of the stage's own range,
    # objective.sigma_min to sigma_max, that lies between these. null: as the stage says.
    sigma_min: float | None = None
    sigma_max: float | None = None
    overrides: tuple[
        str, ...
    ] = ()  # as on the command line: [launcher.workers=8, parallel.cp=2, model.depth=12]


@dataclass(frozen=True)
class RunConfig:
    """A whole run. `stage` takes a number, a name, a range `1-2`, or `all`."""

    name: str
    recipe: RecipeConfig
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig
    backend: BackendConfig
    launcher: LauncherConfig
    tracker: TrackerConfig
    trainer: TrainerConfig
    stage: str = "all"
    out: str = "runs"
    seed: int = 0
    pools: dict[str, PoolConfig] = field(
        default_factory=dict
    )  # several groups of workers instead of one
    pool: str | None = None  # one of them alone; null: all of them together
    resume: bool = True  # continue from the newest valid checkpoint of this run directory
