#!/usr/bin/env bash
# Run a SLURM cluster of two nodes on this machine, to try submissions: real daemons with a temporary configuration.
#
#   slurm/local-cluster.sh start DIR             start it; DIR is a new or empty folder with a short absolute path
#   . DIR/env.sh                                 in each shell that uses it; then sbatch, squeue, toolkit submit ...
#   slurm/local-cluster.sh status DIR
#   slurm/local-cluster.sh kill-node DIR node2   kill node2 and all its processes
#   slurm/local-cluster.sh start-node DIR node2  start it again
#   slurm/local-cluster.sh on DIR node2 COMMAND  run a command there, outside any job
#   slurm/local-cluster.sh stop DIR              cancel all jobs and stop all daemons; the logs in DIR are kept
#
# Debian, Ubuntu: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge iproute2 util-linux procps
#
# Each node has NODE_CPUS (4) CPUs, 4 GB and NODE_GPUS (2) GPUs. These are only declared: nothing is limited, and the GPUs
# are names without hardware. For root, a node is a set of Linux namespaces with its own host name, address and processes;
# without the necessary rights (or with CLUSTER_MODE=plain) the nodes are two daemons on 127.0.0.1.
#
# Jobs in the partition low are preempted by those in debug, the default partition: SLURM signals them and requeues them
# PREEMPT_GRACE (60) seconds later. CLUSTER_ACCOUNTING=1 enables accounting, for sacct; this needs the packages
# slurmdbd mariadb-server-core mariadb-client-core.
set -euo pipefail
umask 022
PATH=$PATH:/usr/sbin:/sbin

fail() { echo "local-cluster: $*" >&2; exit 1; }
[ $# -ge 2 ] || { sed -n '2,21s/^# \{0,1\}//p' "$0" >&2; exit 2; }
action=$1
dir=$(realpath -m "$2")
node=${3-}
nodes="node1 node2"
case $dir in *[!A-Za-z0-9/._-]*) fail "slurm.conf cannot take this folder's name: $dir" ;; esac
[ ${#dir} -le 80 ] || fail "the path of a socket may not be so long: $dir"
case $action in kill-node | start-node | on) case $node in node1 | node2) ;; *) fail "which node: node1 or node2?" ;; esac ;; esac
for name in $(compgen -e | grep -E '^(SLURM|SBATCH|SRUN|SALLOC|SQUEUE)_' || true); do unset "$name"; done
export SLURM_CONF=$dir/slurm.conf
bridge=lc$(echo "$dir" | md5sum | head -c 6)                  # names of network devices are short
mode() { cat "$dir/mode" 2>/dev/null || echo plain; }
number() { echo "${1#node}"; }

runs() {  # runs PIDFILE NAME: print the process id in the file if that process runs and has this name
    local pid
    pid=$(cat "$1" 2>/dev/null) && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$2" ] &&
        ! grep -q '^State:.*zombie' "/proc/$pid/status" && echo "$pid"
}

end_process() {  # end_process PIDFILE NAME
    local pid
    if pid=$(runs "$1" "$2"); then
        kill "$pid" 2>/dev/null || true
        for _ in $(seq 50); do runs "$1" "$2" >/dev/null || break; sleep 0.1; done
        if runs "$1" "$2" >/dev/null; then kill -KILL "$pid"; fi
    fi
    rm -f "$1"
}

may_have_namespaces() {
    [ "$(id -u)" = 0 ] && unshare --net --uts --mount --pid --fork --mount-proc sh -c \
        'hostname probe && ip link add name p0 type bridge && ip link add name p1 type veth peer name p2' >/dev/null 2>&1
}

listens() { ss -Hltn 2>/dev/null | grep -qE ":($1)\b"; }  # listens PORT|PORT|...

free_ports() {  # print the first of five consecutive ports on which nothing listens
    local first
    for _ in $(seq 100); do
        first=$((30000 + RANDOM % 2000))
        listens "$(seq -s '|' $first $((first + 4)))" || { echo $first; return; }
    done
    fail "no free ports"
}

free_net() {  # print three bytes of a network to which this machine has no route
    local net
    for _ in $(seq 100); do
        net=10.$((200 + RANDOM % 50)).$((RANDOM % 250))
        ip -4 route show table all | grep -qF "${net%.*}." || { echo "$net"; return; }
    done
    fail "no free network 10.200-249.*"
}

