"""Generate sbatch scripts. `slurm/train.sbatch` is one of them, for manual use; a test keeps it in sync."""

from __future__ import annotations

import os
import shlex
import sys
from importlib.resources import files
from pathlib import Path

from toolkit.errors import UserError
from toolkit.slurm.settings import JobSettings

TABLE_MINUTES = 30
TRAIN = "task=toolkit.slurm.job_worker"
"""Script line that selects the module with which each node trains one run."""
BY_HAND = """\
#!/bin/bash
# Train one run on SLURM, submitted manually:
#
#   sbatch slurm/train.sbatch recipes/resnet50_caltech.toml [--set TABLE.KEY=VALUE ...]
#
# Run it where `toolkit` is installed and, on several nodes, with recipe.run_root on a file system that all nodes share.
# Change the #SBATCH lines and the values below them together; the job stops with a message if they disagree.
# `toolkit submit` writes such a script from a recipe, a profile and options, with more checks beforehand.
"""


def run_script(settings: JobSettings, run: Path, name: str) -> str:
    """Return the script that trains one run."""
    header = [*_header(settings, name), _option("output", _file(run / "slurm" / "log.txt"))]
    return _script(header, settings, _values(settings), [f"run={shlex.quote(str(run))}", TRAIN])


def array_script(settings: JobSettings, folder: Path, name: str, tasks: int, parallel: int | None) -> str:
    """Return the script of a job array whose tasks each train the next open run of a study's ``folder``."""
    header = _array_header(settings, folder, name, f"0-{tasks - 1}" + ("" if parallel is None else f"%{parallel}"))
    choose = [
        f'run=$($container "$python" -m toolkit.slurm.job_entry claim {shlex.quote(str(folder))}) || exit',
        'if [ -z "$run" ]; then echo "no open run is left"; exit 0; fi',
        'exec >>"$run/slurm/log.txt" 2>&1',
        TRAIN,
    ]
    return _script(header, settings, _values(settings), choose)


def search_script(settings: JobSettings, folder: Path, name: str, workers: int) -> str:
    """Return the script of a job array whose tasks work together on a search until it is complete."""
    header = _array_header(settings, folder, name, f"0-{workers - 1}")
    # A task is one process, which starts worker processes for its GPUs.
    values = [line for line in _values(settings) if not line.startswith("processes_per_node=")]
    choose = [
        "processes_per_node=1",
        f"run={shlex.quote(str(folder / 'slurm'))}/${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID",
        "task=toolkit.slurm.search_task",
    ]
    return _script(header, settings, values, choose)


def _array_header(settings: JobSettings, folder: Path, name: str, tasks: str) -> list[str]:
    output = _option("output", _file(folder / "slurm" / "log") + "-%A_%a.txt")
    return [*_header(settings, name), output, f"#SBATCH --array={tasks}"]


def table_script(settings: JobSettings, folder: Path, name: str, array_job: str) -> str:
    """Return the script that writes the table and report after all tasks of an array have ended."""
    table = settings.table.model_copy(
        update={
            "nodes": 1, "gpus_per_node": 0, "gpu_type": None, "cpus_per_task": 1, "memory": None, "constraint": None,
            "processes_per_node": None, "time": str(TABLE_MINUTES), "options": None,
        }
    )  # fmt: skip
    small = settings.model_copy(update={"table": table})
    header = [
        *_header(small, f"{name}-table", requeue=False),
        _option("output", _file(folder / "slurm" / "table-log.txt")),
        f"#SBATCH --dependency=afterany:{array_job}",
    ]
    path = shlex.quote(str(folder))
    commands = [f'$container "$python" -m toolkit.cli.main {command} {path} || exit' for command in ("table", "report")]
    return "\n".join(["#!/bin/bash", *header, "", *_environment(small), "", *commands, ""])


