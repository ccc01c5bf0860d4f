# shellcheck shell=bash
# gloo's variables; sourced by the batch script for runs on GPUs as well: the preflight exchanges its reports over
# gloo. What the site or the user has set stays.

# gloo listens on the interface that the node's own name resolves to. Where /etc/hosts says 127.0.1.1 (Debian), that
# is the loopback, which other nodes cannot reach: name the interface in the site file then ("Gloo connectFullMesh
# failed" in the log is the sign). A job on one node needs no network at all.
if [[ -z ${GLOO_SOCKET_IFNAME:-} && ${SLURM_JOB_NUM_NODES:-1} == 1 ]]; then
    export GLOO_SOCKET_IFNAME=lo
fi
