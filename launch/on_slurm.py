"""Write one SLURM batch script per stage into the run folder, and submit it on request.

Inside the job either a torchrun agent on every node starts the workers, or `ray symmetric-run`
turns the nodes into a Ray cluster and our Ray driver starts them, with its restarts and pools.
`signal_s` before the time limit the script asks the workers to save and leave, and requeues itself:
its next start resumes. A stage of a longer curriculum is a job that waits for the one before it
(`afterok`), or a task of one array.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from launch import frozen
from launch.frozen import Stages
from launch.progress import ProgressView
from launch.spec import AGENT, JOB_ID, USER_ERROR, LaunchSpec, fill, write_private
from launch.token import TokenError, ensure_token, environment

SEEN_WITHIN_S = 60  # for a network file system to show how a stage has ended
MEET_S = 300.0  # nodes may pull a container first
SCRIPT = """\
#!/bin/bash
{directives}
set -u
{setup}
{environment}

# An address, as names of nodes need not resolve everywhere; every job has its own port.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
port=$((20000 + SLURM_JOB_ID % 12000)) # below those that connections take
me=$SLURM_JOB_ID
# the last task of an array has the job id of the whole array, so name the task
[ -z "${{SLURM_ARRAY_JOB_ID:-}}" ] || me=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID

{step} &
step=$!
leaving=no
leave() {{
  leaving=yes
  echo "the time limit is near: asking the workers to save"
  {ask}
}}
trap leave USR1

wait "$step"
code=$?
while [ "$leaving" = yes ] && kill -0 "$step" 2>/dev/null; do # a trap interrupts wait
  wait "$step"
  code=$?
done
# code 0: the stage was complete when the time limit came near
if [ "$leaving" = yes ] && [ "$code" != 0 ] && [ {requeue} = yes ]; then
  scontrol requeue "$me"
elif [ -n "${{SLURM_ARRAY_JOB_ID:-}}" ]; then # for the next task of an array
  echo "$code" > {folder}/slurm_ended.tmp &&
    mv {folder}/slurm_ended.tmp {folder}/slurm_ended_"$SLURM_ARRAY_JOB_ID"
fi
exit "$code"
"""
# SLURM starts a task of an array as soon as no other one runs, even while the one before it is
# requeued and waits to resume.
ARRAY = """\
#!/bin/bash
{directives}
set -u
stages=({folders})
own=${{stages[$SLURM_ARRAY_TASK_ID]}}
exec >> "$own/logs/slurm_${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID.log" 2>&1
if [ "$SLURM_ARRAY_TASK_ID" -gt 0 ]; then
  before=$((SLURM_ARRAY_TASK_ID - 1))
  ended=${{stages[$before]}}/slurm_ended_$SLURM_ARRAY_JOB_ID
  queued=$(squeue --noheader --jobs="${{SLURM_ARRAY_JOB_ID}}_$before" 2>/dev/null)
  if [ ! -e "$ended" ] && [ -n "$queued" ]; then
    echo "the stage before this one has not ended: going back into the queue"
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
    exit 1
  fi
  for _ in $(seq {seen}); do # a shared file system may show it late
    [ -e "$ended" ] && break
    sleep 1
  done
  if [ "$(cat "$ended" 2>&1)" != 0 ]; then
    echo "the stage before this one did not end well: $(cat "$ended" 2>&1)"
    echo 1 > "$own/slurm_ended_$SLURM_ARRAY_JOB_ID"
    exit 1
  fi
fi
. "$own/slurm.sh"
"""
TORCHRUN = """\
srun --kill-on-bad-exit=1 {srun}{agent} \\
  --nnodes={nodes} --nproc-per-node={each} --max-restarts={restarts} --rdzv-backend=c10d \\
  --rdzv-endpoint="$address:$port" --rdzv-id="$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}" \\
  --no-python {worker}"""
# A SIGTERM to srun itself would kill it at once; this goes to the agents, which forward it and
# wait.
ASK_TORCHRUN = 'scancel --signal=TERM "$SLURM_JOB_ID.0"'
# Ray's own processes would react to a signal sent to the step, so the driver watches a file.
RAY = """\
stop={folder}/stop_$SLURM_JOB_ID
rm -f "$stop"
export PATH={bin}:$PATH # symmetric-run calls `ray`
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT={wait:.0f} # seconds for all nodes to be there
# how long the other nodes try to reach a head that has ended
export RAY_gcs_rpc_server_reconnect_timeout_s=20
srun --kill-on-bad-exit=1 {srun}{ray} symmetric-run \\
  --address "$address:$port" --min-nodes {nodes} --num-cpus={cpus} --disable-usage-stats \\
  --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 -- \\
  {driver} {job} --stop-file "$stop\""""
ASK_RAY = 'touch "$stop"'


def run(spec: LaunchSpec, view: ProgressView) -> int:
    """Write the script of this stage; submit it if asked to.

    Returns 0, or 2 when sbatch is missing or refuses.
    """
    return run_pools({"": spec}, view)


def run_pools(pools: Mapping[str, LaunchSpec], view: ProgressView) -> int:
    """Do the same as `run` for several groups of workers in one job, under Ray."""
    try:
        script = write(pools)
    except TokenError as error:
        view.text(str(error))
        return USER_ERROR
    return submit(script, next(iter(pools.values())), view)


def run_stages(stages: Stages, view: ProgressView) -> int:
    """Write the stages as one job array, a task each, of which one runs at a time."""
    try:
        for stage in stages:
            write(stage)
    except TokenError as error:
        view.text(str(error))
        return USER_ERROR
    first = next(iter(stages[0].values()))
    script = first.logs.parent / "slurm_array.sh"
    write_private(script, render_array(stages))  # setup lines may hold secrets
    return submit(script, first, view)