configure() {  # configure MODE
    local host port control machine address user i
    host=$(uname -n); host=${host%%.*}; user=$(id -un); port=$(free_ports); control=127.0.0.1
    echo "$1" >"$dir/mode"
    if [ "$1" = net ]; then
        free_net >"$dir/net"
        control=$(cat "$dir/net").1
        printf '%s\n' "127.0.0.1 localhost" "$control $host" "${control%.*}.11 node1" "${control%.*}.12 node2" >"$dir/hosts"
        { grep -v '^hosts:' /etc/nsswitch.conf 2>/dev/null || true; echo "hosts: files"; } >"$dir/nsswitch.conf"
    fi
    {
        cat <<CONF
ClusterName=local
SlurmctldHost=$host($control)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credential has expired: 10 s here, two minutes by default.
AuthInfo=socket=$dir/munge.socket,cred_expire=10
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
# No control groups, no MPI; SLURM keeps the records of ended jobs for an hour.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MinJobAge=3600
$(accounting "$control" $((port + 3)))
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# Use the declared resources, not the hardware's; refuse impossible requests at submission.
SlurmdParameters=config_overrides
EnforcePartLimits=ALL
ReturnToService=2
SlurmdTimeout=10
KillWait=5
GresTypes=gpu
CONF
        for i in 1 2; do
            machine=$host; address=127.0.0.1
            [ "$1" = plain ] || { machine=node$i; address=${control%.*}.1$i; }
            echo "NodeName=node$i NodeHostname=$machine NodeAddr=$address Port=$((port + i)) CPUs=${NODE_CPUS:-4}" \
                "RealMemory=4096 Gres=gpu:${NODE_GPUS:-2} State=UNKNOWN"
        done
        echo "PartitionName=DEFAULT Nodes=node[1-2] MaxTime=INFINITE DefaultTime=00:10:00 State=UP PreemptMode=OFF"
        echo "PartitionName=debug Default=YES PriorityTier=10"
        echo "PartitionName=low PriorityTier=1 PreemptMode=REQUEUE GraceTime=${PREEMPT_GRACE:-60}"
    } >"$dir/slurm.conf"
    [ "${CLUSTER_ACCOUNTING-}" != 1 ] || configure_accounts "$host" "$control" $((port + 3)) "$user"
    # A fake GPU must be a character device whose name ends in its number, or SLURM does not set CUDA_VISIBLE_DEVICES.
    for i in $(seq 0 $((${NODE_GPUS:-2} - 1))); do ln -s /dev/null "$dir/dev/nvidia$i"; done
    printf '%s\n' "AutoDetect=off" "Name=gpu Flags=nvidia_gpu_env File=$dir/dev/nvidia[0-$((${NODE_GPUS:-2} - 1))]" >"$dir/gres.conf"
    echo "CgroupPlugin=cgroup/v1" >"$dir/cgroup.conf"
    # Both nodes are this machine, so they share its folders.
    printf '%s\n' 'description = "slurm/local-cluster.sh"' 'shared = ["/"]' >"$dir/profiles/local.toml"
    printf '%s\n' "export SLURM_CONF=$dir/slurm.conf" "export TOOLKIT_SLURM_PROFILES=$dir/profiles" \
        "export TOOLKIT_PRETENDED_GPUS=1" >"$dir/env.sh"
}

accounting() {  # accounting ADDRESS PORT: lines of slurm.conf
    if [ "${CLUSTER_ACCOUNTING-}" != 1 ]; then
        printf '%s\n' JobAcctGatherType=jobacct_gather/none AccountingStorageType=accounting_storage/none
    else
        printf '%s\n' JobAcctGatherType=jobacct_gather/linux AccountingStorageType=accounting_storage/slurmdbd \
            "AccountingStorageHost=$1" "AccountingStoragePort=$2" "AccountingStoragePass=$dir/munge.socket"
    fi
}

configure_accounts() {  # configure_accounts HOST ADDRESS PORT USER
    (umask 077; printf '%s\n' "DbdHost=$1" "DbdAddr=$2" "DbdPort=$3" "SlurmUser=$4" AuthType=auth/munge \
        "AuthInfo=socket=$dir/munge.socket" "LogFile=$dir/log/slurmdbd.log" "PidFile=$dir/run/slurmdbd.pid" \
        StorageType=accounting_storage/mysql StorageHost=127.0.0.1 "StoragePort=$(($3 + 1))" StorageUser=root \
        StoragePass=none StorageLoc=slurm_acct_db CommitDelay=1 >"$dir/slurmdbd.conf")
}

