"""Declare every key of a run as frozen dataclasses, each with its rule beside it.

One tree: `RunConfig`. A key that is not declared here, or by the chosen model, objective, optimizer
or sampler, is an error. Everything after `launch.py` sees these, never Hydra's objects. Rules of
several sections together, and of files and data sets, are in `wm_train/checks/`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from wm_train.config import registry
from wm_train.config.kinds import ModelConfig, ObjectiveConfig, OptimizerConfig, SamplerConfig
from wm_train.config.problems import AT, Problem
from wm_train.config.roles import ALONE, DistillConfig, RoleConfig, TrajectoriesConfig, Turns
from wm_train.config.rules import (
    AtLeastZero,
    Count,
    CountOrZero,
    Factor,
    Few,
    Gigabytes,
    NoiseLevel,
    Rule,
    Seconds,
    from_to,
    one_of,
)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # becomes a folder; no separators
STEP_RANGE = re.compile(r"([1-9]\d*)(?:-([1-9]\d*))?")
# parallel.sharding -> what it can offload to
OFFLOADS = {"fsdp": ("none", "cpu"), "zero3": ("none", "cpu", "nvme")}
# groups, of trainer.evaluate
METRICS = ("psnr", "cameras", "revisit", "drift", "symmetry", "turns")
PER_STAGE = ("model", "data", "parallel", "trainer")  # sections that a stage may change key by key


def steps_of(text: str | None) -> range | None:
    """Return the steps of `10` or `10-15`, no steps for None, and None for anything else."""
    match = STEP_RANGE.fullmatch(text) if text is not None else None
    if match is None:
        return range(0) if text is None else None
    steps = range(int(match[1]), int(match[2] or match[1]) + 1)
    return steps if len(steps) else None


# Rules that name other things stand here: inside a class their names would not be found.
FOLDER_NAME = Rule(
    lambda name: NAME.fullmatch(name) is not None,
    "at most 100 letters, digits, '.', '_' and '-', the first a letter or digit, as it names a"
    " folder",
)
STEP_RULE = Rule(lambda text: steps_of(text) is not None, "steps such as 10-15, or null")
GROUPS = Rule(lambda names: set(names) <= set(METRICS), f"some of {', '.join(METRICS)}")
WEIGHTS = Rule(
    lambda weights: all(0 < weight < math.inf for weight in weights.values()),
    "a finite weight above 0 for each data set",
)


@dataclass(frozen=True)
class DataConfig:
    """Configure the data. `path` is the data set whose codec decodes and whose statistics
    normalise; held-out clips are its own."""

    path: str = "???"
    # data sets to train on, path -> weight; empty: `path` alone
    mixture: Annotated[dict[str, float], WEIGHTS] = field(default_factory=dict)
    # allow a mixture of unlike frame rates: latents of a step then span different times
    mixed_rates: bool = False
    # raw frames below a stage's `frames` that shorter clips are cut to; a step's clips have one
    # length
    buckets: Annotated[
        tuple[int, ...], Rule(lambda sizes: all(n > 0 for n in sizes), "raw frame counts from 1")
    ] = ()
    pack: bool = False  # rows of the stage's `frames` filled with several clips of any length
    # files that `data_shards.filter` wrote: of the data set that each was made for, only what it
    # keeps
    selection: tuple[str, ...] = ()
    prefetch: Few = 2  # batches read ahead
    readers: Few = 2  # clips read at the same time
    # fail | quarantine: leave the shard out on all processes and draw other clips in its place
    on_bad_shard: Annotated[str, one_of("fail", "quarantine")] = "fail"
    bad_shard_budget: CountOrZero = 8  # quarantined shards before the run stops all the same
    # how long a read that storage does not answer is tried again before all processes start anew
    retry_s: Seconds = 60.0
    # a folder on a local disk that keeps what was read from shards, for all processes of a node;
    # null: none
    cache: Annotated[str, Rule(bool, "a folder or null")] | None = None
    cache_gb: Gigabytes = 50.0  # 10^9 bytes that it may take


@dataclass(frozen=True)
class ParallelConfig:
    """Configure the mesh: world = dp_replicate x dp_shard x ring x ulysses. null: derive the value
    (parallel/degrees.py)."""

    dp_replicate: int = 1
    dp_shard: int | None = None  # null: whatever the worker count leaves
    cp: int | None = None  # processes that share a clip; null: ulysses x ring, so 1 without them
    ulysses: int | None = None  # at most the heads; null: cp / ring, or gcd(heads, key heads, cp)
    ring: int | None = None  # null: cp / ulysses
    # native | deepspeed | xfuser: the softmax attention over the sequence group
    attention: Annotated[str, one_of("native", "deepspeed", "xfuser")] = "native"
    # auto (by bytes sent) | usp (Ulysses x ring) | need (the frames that the mask lets a rank see):
    # how native attention reaches the keys and values of other processes
    attention_exchange: Annotated[str, one_of("auto", "usp", "need")] = "auto"
    # fp32 | bf16 (bf16 compute, fp32 master weights and reduction)
    precision: Annotated[str, one_of("fp32", "bf16")] = "fp32"
    compile: bool = False  # torch.compile of each block, between its collectives
    # of collectives in a block that activation_checkpointing computes again: answers (kept) |
    # keep_attention (softmax attention is not computed again) | collectives (repeated, none kept)
    recompute: Annotated[str, one_of("answers", "keep_attention", "collectives")] = "answers"
    offload_activations: bool = False  # activations wait for the backward pass in host memory
    # fsdp | zero3 (DeepSpeed; over all processes, AdamW only)
    sharding: Annotated[str, one_of(*OFFLOADS)] = "fsdp"
    # none | cpu (weights, gradients and optimizer in host memory, where the update runs) | nvme
    # (zero3: master weights and optimizer on a disk; an average, ema_decay, makes each step read
    # the state once more)
    offload_state: str = "none"
    nvme_path: str | None = None  # a folder on each node's own disk, for offload_state=nvme

    def problems(self) -> Iterator[Problem]:
        """Yield ways to save memory that do not go together."""
        offloads = OFFLOADS[self.sharding]
        if self.offload_state not in offloads:
            yield Problem(
                "offload_state", repr(self.offload_state), f"one of {', '.join(offloads)}"
            )
        if self.attention != "native" and self.attention_exchange == "need":
            rule = f"auto or usp with {self.attention}, which has an exchange of its own"
            yield Problem("attention_exchange", "need", rule, f"{AT}attention_exchange=auto")
        if self.sharding == "zero3" and self.compile:
            rule = "false with zero3, which gathers inside each module"
            yield Problem("compile", "true", rule, f"{AT}compile=false")
        if self.sharding == "zero3" and self.dp_replicate > 1:
            rule = "1 with zero3, which spreads weights over all processes"
            yield Problem("dp_replicate", str(self.dp_replicate), rule, f"{AT}dp_replicate=1")
        if (self.offload_state == "nvme") != (self.nvme_path is not None):
            rule = "a folder on a local disk with offload_state=nvme, and null otherwise"
            yield Problem("nvme_path", str(self.nvme_path), rule, f"{AT}nvme_path=<folder>")


@dataclass(frozen=True)
class TrainerConfig:
    """Configure the running of a stage: saving, checks, measurements and samples, and their
    intervals."""

    checkpoint_every: Count = 50  # steps
    # a folder, or a store: s3://bucket/prefix; null: each stage's own folder under `out`
    checkpoint_to: Annotated[str, Rule(bool, "a folder, an address or null")] | None = None
    async_checkpoint: bool = True  # training waits for the copy to host buffers only
    keep_last: Count = 2
    keep_every: CountOrZero = 0  # checkpoints of every n-th step are kept for good; 0 = none
    keep_best: CountOrZero = 0  # checkpoints with the lowest held-out loss kept besides; 0 = none
    # stop | skip: what to do with a loss or gradient that is not finite, or spikes
    on_bad_step: Annotated[str, one_of("stop", "skip")] = "stop"
    bad_step_budget: CountOrZero = 10  # skipped steps before the run goes back, or stops
    # how often it goes back to the checkpoint before them, to leave out all batches since; then it
    # stops
    rewinds: CountOrZero = 1
    spike_factor: Factor = (
        0.0  # a loss above this many times the recent median is bad; 0 = no limit
    )
    # steps (from 1) whose batch is left out
    skip_steps: Annotated[
        tuple[int, ...], Rule(lambda steps: all(n > 0 for n in steps), "step numbers from 1 on")
    ] = ()
    # steps between comparisons of replicated state, also before each checkpoint; 0 = none
    sdc_every: CountOrZero = 100
    # a rank whose own work takes this many times the others' median is named; 0 = none is
    straggler_factor: Factor = 1.5
    # steps of which rank 0 writes a trace: 10-15
    profile: Annotated[str, STEP_RULE] | None = None
    accumulate: Count = 1  # micro-batches per step
    validate_every: CountOrZero = 50  # steps between held-out losses; 0 = at the end only
    validation_clips: CountOrZero = 8  # 0 = no held-out loss
    samples: CountOrZero = 2  # validation clips rolled out at the end of a stage; 0 = none
    sample_steps: Count = 20  # Euler steps of a rollout, where a stage's sampler has no levels
    # groups of metrics that judge the samples, some of METRICS; []: none
    evaluate: Annotated[tuple[str, ...], GROUPS] = ("psnr",)
    evaluate_every: CountOrZero = 0  # also at every n-th held-out loss; 0 = at the end only
    before: bool = True  # evaluate: also the checkpoint before, if no earlier one has been judged
    evaluate_strict: bool = False  # a scorer that is not installed is an error, not a gap
    # what estimates the samples' camera paths: map | colmap | given:<folder> | command:<program>
    poses: Annotated[str, Rule(bool, "an estimator")] = "map"
    # the folder that data_shards.record made, whose depth `map` needs; null: none
    recording: Annotated[str, Rule(bool, "a folder or null")] | None = None
    quality: Annotated[str, Rule(bool, "a frame scorer")] = "musiq"  # of drift


@dataclass(frozen=True)
class StageConfig:
    """Configure one stage of the curriculum. `frames` are raw video frames, 8k+1 for a codec of
    stride 8.

    `model`, `data`, `parallel` and `trainer` hold the run's values with the stage's own changes in
    them: in YAML and on the command line a stage gives only what differs. Weights are handed on by
    parameter name. A name that the source does not have is refused unless the stage's own model
    adds it or a pattern of `new` covers it; patterns are shell globs over names:
    `blocks.*.attn.qkv.*`.
    """

    index: int
    frames: Count
    steps: Count  # the stage ends here at the latest
    global_batch: Count
    # each: a pool of the run trains its own model | together: the run's workers train all as one
    pools: Annotated[str, one_of("each", "together")] = "each"
    # at most so many of launcher.workers, where it needs fewer than others; null: all
    workers: Count | None = None
    # it ends earlier at the first held-out loss (trainer.validate_every) of at most this; 0 = no
    # such gate
    until_loss: AtLeastZero = 0.0
    # "previous" | a checkpoint directory, ours or a diffusers one | null: start from the seed
    inherit: str | None = None
    inherit_weights: Annotated[str, one_of("ema", "raw")] = "ema"
    inherit_optimizer: bool = False  # also take the optimizer's moments; false: start from zero
    new: tuple[str, ...] = ()  # parameters that the source lacks: they start as initialised
    # parameters that start as initialised although the source has them
    reinitialise: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()  # parameters that this stage does not train
    # latent frames of a chunk, the first holds one more; 0 = one chunk, bidirectional
    chunk_frames: CountOrZero = 0
    model: ModelConfig = field(default_factory=lambda: registry.default("models"))
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    objective: ObjectiveConfig = field(default_factory=lambda: registry.default("objectives"))
    optimizer: OptimizerConfig = field(default_factory=lambda: registry.default("optimizers"))
    sampler: SamplerConfig = field(default_factory=lambda: registry.default("samplers"))
    # networks beside the student, whose keys are the stage's own: teacher, critic
    roles: dict[str, RoleConfig] = field(default_factory=dict)
    turns: Turns = ALONE  # whose optimizer steps, again and again: S student, C critic
    distill: DistillConfig | None = None  # null: the stage trains on the data
    trajectories: TrajectoriesConfig | None = None  # null: the clips of `data.path` as they are

    def problems(self) -> Iterator[Problem]:
        """Yield a warm-up that is longer than the stage."""
        if self.optimizer.warmup_steps > self.steps:
            rule = f"0 to the stage's {self.steps} steps"
            yield Problem("optimizer.warmup_steps", str(self.optimizer.warmup_steps), rule)

    def rows_apart(self) -> bool:
        """Return whether packed rows go through the model one by one, each with its layout."""
        mixed = self.model.needs().mixed_documents and self.objective.mixed_documents()
        return self.data.pack and not mixed


@dataclass(frozen=True)
class RecipeConfig:
    """Map stage names to stages; `index` gives the order and the number for `stage=3`."""

    name: str
    stages: dict[str, StageConfig]


@dataclass(frozen=True)
class BackendConfig:
    """Configure the device and its kernels."""

    name: str = "auto"  # auto, one of wm_train/backends, or one that an installed package adds
    # auto | triton | reference: what computes the GDN layers; auto falls back with a log line
    kernels: Annotated[str, one_of("auto", "triton", "reference")] = "auto"
    # auto, or one engine of wm_train/kernels/attention/choose.py for the softmax blocks
    attention: str = "auto"
    threads: Annotated[int, from_to(1, 4096)] = (
        1  # CPU threads per worker; a fixed number makes CPU runs repeat to the bit
    )
    collective_timeout_s: Seconds = 120.0
    deterministic: bool = False  # libraries that give the same bits in every run, and are slower


@dataclass(frozen=True)
class SlurmConfig:
    """Configure the batch script for SLURM; null leaves it to the cluster's defaults."""

    submit: bool = False  # false: write the script only
    # torchrun | ray: starts the workers inside the job
    runner: Annotated[str, one_of("torchrun", "ray")] = "torchrun"
    # dependency | array: several stages as jobs that wait for each other, or as the tasks of one
    # array
    chain: Annotated[str, one_of("dependency", "array")] = "dependency"
    account: str | None = None
    partition: str | None = None
    time: str | None = None  # as sbatch takes it: 1-12:00:00
    devices: str | None = None  # --gres of each node: gpu:8
    # words put before the command on every node: [apptainer, exec, image.sif]
    container: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()  # further srun options: [--container-image=image.sqsh] with pyxis
    setup: tuple[str, ...] = ()  # shell lines run before anything else: [module load compilers]
    options: tuple[str, ...] = ()  # further sbatch options: [--exclusive]
    # seconds before the time limit at which the run saves, leaves and is queued again
    signal_s: CountOrZero = 120
    requeue: bool = True

    def problems(self) -> Iterator[Problem]:
        """Yield text that would break the script, and array tasks that would not be queued
        again."""
        for key, value in vars(self).items():
            words = value if isinstance(value, tuple) else (value,)
            if any(isinstance(w, str) and (not w or not w.isprintable()) for w in words):
                rule = "printable text on one line, as it goes into a batch script"
                yield Problem(key, repr(value), rule)
        if self.chain == "array" and not self.requeue:
            rule = (
                f"true with {AT}chain=array, whose tasks go back into the queue until the stage"
                " before them has ended"
            )
            fix = f"{AT}requeue=true, or {AT}chain=dependency"
            yield Problem("requeue", "False", rule, fix)