def write(pools: Mapping[str, LaunchSpec]) -> Path:
    """Write the script of one stage, and its inputs, into the folder of its first pool.

    Raises TokenError.
    """
    spec = next(iter(pools.values()))
    assert spec.batch is not None
    folder = spec.logs.parent
    spec.logs.mkdir(parents=True, exist_ok=True)
    if spec.batch.runner == "ray":
        write_private(folder / "slurm_job.json", frozen.to_text("ray", [_inside(pools)]))
        ensure_token(folder / "ray_token")
    script = folder / "slurm.sh"
    write_private(script, render(pools))
    return script


def submit(script: Path, spec: LaunchSpec, view: ProgressView) -> int:
    """Give a script to sbatch if asked to, and store the job id in the stage's folder.

    Returns 0, or 2 when that fails.
    """
    assert spec.batch is not None
    if not spec.batch.submit:
        after = " --dependency=afterok:<job of the stage before>" if spec.batch.after else ""
        view.text(
            f"written; submit it with: sbatch{after} {script}   (launcher.slurm.submit=true does"
            " that)"
        )
        return 0
    if shutil.which("sbatch") is None:
        view.text(
            "submitting: got no sbatch on this machine, expected SLURM's client. Fix: run this on a"
            " login node"
        )
        return USER_ERROR
    command = ["sbatch", "--parsable"]
    if spec.batch.after:
        command.append(
            f"--dependency=afterok:{spec.batch.after.read_text(encoding='utf-8').strip()}"
        )
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        view.text(
            f"submitting {script}: got {done.stderr.strip()}, expected a job. Fix: the"
            " launcher.slurm keys"
        )
        return USER_ERROR
    job = done.stdout.strip().split(";")[0]
    (spec.logs.parent / JOB_ID).write_text(job + "\n", encoding="utf-8")
    view.text(f"job {job}: {script}, log in {spec.logs / f'slurm_{job}*.log'}")
    return 0


def _inside(pools: Mapping[str, LaunchSpec]) -> dict[str, LaunchSpec]:
    """Return the specification for the driver inside the job.

    `ray symmetric-run` starts a cluster that Ray finds by itself.
    """
    return {pool: replace(spec, address="auto", batch=None) for pool, spec in pools.items()}


def directives(stages: Stages, array: bool) -> str:
    """Return the #SBATCH lines, sufficient for each of the stages.

    The stages are one job, or all tasks of an array.
    """
    spec = next(iter(stages[0].values()))
    job = spec.batch
    assert job is not None
    asked = {
        "job-name": job.name,
        "nodes": spec.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": max(_cpus(stage) for stage in stages),
        "gres": job.devices,
        "account": job.account,
        "partition": job.partition,
        "time": job.time,
        "chdir": spec.directory,
        "output": spec.logs / "slurm_%j.log",
        "open-mode": "append",
        "signal": f"B:USR1@{job.signal_s}" if job.signal_s else None,
    }
    if array:
        asked |= {"array": f"0-{len(stages) - 1}%1", "output": spec.logs / "slurm_%A_%a.log"}
    lines = [
        f"#SBATCH --{name}={shlex.quote(str(value))}"
        for name, value in asked.items()
        if value is not None
    ]
    return "\n".join(
        lines
        + ["#SBATCH --requeue"] * job.requeue
        + [f"#SBATCH {option}" for option in job.options]
    )


def _each(pools: Mapping[str, LaunchSpec]) -> int:
    """Return the number of workers per node."""
    return -(-sum(pool.workers for pool in pools.values()) // next(iter(pools.values())).nodes)


def _cpus(pools: Mapping[str, LaunchSpec]) -> int:
    """Return the number of CPUs per node."""
    return _each(pools) * max(pool.cpus_per_worker for pool in pools.values())


def render_array(stages: Stages) -> str:
    """Return the array script: task i runs the script of stage i after stage i-1 has succeeded."""
    folders = " ".join(shlex.quote(str(next(iter(stage.values())).logs.parent)) for stage in stages)
    return ARRAY.format(
        directives=directives(stages, array=True), folders=folders, seen=SEEN_WITHIN_S
    )


def render(pools: Mapping[str, LaunchSpec]) -> str:
    """Return the batch script of one stage."""
    spec = next(iter(pools.values()))
    job = spec.batch
    assert job is not None
    ray = job.runner == "ray"
    folder = spec.logs.parent
    variables = {**spec.environment, **(environment(folder / "ray_token") if ray else {})}
    step = (RAY if ray else TORCHRUN).format(
        srun="".join(shlex.quote(word) + " " for word in (*job.srun, *job.container)),
        agent=shlex.join(fill(AGENT, "")),
        worker=shlex.join(fill(spec.command, str(spec.config_path))),
        bin=shlex.quote(str(Path(sys.executable).parent)),
        ray=shlex.join(fill(("{python}", "-m", "ray.scripts.scripts"), "")),
        driver=shlex.join(fill(("{python}", "-m", "launch.frozen"), "")),
        job=shlex.quote(str(folder / "slurm_job.json")),
        folder=shlex.quote(str(folder)),
        nodes=spec.nodes,
        each=_each(pools),
        cpus=_cpus(pools),
        restarts=spec.max_restarts,
        wait=max(MEET_S, spec.place_s),
    )
    return SCRIPT.format(
        directives=directives([pools], array=False),
        setup="\n".join(job.setup),
        environment="\n".join(
            f"export {name}={shlex.quote(value)}" for name, value in variables.items()
        ),
        step=step,
        ask=ASK_RAY if ray else ASK_TORCHRUN,
        requeue="yes" if job.requeue else "no",
        folder=shlex.quote(str(folder)),
    )