start_accounts() {  # start the database and its daemon, and register the cluster
    local port as=()
    port=$(sed -n 's/^StoragePort=//p' "$dir/slurmdbd.conf")
    [ "$(id -u)" != 0 ] || as=(--user=root)
    mkdir -p "$dir/db"
    mariadb-install-db --no-defaults "${as[@]}" --datadir="$dir/db" --auth-root-authentication-method=normal \
        --skip-test-db </dev/null >"$dir/log/mariadb-install.log" 2>&1 || fail "$(cat "$dir/log/mariadb-install.log")"
    setsid mariadbd --no-defaults "${as[@]}" --datadir="$dir/db" --socket="$dir/run/mariadb.sock" \
        --pid-file="$dir/run/mariadbd.pid" --bind-address=127.0.0.1 --port="$port" --skip-grant-tables \
        --innodb-buffer-pool-size=64M --innodb-log-file-size=16M --innodb-lock-wait-timeout=900 \
        --log-error="$dir/log/mariadbd.log" </dev/null >/dev/null 2>&1 &
    for _ in $(seq 600); do listens "$port" && break; sleep 0.1; done
    slurmdbd </dev/null >"$dir/log/slurmdbd.out" 2>&1 || fail "$(cat "$dir/log/slurmdbd.out")"
    for _ in $(seq 300); do
        if timeout 10 sacctmgr -i add cluster local >"$dir/log/sacctmgr.out" 2>&1; then return; fi
        sleep 0.2
    done
    fail "slurmdbd does not answer: $(cat "$dir/log/sacctmgr.out")"
}

init_of() {  # init_of NODE: print the id, outside the namespaces, of their first process
    local holder
    holder=$(runs "$dir/run/$1.pid" unshare) && pgrep -P "$holder" | head -n 1 | grep .
}

raise_node() {  # create the namespaces of a node and a virtual link to the bridge
    local net init i
    net=$(cat "$dir/net"); i=$(number "$1")
    ip link del "$bridge-$i" 2>/dev/null || true
    rm -f "$dir/run/$1.ready"
    setsid unshare --net --uts --mount --pid --fork --kill-child --mount-proc bash -c '
        hostname "$1"; ip link set lo up
        mount --bind "$2/hosts" /etc/hosts
        [ ! -e /etc/nsswitch.conf ] || mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
        touch "$2/run/$1.ready"
        while :; do sleep 86400 & wait $!; done' init "$1" "$dir" </dev/null >"$dir/log/$1.log" 2>&1 &
    echo $! >"$dir/run/$1.pid"
    for _ in $(seq 100); do [ ! -e "$dir/run/$1.ready" ] || break; sleep 0.05; done
    init=$(init_of "$1") || fail "no namespaces for $1: $(cat "$dir/log/$1.log")"
    ip link add name "$bridge-$i" type veth peer name eth0 netns "$init"
    ip link set "$bridge-$i" master "$bridge" up
    nsenter -t "$init" -n ip addr add "$net.1$i/24" dev eth0
    nsenter -t "$init" -n ip link set eth0 up
}

on_node() {  # on_node NODE COMMAND...
    local init name=$1
    shift
    if [ "$(mode)" = plain ]; then "$@"; return; fi
    init=$(init_of "$name") || fail "$name is not up"
    nsenter -t "$init" --net --uts --mount --pid -- "$@"
}

start_node() {
    mkdir -p "$dir/spool/$1"
    if [ "$(mode)" = net ] && ! init_of "$1" >/dev/null; then raise_node "$1"; fi
    on_node "$1" slurmd -N "$1" -f "$SLURM_CONF" </dev/null >"$dir/log/slurmd.$1.out" 2>&1 || fail "$(cat "$dir/log/slurmd.$1.out")"
}

kill_tree() {
    local child
    for child in $(pgrep -P "$1"); do kill_tree "$child"; done
    kill -KILL "$1" 2>/dev/null || true
}

