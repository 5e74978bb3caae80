# --- from here on every script is the same ---------------------------------------------------------------------------
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}   # an array's job bears two numbers
job=${job:-$SLURM_JOB_ID}
restarts=${SLURM_RESTART_COUNT:-0}                                      # not set at the first start
say() { echo "$(date '+%F %T') job $job: $*"; }
stop_with() { say "$2"; echo "$1"$'\n'"$2" >"$run/slurm/outcome"; exit "$1"; }

say "start $((restarts + 1)) on $SLURM_JOB_NODELIST, run directory $run"
mkdir -p "$run/slurm"
if [ -e "$run/summary.json" ]; then say "the run is finished already"; exit 0; fi
rm -f "$run/stop" "$run/slurm/outcome"
echo "$job $restarts $(date +%s) $SLURM_JOB_NODELIST" >>"$run/slurm/starts"
[ "$restarts" -le "$max_restarts" ] || stop_with 1 "requeued $restarts times, more than max_restarts = $max_restarts"
[ "$SLURM_JOB_NUM_NODES" = "$nodes" ] || stop_with 2 "asked for $nodes node(s), SLURM gave $SLURM_JOB_NUM_NODES"

# The processes meet on the first node, at a port of this job's own; one that somebody listens on is passed over.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
if ! getent hosts "$head" >/dev/null; then
    head=$(scontrol show node "$head" --oneliner | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
fi
port=$((10000 + SLURM_JOB_ID % 20000))
while (exec 3<>"/dev/tcp/$head/$port") 2>/dev/null; do port=$((port + 1)); done

# Threads follow the CPUs that SLURM granted, and so do data workers. Without GPUs none is used, even where there are some.
cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
threads=$((cpus / processes_per_node))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
[ "$gpus_per_node" != 0 ] || export CUDA_VISIBLE_DEVICES=
export run python container nodes processes_per_node gpus_per_node head port

on_each_node='
complain() { echo "$(hostname): $1" >&2; printf "2\n%s\n" "$(hostname): $1" >"$run/slurm/outcome"; exit 2; }
[ -e "$run/recipe.toml" ] || { echo "$(hostname) does not see $run: the run root must be on a file system that all nodes share" >&2; exit 2; }
granted=${SLURM_GPUS_ON_NODE:-0}
[ "$granted" = "$gpus_per_node" ] || complain "asked for $gpus_per_node GPU(s) on each node, SLURM gave $granted"
export TOOLKIT_GPUS=$gpus_per_node
if [ $((nodes * processes_per_node)) = 1 ]; then
    exec $container "$python" -m toolkit.slurm.task "$run"      # one process needs no launcher
fi
where="--num_machines 1 --main_process_port 0"
if [ "$nodes" != 1 ]; then
    where="--num_machines $nodes --machine_rank $SLURM_NODEID --main_process_ip $head --main_process_port $port"
fi
exec $container "$python" -m accelerate.commands.launch --multi_gpu --num_processes $((nodes * processes_per_node)) \
    $where --rdzv_backend static --same_network --gpu_ids all --mixed_precision no --dynamo_backend no \
    -m toolkit.slurm.task "$run"
'

# SLURM warns this shell; the stop file tells the trainer, which writes a checkpoint and ends with status 3. The file is
# touched again and again because a trainer that is only starting takes an old one away.
asked=
trap 'asked=1' "$signal" TERM
srun --export=ALL --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="$cpus" \
    --kill-on-bad-exit=1 bash -c "$on_each_node" &
step=$!
wait "$step"
while [ -n "$asked" ] && kill -0 "$step" 2>/dev/null; do touch "$run/stop"; sleep 1; done
wait "$step"
status=$?
[ ! -e "$run/slurm/outcome" ] || status=$(head -n 1 "$run/slurm/outcome")

state=$(squeue --noheader --jobs="$job" --format=%T)
if [ "$status" = 3 ] && [ "$state" = RUNNING ] && [ ! -e "$run/slurm/cancelled" ]; then
    [ "$restarts" -lt "$max_restarts" ] || stop_with 3 "not requeued: max_restarts = $max_restarts is reached"
    say "checkpoint written, requeue"
    trap '' TERM
    scontrol requeue "$job" && exit 3
fi
say "end with status $status"
exit "$status"
