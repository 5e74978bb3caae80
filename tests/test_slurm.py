"""Submission without a cluster: settings, scripts, refused input and job states."""

from __future__ import annotations

import json
import os
import subprocess
import time
import tomllib
from pathlib import Path

import pytest
from cli import toolkit

from toolkit.errors import UserError
from toolkit.recipe import load_recipe, recipe_hash
from toolkit.runs import Run
from toolkit.slurm import sbatch
from toolkit.slurm.array import take_run
from toolkit.slurm.job_status import QueueEntry, SlurmJob, state_of
from toolkit.slurm.settings import find_profile, local_reason, read_profile, resolve_settings
from toolkit.study.directory import StudyDirectory, StudyRun, claim

REPOSITORY = Path(__file__).resolve().parent.parent
QUICKSTART = str(REPOSITORY / "recipes" / "quickstart.toml")
TWO_SEEDS = ("--set", "study.seeds=[0,1]")
SPACE = "{ optimizer = { lr = { uniform = [0.1, 0.2] } } }"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("TOOLKIT_SLURM_PROFILES", raising=False)


def profile(text: str, name: str = "lab") -> Path:
    """Write a profile file where the toolkit looks for it."""
    path = Path("slurm/profiles") / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def submit(*arguments: str, status: int = 0) -> str:
    """Run `toolkit submit quickstart ARGUMENTS`; return the script or the error message."""
    outcome = toolkit("submit", QUICKSTART, *arguments)
    assert outcome.status == status, outcome.stderr
    assert not Path("runs").exists()
    return outcome.stdout if status == 0 else outcome.stderr


def test_the_batch_script_in_the_repository_matches_the_template() -> None:
    assert (REPOSITORY / "slurm" / "train.sbatch").read_text() == sbatch.template()


def test_job_scripts_are_valid_bash() -> None:
    many = submit(*TWO_SEEDS, "--parallel", "1", "--dry-run")
    assert "#SBATCH --array=0-1%1\n" in many
    search = submit("--set", f"study.space={SPACE}", "--set", "study.bohb.trials=9", "--parallel", "4", "--dry-run")
    assert "#SBATCH --array=0-3\n" in search
    for text in (sbatch.template(), submit("--dry-run"), many, search):
        assert text.startswith("#!/bin/bash\n")
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        assert text.endswith(sbatch.body())


def test_the_example_profile_is_valid() -> None:
    """It ships with the package, so that --profile example works wherever the package is installed."""
    found = find_profile("example")
    assert found == Path(sbatch.__file__).parent / "profiles" / "example.toml"
    assert read_profile(found).defaults.time == "4:00:00"


