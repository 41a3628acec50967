#!/bin/sh
# One node of a Muster local cluster: a small "machine" of its own mount, UTS and PID namespaces.
#
#   node.sh boot NODE STATE SCRATCH BOOT_FLAG UNSHARE_OPTION...   outside: makes the namespaces and stays as their parent
#   node.sh init NODE STATE SCRATCH BOOT_FLAG                     inside: PID 1; starts slurmd, then only reaps
#   node.sh slurmd NODE STATE [SLURMD_OPTION...]                  inside (through nsenter): starts slurmd once more
#
# STATE is the cluster's state directory. Its path on every command line is how `muster local` knows its own processes.
# Killing PID 1 kills every process of the node at once, as a power cut would; the mounts go with the namespace.
set -eu

start_slurmd() {
    node=$1 state=$2
    shift 2
    # An ordinary user's node holds capabilities of its own user namespace, to mount and to name the host; jobs must not.
    if [ "$(id -u)" -ne 0 ]; then
        set -- setpriv --ambient-caps=-all --inh-caps=-all slurmd -f "$state/etc/slurm.conf" -N "$node" "$@"
    else
        set -- slurmd -f "$state/etc/slurm.conf" -N "$node" "$@"
    fi
    "$@"
}

action=$1 node=$2 state=$3
shift 3
case $action in
boot)
    scratch=$1 boot_flag=$2
    shift 2
    exec </dev/null >>"$state/logs/node-$node.log" 2>&1
    exec unshare "$@" sh "$state/node.sh" init "$node" "$state" "$scratch" "$boot_flag"
    ;;
init)
    scratch=$1 boot_flag=$2
    hostname "$node"
    mount --bind "$state/hosts" /etc/hosts
    mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs /dev/shm
    # Slurm's default place for its configuration, so that commands in jobs work without SLURM_CONF too.
    [ ! -d /etc/slurm ] || mount --bind "$state/etc" /etc/slurm
    [ ! -d "$scratch" ] || mount --bind "$state/nodes/$node/scratch" "$scratch"
    start_slurmd "$node" "$state" $boot_flag
    # The shell reaps whatever the node orphans each time it waits.
    while :; do
        sleep 2147483647 &
        wait $!
    done
    ;;
slurmd)
    start_slurmd "$node" "$state" "$@"
    ;;
esac
