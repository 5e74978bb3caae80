# --- from here on all scripts are identical --------------------------------------------------------------------------
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}   # an array task has two numbers
job=${job:-$SLURM_JOB_ID}
restarts=${SLURM_RESTART_COUNT:-0}                                      # not set at the first start
say() { echo "$(date '+%F %T') job $job: $*"; }
stop_with() { say "$2"; echo "$1"$'\n'"$2" >"$run/slurm/outcome"; exit "$1"; }

# A stop file tells the trainer to write a checkpoint and exit with status 3. The file is touched repeatedly because a
# starting trainer removes an old one. Depending on the cluster, the signal is sent to this shell or to the processes on the
# nodes; it would kill launchers and a starting trainer, so they ignore it.
asked=
follow() {  # follow PID: wait for it to end and return its status
    [ -n "$asked" ] || wait "$1"
    while [ -n "$asked" ] && kill -0 "$1" 2>/dev/null; do touch "$run/stop"; sleep 1; done
    wait "$1"
}
trap 'asked=1' "$signal" TERM
export -f follow
export PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT

say "start $((restarts + 1)) on $SLURM_JOB_NODELIST, run directory $run"
mkdir -p "$run/slurm"
if [ -e "$run/summary.json" ]; then say "the run is finished already"; exit 0; fi
rm -f "$run/stop" "$run/slurm/outcome"
echo "$job $restarts $(date +%s) $SLURM_JOB_NODELIST" >>"$run/slurm/starts"
[ "$restarts" -le "$max_restarts" ] || stop_with 1 "requeued $restarts times, more than max_restarts = $max_restarts"
[ "$SLURM_JOB_NUM_NODES" = "$nodes" ] || stop_with 2 "asked for $nodes node(s), SLURM gave $SLURM_JOB_NUM_NODES"

# Rendezvous on the first node, at a port derived from the job id; ports in use are skipped.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
if ! getent hosts "$head" >/dev/null; then
    head=$(scontrol show node "$head" --oneliner | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
fi
port=$((10000 + SLURM_JOB_ID % 20000))
while (exec 3<>"/dev/tcp/$head/$port") 2>/dev/null; do port=$((port + 1)); done

# Threads and data workers follow the CPUs that SLURM granted. Without requested GPUs none are used, even if present.
cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
threads=$((cpus / processes_per_node))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
[ "$gpus_per_node" != 0 ] || export CUDA_VISIBLE_DEVICES=
export run task python container scratch nodes processes_per_node gpus_per_node head port signal

on_each_node='
complain() { echo "$(hostname): $1" >&2; printf "2\n%s\n" "$(hostname): $1" >"$run/slurm/outcome"; exit 2; }
[ -d "$run/slurm" ] || { echo "$(hostname) does not see $run: the run root must be on a file system that all nodes share" >&2; exit 2; }
granted=${SLURM_GPUS_ON_NODE:-0}
[ "$granted" = "$gpus_per_node" ] || complain "asked for $gpus_per_node GPU(s) on each node, SLURM gave $granted"
export TOOLKIT_GPUS=$gpus_per_node
if [ -n "$scratch" ]; then
    export TMPDIR=$scratch/toolkit-$SLURM_JOB_ID                # used by this job only, and removed at its end
    mkdir -p "$TMPDIR" || complain "cannot make the scratch folder $TMPDIR"
fi
launcher=                                                       # not needed for a single process
if [ $((nodes * processes_per_node)) != 1 ]; then
    launcher="-m accelerate.commands.launch --multi_gpu --num_processes $((nodes * processes_per_node)) --rdzv_backend static"
    launcher="$launcher --same_network --gpu_ids all --mixed_precision no --dynamo_backend no --num_machines $nodes"
    if [ "$nodes" = 1 ]; then
        launcher="$launcher --main_process_port 0"
    else
        launcher="$launcher --machine_rank $SLURM_NODEID --main_process_ip $head --main_process_port $port"
    fi
fi
asked=
trap "asked=1" "$signal" TERM
(trap "" "$signal" TERM; exec $container "$python" $launcher -m $task "$run") &
follow $!
status=$?
[ -z "$scratch" ] || rm -rf "$TMPDIR"
exit $status
'

srun --export=ALL --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="$cpus" \
    --kill-on-bad-exit=1 bash -c "$on_each_node" &
follow $!
status=$?
[ ! -e "$run/slurm/outcome" ] || status=$(head -n 1 "$run/slurm/outcome")

again() { for _ in 1 2 3 4 5 6; do "$@" && return; sleep 10; done; return 1; }      # SLURM may be busy or restarting
state=$(again squeue --noheader --jobs="$job" --format=%T)
state=${state/SIGNALING/RUNNING}
if [ "$status" = 3 ] && [ "$state" = RUNNING ] && [ ! -e "$run/slurm/cancelled" ]; then
    [ "$restarts" -lt "$max_restarts" ] || stop_with 3 "not requeued: max_restarts = $max_restarts is reached"
    say "checkpoint written, requeue"
    trap '' TERM
    again scontrol requeue "$job" && exit 3
fi
say "end with status $status"
exit "$status"