@dataclass(frozen=True)
class KubernetesConfig:
    """Configure the RayJob for Kubernetes."""

    submit: bool = False  # false: write the manifest only
    image: str | None = None  # holds this package and its dependencies
    claim: str | None = None  # persistent volume claim that holds `data.path` and `out`
    mount: str = "/shared"  # where it is mounted, in the pods and on the machine of this command
    namespace: str = "default"
    memory: str = "16Gi"  # of each node
    devices: str | None = None  # of each node, as resource:count
    # a Secret whose keys become environment variables: credentials of an object store
    environment_from: str | None = None


@dataclass(frozen=True)
class LauncherConfig:
    """Configure the number of workers, and the launcher that places them."""

    name: str = "ray"  # ray | torchrun | slurm | kubernetes | inline
    workers: Count = 2  # over all nodes
    cpus_per_worker: Count = 1
    # null: join the cluster of RAY_ADDRESS or of `ray job submit`, else start one
    address: str | None = None
    max_restarts: CountOrZero = 3
    # ray: how long to wait for free resources, also for a lost node to come back
    place_s: Seconds = 60.0
    # ray: after a loss go on with as many as there is room for, down to this; null: with all or not
    # at all
    min_workers: int | None = None
    # ray: with fewer, the least time between a start and growing again, once a lost node is back
    grow_s: Seconds = 60.0
    preflight: bool = True  # check every node before the first step
    # torchrun: machines, each of which starts the same command; slurm, kubernetes: nodes of the job
    nodes: Count = 1
    endpoint: str | None = None  # torchrun: host:port of one of them, where they meet
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)