def test_the_script_requests_the_given_resources(tmp_path: Path) -> None:
    profile('shared = ["/"]\n[defaults]\npartition = "gpu"\ntime = "1:00:00"\nsignal = "USR2"')
    options = "--nodes 2 --gpus-per-node 4 --gpu-type a100 --cpus-per-task 16 --memory 64G --time 2-12 --profile lab"
    text = submit(*options.split(), "--set", 'slurm.options=["--exclusive"]', "--dry-run")
    lines = {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert lines >= {
        "job-name=quickstart", "nodes=2", "ntasks-per-node=1", "gpus-per-node=a100:4", "cpus-per-task=16", "mem=64G",
        "time=2-12", "partition=gpu", "requeue", "signal=B:USR2@120", "exclusive", "open-mode=append",
        f"chdir={tmp_path}",
    }  # fmt: skip
    assert {"nodes=2", "gpus_per_node=4", "processes_per_node=4", "signal=USR2"} <= set(text.splitlines())


def test_command_options_override_the_recipe_which_overrides_the_profile() -> None:
    profile('[defaults]\naccount = "profile"\nqos = "profile"\npartition = "profile"')
    recipe = Path("mine.toml")
    recipe.write_text(f'extends = "{QUICKSTART}"\n[slurm]\nprofile = "lab"\nqos = "recipe"\npartition = "recipe"\n')
    table = resolve_settings(load_recipe(recipe, ['slurm.partition="command"'])).table
    assert (table.account, table.qos, table.partition, table.nodes) == ("profile", "recipe", "command", 1)


def test_the_slurm_table_does_not_change_the_recipe_hash() -> None:
    assert recipe_hash(load_recipe(QUICKSTART, ["slurm.nodes=3"])) == recipe_hash(load_recipe(QUICKSTART))


@pytest.mark.parametrize("text", ["90", "4:00", "4:00:00", "2-12", "2-12:30", "2-12:30:15"])
def test_time_limits_are_parsed(text: str) -> None:
    assert f"#SBATCH --time={text}\n" in submit("--time", text, "--dry-run")


@pytest.mark.parametrize("text", ["4h", "4 hours", "4:60:00", "-1", "1:2:3:4", "", "4:00:00\n#SBATCH --uid=0"])
def test_invalid_time_limits_are_refused(text: str) -> None:
    assert "slurm.time" in submit("--time", text, "--dry-run", status=2)


def test_recipe_errors_are_reported_before_slurm_errors() -> None:
    assert "did you mean epochs" in submit("--set", "train.epoch=3", "--nodes", "0", status=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "0"], "slurm.nodes"),
        (["--memory", "lots"], "slurm.memory"),
        (["--partition", "gpu; rm -rf ~"], "slurm.partition"),
        (["--account", "a\nb"], "slurm.account"),
        (["--set", 'slurm.options=["--wrap=$(id)"]'], "slurm.options"),
        (["--set", 'slurm.options=["rm"]'], "slurm.options"),
        (["--set", "slurm.node=2"], "did you mean nodes"),
        (["--gpus-per-node", "2", "--processes-per-node", "3"], "one process per GPU"),
        (["--gpu-type", "a100"], "set the number of GPUs"),
        (["--processes-per-node", "3"], "batch_size"),
        (["--parallel", "2"], "--parallel is for studies"),
        (["--set", "study.seeds=[]"], "study.seeds"),
        (["--set", "study.grid={ optimizer = { l = [1, 2] } }"], "did you mean lr"),
        ([*TWO_SEEDS, "--set", "train.batch_size=33", "--processes-per-node", "2"], "batch_size"),
        (["--set", f"study.space={SPACE}", "--set", "study.bohb.trials=9", "--nodes", "2"], "on one node"),
        (["--profile", "lap"], "did you mean lab?"),
    ],
)
def test_invalid_submissions_are_refused(arguments: list[str], words: str) -> None:
    profile("")
    assert words in submit(*arguments, "--dry-run", status=2)


def test_submitting_without_slurm_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "toolkit train" in submit(status=2)
    assert "no SLURM" in submit(*TWO_SEEDS, status=2)
    assert "#SBATCH" in submit("--dry-run")


def test_errors_in_a_profile_are_named() -> None:
    path = profile('set_up = ["x"]\n[defaults]\npartitoin = "gpu"\ntime = "4h"')
    with pytest.raises(UserError) as error:
        read_profile(path)
    text = str(error.value)
    assert "did you mean setup" in text
    assert "did you mean defaults.partition" in text
    assert "defaults.time" in text
    with pytest.raises(UserError, match=r"lab.toml.*line 1"):
        read_profile(profile("not toml"))


def test_secrets_are_not_written_to_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="looks like a secret"):
        read_profile(profile('[variables]\nWANDB_API_KEY = "abc"'))
    monkeypatch.setenv("WANDB_API_KEY", "planted-secret")
    assert "planted-secret" not in submit("--dry-run")


def test_the_profiles_settings_are_in_the_script() -> None:
    profile(
        'setup = ["module load cuda"]\npython = "my python"\ncontainer = "apptainer exec x"\n[variables]\nA = "b c"'
    )
    lines = submit("--profile", "lab", "--dry-run").splitlines()
    assert {"module load cuda", "python='my python'", "container='apptainer exec x'", "export A='b c'"} <= set(lines)


def test_profiles_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "config" / "toolkit" / "slurm"
    home.mkdir(parents=True)
    (home / "home.toml").write_text("")
    assert find_profile("home") == home / "home.toml"
    monkeypatch.setenv("TOOLKIT_SLURM_PROFILES", str(tmp_path))
    (tmp_path / "home.toml").write_text("")
    assert find_profile("home") == tmp_path / "home.toml"


def test_packaged_profiles_are_found_from_any_folder(tmp_path: Path) -> None:
    """They ship with the package, so that --profile works with an installed package."""
    shipped = find_profile("example")
    assert Path.cwd() == tmp_path
    assert shipped == Path(sbatch.__file__).parent / "profiles" / "example.toml"
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert "profiles/*.toml" in project["tool"]["setuptools"]["package-data"]["toolkit.slurm"]