kill_node() {
    local pid
    if [ "$(mode)" = net ]; then
        if pid=$(runs "$dir/run/$1.pid" unshare); then
            kill -KILL "$pid"                                  # --kill-child: ends all processes of its namespace
            for _ in $(seq 100); do runs "$dir/run/$1.pid" unshare >/dev/null || break; sleep 0.05; done
        fi
        ip link del "$bridge-$(number "$1")" 2>/dev/null || true
    else
        if pid=$(runs "$dir/run/slurmd.$1.pid" slurmd); then kill -KILL "$pid"; fi
        for pid in $(pgrep -x slurmstepd || true); do          # job steps of this node have its log open
            if ls -l "/proc/$pid/fd" 2>/dev/null | grep -qF -- "-> $dir/log/slurmd.$1.log"; then kill_tree "$pid"; fi
        done
    fi
    rm -rf "$dir/run/$1.pid" "$dir/run/slurmd.$1.pid" "${dir:?}/spool/$1"
}

start() {
    local command chosen
    for command in munged slurmctld slurmd sbatch srun ip nsenter pgrep ss; do
        command -v $command >/dev/null || fail "no $command here; on Debian: apt-get install --no-install-recommends" \
            "slurmctld slurmd slurm-client munge iproute2 util-linux procps"
    done
    for command in $([ "${CLUSTER_ACCOUNTING-}" != 1 ] || echo slurmdbd mariadbd mariadb-install-db sacctmgr); do
        command -v "$command" >/dev/null || fail "no $command here; on Debian: apt-get install --no-install-recommends" \
            "slurmdbd mariadb-server-core mariadb-client-core"
    done
    if [ -e "$dir/slurm.conf" ]; then stop; fi
    rm -rf "${dir:?}"/{run,log,state,spool,dev,profiles,db,munge.*,slurmdbd.conf,net,mode}
    mkdir -p "$dir"/{run,log,state,spool,dev,profiles}
    chosen=${CLUSTER_MODE:-$(if may_have_namespaces; then echo net; else echo plain; fi)}
    configure "$chosen"
    (umask 077; head -c 128 /dev/urandom >"$dir/munge.key")
    trap 'code=$?; [ $code = 0 ] || stop; exit $code' EXIT
    if [ "$chosen" = net ]; then
        ip link del "$bridge" 2>/dev/null || true
        ip link add name "$bridge" type bridge
        ip addr add "$(cat "$dir/net").1/24" dev "$bridge"
        ip link set "$bridge" up
    fi
    munged --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" --log-file="$dir/log/munged.log" \
        --pid-file="$dir/run/munged.pid" --seed-file="$dir/munge.seed" --num-threads=2 </dev/null >"$dir/log/munged.out" 2>&1 ||
        fail "$(cat "$dir/log/munged.out")"
    [ "${CLUSTER_ACCOUNTING-}" != 1 ] || start_accounts
    slurmctld -f "$SLURM_CONF" </dev/null >"$dir/log/slurmctld.out" 2>&1 || fail "$(cat "$dir/log/slurmctld.out")"
    for node in $nodes; do start_node "$node"; done
    for _ in $(seq 300); do
        if [ "$(timeout 5 sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l)" = 2 ]; then
            echo "two nodes are idle ($chosen); now: . $dir/env.sh"
            return
        fi
        sleep 0.1
    done
    tail -n 5 "$dir"/log/*.log >&2
    fail "the nodes did not come up"
}

stop() {
    if runs "$dir/run/slurmctld.pid" slurmctld >/dev/null; then
        timeout 10 squeue -h -o %A 2>/dev/null | sort -u | xargs -r timeout 10 scancel --full >/dev/null 2>&1 || true
        for _ in $(seq 80); do [ -n "$(timeout 5 squeue -h -t R,CG,PD -o %i 2>/dev/null)" ] || break; sleep 0.1; done
    fi
    for node in $nodes; do
        [ "$(mode)" = net ] || end_process "$dir/run/slurmd.$node.pid" slurmd
        kill_node "$node"
    done
    for name in slurmctld slurmdbd mariadbd munged; do end_process "$dir/run/$name.pid" "$name"; done
    if [ "$(mode)" = net ]; then ip link del "$bridge" 2>/dev/null || true; fi
}

case $action in
    start) start ;;
    stop) stop ;;
    status) timeout 10 sinfo -N -o '%N %t %c %G %E'; timeout 10 squeue ;;
    kill-node) kill_node "$node" ;;
    start-node) start_node "$node" ;;
    on) shift 3; on_node "$node" "$@" ;;
    *) fail "what is $action?" ;;
esac
