# Sourced on every node before Ray starts there, and by the shells of `ray attach`.
# No secret is in here: Ray reads ~/.ray/auth_token, MLflow's client ~/.mlflow/credentials.

ELSA_CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# This node's address in the network of the cluster, and the head's.
ELSA_NODE=$(hostname -I | cut -d' ' -f1)
export ELSA_CHECKOUT ELSA_NODE
export PATH="$ELSA_CHECKOUT/.venv/bin:$PATH"
export MLFLOW_TRACKING_URI="http://${RAY_HEAD_IP:-$ELSA_NODE}:${ELSA_MLFLOW_PORT:-5000}"

export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0
export RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
# `elsa submit --stop` is a Ctrl-C, with time for a last checkpoint.
export RAY_JOB_STOP_SIGNAL=SIGINT RAY_JOB_STOP_WAIT_TIME_S=120
# Ray has a connection to each process of each node.
ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"
# gloo would take the address that the node's own name resolves to, which Debian makes a loopback.
GLOO_SOCKET_IFNAME=$({ ip -o -4 address show || true; } 2>/dev/null |
  awk -v node="$ELSA_NODE/" 'index($4, node) == 1 {print $2; exit}')
[ -z "$GLOO_SOCKET_IFNAME" ] || export GLOO_SOCKET_IFNAME
