"""Writes, prints or submits a script that pretrains with torchrun or SLURM.

The script has what is easy to forget: the signals that torchrun must pass on (on SIGUSR1 it would otherwise leave its
workers as orphans), time to save before it kills them, restarts, and PYTHONSAFEPATH, which keeps the folders of the
working directory from shadowing packages.
"""

import shlex
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from patchmill.tools import cli
from patchmill.tools.console.options import parse
from patchmill.tools.console.pretrain_options import parse_pretrain

SIGNALS = "SIGTERM,SIGINT,SIGUSR1"
SHELL_LINES = ["#!/bin/bash", "set -euo pipefail"]
ENVIRONMENT = {
    "PYTHONSAFEPATH": "1",
    "OMP_NUM_THREADS": "1",  # the decoder starts its own threads
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # restarted workers must not read what dead ones wrote
}


@dataclass(frozen=True)
class LaunchConfig:
    """Writes a script that runs `patchmill pretrain` on many GPUs, and prints it. Options after -- are pretrain's.

    Examples:
        patchmill launch --gpus 8 -- --recipe mae-vit-l16 --data.path shards/ --out runs/l16
        patchmill launch --kind slurm --nodes 4 --gpus 8 --hours 24 --script l16.sbatch --submit -- --recipe mae-vit-l16
          --data.path /data/shards --out /data/runs/l16
    """

    kind: Literal["torchrun", "slurm"] = "torchrun"
    """torchrun: a script to start on every node (set NODE_RANK and MASTER_ADDR for several); slurm: a batch script"""
    nodes: int = 1
    """machines"""
    gpus: int = 8
    """GPUs (processes) per machine"""
    hours: float = 24.0
    """SLURM's time limit"""
    name: str = "patchmill"
    """name of the SLURM job"""
    sbatch: tuple[str, ...] = ()
    """more #SBATCH options, such as --partition=gpu"""
    cpus_per_gpu: int = 16
    """processors to request from SLURM for each GPU; decoding uses them"""
    grace_seconds: int = 120
    """time to finish a step and save a checkpoint before the job is killed"""
    max_restarts: int = 3
    """how often torchrun restarts after a failure; the run resumes from its newest checkpoint"""
    master_port: int = 29500
    """port of the first node at which the nodes meet"""
    signals_to_handle: str = SIGNALS
    """signals that torchrun passes on to its workers"""
    script: str | None = None
    """file to write; unset: the script is only printed"""
    submit: bool = False
    """run the script: sbatch, or bash for torchrun on one node"""

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus", "cpus_per_gpu", "grace_seconds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if self.submit and self.script is None:
            raise ValueError("--submit needs --script FILE, which keeps a record of what ran")
        if self.submit and self.kind == "torchrun" and self.nodes > 1:
            raise ValueError("--submit starts one node; for several use --kind slurm, or start the script on each")


def main(argv: list[str]) -> int:
    """Runs the command."""
    options, given = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    launch = parse(LaunchConfig, "patchmill launch", options)
    if not given:
        raise ValueError("give the options of pretrain after --: patchmill launch --gpus 8 -- --recipe mae-vit-b16 ...")
    config = parse_pretrain(given)  # finds a mistake now and not when the job starts
    ranks = launch.nodes * launch.gpus
    if config.train.global_batch % (ranks * config.train.accum_steps):
        raise ValueError(
            f"train.global_batch {config.train.global_batch} must be divisible by {ranks} GPUs times "
            f"train.accum_steps {config.train.accum_steps}"
        )
    text = render(launch, given, config.out)
    print(text, end="")
    if launch.script is None:
        return 0
    script = Path(launch.script)
    script.write_text(text, encoding="utf-8")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    if launch.submit:
        return subprocess.run(["sbatch" if launch.kind == "slurm" else "bash", str(script)], check=False).returncode
    print(f"wrote {script}", file=sys.stderr)
    return 0


def render(launch: LaunchConfig, given: list[str], run: str) -> str:
    """The text of the script. status.json in the folder `run` tells a stopped run from a failed one."""
    exports = [f"export {name}={value}" for name, value in ENVIRONMENT.items()]
    exports += [f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={launch.grace_seconds}"]
    if launch.kind == "torchrun":
        return "\n".join([*SHELL_LINES, *exports, "exec " + _torchrun(launch, given), ""])
    on_each = shlex.quote("export NODE_RANK=$SLURM_NODEID; exec " + _torchrun(launch, given))
    status = shlex.quote(f"{run}/status.json")
    minutes = round(launch.hours * 60)
    header = [
        f"--job-name={launch.name}",
        f"--nodes={launch.nodes}",
        "--ntasks-per-node=1",
        f"--gpus-per-node={launch.gpus}",
        f"--cpus-per-task={launch.cpus_per_gpu * launch.gpus}",
        f"--time={minutes // 60:02d}:{minutes % 60:02d}:00",
        f"--signal=USR1@{launch.grace_seconds}",
        "--requeue",
        *launch.sbatch,
    ]
    return "\n".join(
        [
            SHELL_LINES[0],
            *(f"#SBATCH {option}" for option in header),
            *SHELL_LINES[1:],
            *exports,
            'export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
            "code=0",
            f"srun --kill-on-bad-exit=1 bash -c {on_each} || code=$?",
            "# torchrun reports a forwarded signal as a failure; status.json says whether the run only stopped",
            f'if grep -q \'"state": "stopped"\' {status}; then scontrol requeue "$SLURM_JOB_ID"; fi',
            "exit $code",
            "",
        ]
    )


def _torchrun(launch: LaunchConfig, given: list[str]) -> str:
    line = ["torchrun", f"--nnodes={launch.nodes}", f"--nproc-per-node={launch.gpus}"]
    line += [f"--max-restarts={launch.max_restarts}", f"--signals-to-handle={launch.signals_to_handle}"]
    text = shlex.join(line)
    if launch.nodes == 1:
        text += " --standalone"
    else:
        text += f' --node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port={launch.master_port}'
    return f"{text} -m patchmill pretrain {shlex.join(given)}"


if __name__ == "__main__":
    sys.exit(cli.run("launch", sys.argv[1:]))