@dataclass(frozen=True)
class TrackerConfig:
    """Configure the tracker that gets the record of a run besides its own folder."""

    name: Annotated[str, one_of("mlflow", "none")] = "mlflow"
    uri: str | None = None  # null: sqlite file in `out`
    experiment: Annotated[str, Rule(bool, "a name")] = "wm_train"
    # id of the run that this one is part of; the launcher sets it for pools
    parent: str | None = None


@dataclass(frozen=True)
class PoolConfig:
    """Configure one of several groups of workers that train together, each its own model: MoWorld's
    experts for high and low noise (§3.4.1)."""

    # the part of each stage's noise levels that this pool trains; null: all of them
    sigma_min: NoiseLevel | None = None
    sigma_max: NoiseLevel | None = None
    # as on the command line: [launcher.workers=8, parallel.cp=2, model.depth=12]
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunConfig:
    """Configure a whole run. `stage` takes a number, a name, a range `1-2`, or `all`."""

    name: Annotated[str, FOLDER_NAME]
    recipe: RecipeConfig
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig
    backend: BackendConfig
    launcher: LauncherConfig
    tracker: TrackerConfig
    trainer: TrainerConfig
    stage: str = "all"
    out: Annotated[str, Rule(bool, "a folder")] = "runs"
    seed: Annotated[int, from_to(0, 2**63 - 1)] = 0
    pools: dict[str, PoolConfig] = field(default_factory=dict)  # several groups of workers
    pool: str | None = None  # one of them alone; null: all of them together
    resume: bool = True  # continue from the newest valid checkpoint of this run directory