def test_a_run_root_on_a_local_disk_is_refused_for_several_nodes_only(tmp_path: Path) -> None:
    profile(f'shared = ["{tmp_path}"]', "shared")
    elsewhere = 'recipe.run_root="/tmp/nowhere"'
    message = submit("--nodes", "2", "--set", elsewhere, "--dry-run", status=2)
    assert "below /tmp" in message
    assert "shared = [" in message
    outcome = toolkit("submit", QUICKSTART, "--set", elsewhere, "--dry-run")
    assert outcome.status == 0
    assert "may not see it" in outcome.stderr
    submit("--nodes", "2", "--profile", "shared", "--dry-run")


def test_the_file_system_of_a_path_is_found(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "d / ext4 rw 0 0\nd /home nfs4 rw 0 0\nd /home/my\\040disk xfs rw 0 0\n"
        "d /fast tmpfs rw 0 0\nd /lustre lustre rw 0 0\n"
    )
    assert local_reason(Path("/home/me"), [], mounts) is None
    assert local_reason(Path("/lustre/me"), [], mounts) is None
    assert local_reason(Path("/home/my disk/x"), [], mounts) == (False, "is on a file system of this machine (xfs)")
    assert local_reason(Path("/fast/x"), [], mounts) == (True, "is on a file system of this machine (tmpfs)")
    assert local_reason(Path("/opt/x"), [], mounts) == (False, "is on a file system of this machine (ext4)")
    assert local_reason(Path("/tmp/x"), [], mounts) == (True, "is below /tmp, which is local to each machine")
    assert local_reason(Path("/tmp/x"), ["/tmp"], mounts) is None


def a_run(name: str = "20260102-030405-abcd", job: str | None = "7", array: Path | None = None) -> Run:
    """Write a run directory as submission leaves it."""
    path = Path("runs/quickstart") / name
    (path / "slurm").mkdir(parents=True)
    (path / "checkpoints").mkdir()
    run = Run(path)
    run.write_text("recipe.toml", Path(QUICKSTART).read_text())
    if job is not None:
        SlurmJob(run).write_record(job, array=array)
    return run


def entry(state: str, job: str = "7", reason: str = "None") -> dict[str, QueueEntry]:
    """Return a queue with one job."""
    return {job: QueueEntry(job, state, reason, "3:59:00")}


def test_the_state_of_a_job_is_read_from_queue_and_run_directory() -> None:
    run = a_run()
    job = SlurmJob(run)
    pending = state_of(run, entry("PENDING", reason="Priority"))
    assert (pending.state, pending.detail, pending.job, pending.requeued) == ("pending", "Priority", "7", 0)
    (job.folder / "starts").write_text(f"7 0 {int(time.time()) - 130} node1\n")
    run.write_json("environment.json", {})
    os.utime(run.path / "environment.json", (time.time() - 100,) * 2)
    run.metrics_file.write_text(
        "".join(f'{{"epoch": {e}, "train/loss": 1.0, "val/loss": 1.0}}\n' for e in (1, 2, 3, 4, 5))
    )
    running = state_of(run, entry("RUNNING"))
    assert (running.state, running.epoch, running.epochs) == ("running", 5, 20)
    assert running.detail == "about 5 min to go, time limit in 3:59:00"  # 5 epochs in 100 s, 15 to go
    job.record_exit(3, "stopped by the file stop")
    assert state_of(run, entry("PENDING", reason="BeginTime")).requeued == 1
    assert state_of(run, entry("FAILED")).state == "interrupted"
    job.record_exit(1, "the loss is nan\nlook at optimizer.lr")
    assert (state_of(run, {}).state, state_of(run, {}).detail) == ("failed", "look at optimizer.lr")
    (job.folder / "cancelled").touch()
    assert state_of(run, {}).state == "cancelled"
    run.write_json("summary.json", {"best": {"epoch": 1, "test_accuracy": 0.5}, "last": {"epoch": 2}})
    assert (state_of(run, {}).state, state_of(run, {}).detail) == ("finished", "test accuracy 0.5000")


def test_a_job_without_an_outcome_gets_its_state_from_queue_and_lock() -> None:
    run = a_run()
    assert state_of(run, None).state == "unknown"
    SlurmJob(run).log.write_text("something\nslurmstepd: error: out of memory\n\n")
    failed = state_of(run, entry("OUT_OF_MEMORY"))
    assert (failed.state, failed.detail) == ("failed", "OUT_OF_MEMORY: slurmstepd: error: out of memory")
    assert state_of(run, entry("CANCELLED")).state == "cancelled"
    local = a_run("20260102-030405-0000", job=None)
    assert (state_of(local, None).state, state_of(local, None).detail) == ("failed", "no checkpoint")
    lock = local.lock()
    assert state_of(local, None).state == "running"
    lock.release()


