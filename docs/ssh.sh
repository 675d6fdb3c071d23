#!/bin/bash
# A launch on several hosts by ssh:
#
#   bash docs/ssh.sh "host1 host2" groupwise.recipes.grpo datarus run.shard_size=8
#
# The hosts reach each other by these names, and this machine reaches them without a password. This folder, the run
# folder and the data lie on a disk that all of them see under one path. Lines begin with the host that wrote them.
set -euo pipefail
read -ra hosts <<<"$1"
shift
id=${ID:-$(date +%s)} port=${PORT:-29400}
for host in "${hosts[@]}"; do
    settings=(HOSTS="${#hosts[@]}" ENDPOINT="${hosts[0]}:$port" ID="$id" ADDRESS="$host" ${RANKS:+RANKS="$RANKS"})
    line="cd $(printf %q "$PWD") && exec env $(printf '%q ' "${settings[@]}" bash docs/node.sh "$@")"
    echo "$host: $line"
    # With a terminal (-tt) the end of this script is a hangup there, on which torchrun ends its ranks.
    ssh -tt "$host" "$line" </dev/null 2>&1 | sed -u "s/^/$host: /" &
    ends+=($!)
done
status=0
for end in "${ends[@]}"; do
    wait "$end" || status=1
done
exit $status
