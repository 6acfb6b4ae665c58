#!/usr/bin/env bash
# Start the tracking server on the head, unless it runs: MLflow with a user and a password, its
# artifacts proxied to the bucket, so that no node and no browser needs the bucket's credentials.
# Its data is in storage/mlflow, on the shared storage, where a new head finds it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
settings=$HOME/.config/elsa/cluster.env
# shellcheck source=/dev/null
[ ! -f "$settings" ] || . "$settings"
# shellcheck source=/dev/null
. "$here/env.sh"
port=${ELSA_MLFLOW_PORT:-5000}
healthy() { python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:$port/health', timeout=3)" 2>/dev/null; }
! healthy || exit 0

read_credential() { sed -n "s/^ *mlflow_tracking_$1 *= *//p" ~/.mlflow/credentials; }
user=$(read_credential username)
# By environment: arguments can be read by every user of the machine.
MLFLOW_AUTH_ADMIN_PASSWORD=$(read_credential password)
if [ -z "$user" ] || [ -z "$MLFLOW_AUTH_ADMIN_PASSWORD" ]; then
  echo "error: no user and password for the tracking server in ~/.mlflow/credentials; see pipelines/README.md" >&2
  exit 1
fi

umask 077
data=${ELSA_MLFLOW_DATA:-$ELSA_CHECKOUT/storage/mlflow}
mkdir -p "$data"
[ -s "$data/session_key" ] || python -c "import secrets; print(secrets.token_hex(32))" >"$data/session_key"
MLFLOW_FLASK_SERVER_SECRET_KEY=$(cat "$data/session_key")
cat >"$data/basic_auth.ini" <<INI
[mlflow]
default_permission = READ
database_uri = sqlite:///$data/users.db
admin_username = $user
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
INI
export MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY
export MLFLOW_AUTH_CONFIG_PATH=$data/basic_auth.ini MLFLOW_DISABLE_TELEMETRY=true

artifacts=$data/artifacts
[ -z "${ELSA_BUCKET:-}" ] || artifacts=s3://$ELSA_BUCKET/mlflow
cd "$data"
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false  # seven more processes, for nothing that we use
nohup mlflow server --app-name basic-auth --workers "${ELSA_MLFLOW_WORKERS:-2}" \
  --host "${ELSA_MLFLOW_HOST:-0.0.0.0}" --port "$port" \
  --backend-store-uri "sqlite:///$data/mlflow.db" \
  --serve-artifacts --artifacts-destination "$artifacts" >server.log 2>&1 </dev/null &
echo $! >"$data/server.pid"
for _ in $(seq 120); do
  ! healthy || exit 0
  sleep 1
done
echo "error: the tracking server did not start; the end of $data/server.log:" >&2
tail -n 20 server.log >&2
exit 1