@pytest.mark.parametrize(
    ("answer", "state", "detail"),
    [
        ("echo FAILED", "failed", "FAILED: the last words"),
        ("echo 'CANCELLED by 0'", "cancelled", ""),
        ("echo slurmdbd is down >&2; exit 1", "failed", "the last words"),
    ],
)
def test_sacct_gives_the_state_of_a_job_that_squeue_no_longer_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, state: str, detail: str
) -> None:
    sacct = tmp_path / "bin" / "sacct"
    sacct.parent.mkdir()
    sacct.write_text(f'#!/bin/sh\ncase "$*" in *--jobs=7*) {answer} ;; esac\n')
    sacct.chmod(0o755)
    monkeypatch.setenv("PATH", str(sacct.parent), prepend=os.pathsep)
    run = a_run()
    SlurmJob(run).log.write_text("the last words\n")
    found = state_of(run, {})
    assert found.state == state
    assert detail in found.detail


def test_each_run_of_an_array_is_assigned_once() -> None:
    folder = StudyDirectory(Path("runs/quickstart"))
    runs = [a_run(f"20260102-030405-000{index}", "30", folder.path) for index in range(4)]
    members = [StudyRun("row", seed, {}, str(seed), run.id) for seed, run in enumerate(runs)]
    record = {"name": "quickstart", "file": "s.toml", "study": {"seeds": 4}, "search": None, "complete": True}
    folder.write(record, members)
    runs[0].write_json("summary.json", {})
    assert state_of(runs[1], {"30_0": entry("PENDING", "30_0", "Priority")["30_0"]}).state == "pending"
    lock = claim(runs[3])  # a worker of the study on another machine
    assert lock is not None
    taken = [take_run(folder, "30", task) for task in ("0", "1", "2")]
    lock.release()
    assert taken == [runs[1], runs[2], None]
    assert take_run(folder, "30", "1") == runs[2]  # a requeued task gets its own run again
    assert state_of(runs[2], entry("RUNNING", "30_1")).state == "running"
    assert take_run(folder, "31", "0") == runs[1]  # a later submission


def test_status_logs_and_cancel_report_that_there_are_no_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    outcome = toolkit("status")
    assert outcome.status == 2
    assert "runs does not exist" in outcome.stderr
    run = a_run(job=None)
    run.log_file.write_text("epoch 1\n")
    assert "no checkpoint" in toolkit("status").stdout
    assert toolkit("logs", str(run.path)).stdout == "epoch 1\n"
    outcome = toolkit("cancel", str(run.path))
    assert outcome.status == 2
    assert "not submitted" in outcome.stderr


def test_status_of_a_study_names_the_row_of_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows with the same recipe share a run; a run started on its own belongs to no row."""
    monkeypatch.setenv("PATH", "/nonexistent")
    folder = StudyDirectory(Path("runs/quickstart"))
    runs = [a_run(f"20260102-030405-000{index}", None, folder.path) for index in range(3)]
    members = [StudyRun("sgd, lr 0.1", 7, {}, "a", runs[0].id), StudyRun("adam", 8, {}, "b", runs[1].id),
               StudyRun("again", 7, {}, "a", runs[0].id)]  # fmt: skip
    record = {"name": "quickstart", "file": "s.toml", "study": {"seeds": 4}, "search": None, "complete": True}
    folder.write(record, members)
    for path in ("runs/quickstart", "runs"):
        found = json.loads(toolkit("status", path, "--json").stdout)
        assert [(each["row"], each["seed"]) for each in found] == [("sgd, lr 0.1; again", 7), ("adam", 8), (None, None)]
        lines = toolkit("status", path).stdout.splitlines()[-4:]
        assert lines[0].split() == ["run", "row", "seed", "job", "state", "epoch", "requeued"]
        assert lines[1].split("  ")[:3] == ["quickstart/20260102-030405-0000", "sgd, lr 0.1; again", "7"]
        assert lines[3].split()[1:3] == ["-", "-"]


def test_status_does_not_list_a_published_folder_as_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    run = a_run(job=None)
    for folder in (run.path / "publish", run.path.parent / "for-the-hub"):
        folder.mkdir()
        (folder / "recipe.toml").write_text((run.path / "recipe.toml").read_text())
        (folder / "model.safetensors").touch()
    for path in ("runs", str(run.path.parent)):
        assert [found["run"] for found in json.loads(toolkit("status", path, "--json").stdout)] == [str(run.path)]