def template() -> str:
    """Return the content of slurm/train.sbatch."""
    lines = [
        "#SBATCH --job-name=toolkit", "#SBATCH --output=slurm-%j.txt", "#SBATCH --open-mode=append",
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks-per-node=1", "##SBATCH --gpus-per-node=4        # ## disables a line",
        "#SBATCH --cpus-per-task=4", "#SBATCH --time=4:00:00", "#SBATCH --requeue", "#SBATCH --signal=B:USR1@120",
        "##SBATCH --partition=gpu", "##SBATCH --account=me", "",
        "nodes=1                  # as above", "gpus_per_node=0          # as above; one training process per GPU",
        "processes_per_node=1     # with GPUs: their number", "max_restarts=50", "signal=USR1              # as above",
        "python=python", "container=               # for instance: apptainer exec --nv image.sif",
        "scratch=                 # for instance: /scratch/$USER; the job's TMPDIR is created there",
        "",
        "# module load cuda; source ~/venv/bin/activate", "",
        "# The run directory: a new one, or, for a requeued job, the one it had.",
        'run=$($container "$python" -m toolkit.slurm.job_entry begin "$@") || exit', TRAIN,
    ]  # fmt: skip
    return "\n".join([BY_HAND + lines[0], *lines[1:], "", body()])


def body() -> str:
    """Return the part shared by all scripts."""
    return (files("toolkit.slurm") / "body.sh").read_text(encoding="utf-8")


def _script(header: list[str], settings: JobSettings, values: list[str], choose: list[str]) -> str:
    head = ["#!/bin/bash", "# Written by `toolkit submit`.", *header, "", *values]
    return "\n".join([*head, *_environment(settings), "", *choose, "", body()])


def _header(settings: JobSettings, name: str, *, requeue: bool = True) -> list[str]:
    table = settings.table
    gpus = f"{table.gpu_type}:{settings.gpus}" if table.gpu_type else settings.gpus
    options = {
        "job-name": name,
        "open-mode": "append",
        "chdir": _file(Path.cwd(), pattern=False),
        "nodes": table.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": gpus or None,
        "cpus-per-task": table.cpus_per_task,
        "mem": table.memory,
        "time": table.time,
        "partition": table.partition,
        "account": table.account,
        "qos": table.qos,
        "constraint": table.constraint,
    }
    lines = [_option(option, value) for option, value in options.items() if value is not None]
    if requeue:
        lines += ["#SBATCH --requeue", f"#SBATCH --signal=B:{table.signal}@{table.signal_before_s}"]
    return [*lines, *(f"#SBATCH {option}" for option in table.options or [])]


def _option(name: str, value: object) -> str:
    text = str(value)
    return f"#SBATCH --{name}={text}" if _is_plain(text) else f'#SBATCH --{name}="{text}"'


def _is_plain(text: str) -> bool:
    return all(char.isalnum() or char in "_@%+=:,./-" for char in text)


def _file(path: Path, *, pattern: bool = True) -> str:
    """Format a path for an #SBATCH line. Raises UserError for characters that sbatch does not support."""
    text = str(path if path.is_absolute() else Path.cwd() / path)
    if any(char in '"\\\n\r' for char in text):
        raise UserError(f"{text!r}: sbatch does not allow quotation marks, backslashes or line breaks in a path")
    return text.replace("%", "%%") if pattern else text


def _values(settings: JobSettings) -> list[str]:
    table = settings.table
    return [
        f"nodes={settings.nodes}",
        f"gpus_per_node={settings.gpus}",
        f"processes_per_node={settings.processes_per_node}",
        f"max_restarts={table.max_restarts}",
        f"signal={table.signal}",
    ]


def _environment(settings: JobSettings) -> list[str]:
    """Return the lines for the profile's Python, container, scratch folder, setup commands, plugins and variables."""
    profile = settings.profile
    lines = [f"python={shlex.quote(profile.python or sys.executable)}", f"container={shlex.quote(profile.container)}"]
    lines.append(f'scratch="{profile.scratch or ""}"')
    if settings.profile_name:
        lines.append(f"# profile {settings.profile_name}")
    if profile.setup:
        lines += [_ON_ERROR, *profile.setup, "trap - ERR"]
    plugins = os.environ.get("TOOLKIT_PLUGINS")
    variables = {**({"TOOLKIT_PLUGINS": plugins} if plugins else {}), **profile.variables}
    return lines + [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


_ON_ERROR = (
    'trap \'code=$?; [ "${#BASH_SOURCE[@]}" != 1 ] || '
    '{ echo "status $code from the setup line: $(sed -n "${LINENO}p" "$0")"; exit 2; }\' ERR'
)
"""Ends the job if a setup line fails. Failures in sourced files are ignored, since they often probe for features."""


if __name__ == "__main__":
    print(template(), end="")
