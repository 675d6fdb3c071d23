#!/bin/bash
# What each host of a launch runs; docs/slurm.sh and docs/ssh.sh run it:
#
#   HOSTS=2 ENDPOINT=host1:29400 ID=first ADDRESS=host2 bash docs/node.sh groupwise.recipes.grpo datarus run.shard_size=8
#
# HOSTS, ENDPOINT (one of the hosts, and a free port of it) and ID are the same on all; ADDRESS is how the others reach
# this host, by a name or a number. RANKS is the number of ranks of a host, without it one for each GPU.
set -euo pipefail
PATH=$PWD/.venv/bin:$PATH

# A store for each attempt: in one that is kept, restarted ranks find the addresses of dead ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# A host that is cut off is waited for, an hour. Ranks that are asked to stop have 240 s to save.
exec torchrun --nnodes "$HOSTS" --nproc-per-node "${RANKS:-gpu}" --local-addr "$ADDRESS" \
    --rdzv-backend c10d --rdzv-endpoint "$ENDPOINT" --rdzv-id "$ID" --rdzv-conf join_timeout=3600,read_timeout=3600 \
    --max-restarts "${RESTARTS:-5}" --shutdown-timeout 240 -m "$@"
