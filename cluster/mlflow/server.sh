#!/usr/bin/env bash
# MLflow for a team: one server, its data in PostgreSQL, artifacts in a folder or a bucket, users with passwords.
#
#   1  createdb mlflow
#   2  MLFLOW_BACKEND_STORE_URI=postgresql://USER:PASSWORD@DB/mlflow MLFLOW_ARTIFACTS_DESTINATION=/shared/mlartifacts \
#          MLFLOW_AUTH_ADMIN_PASSWORD=... MLFLOW_FLASK_SERVER_SECRET_KEY=... \
#          MLFLOW_HOST=0.0.0.0 MLFLOW_SERVER_ALLOWED_HOSTS=mlflow.example.com:5000 cluster/mlflow/server.sh
#   3  MLFLOW_TRACKING_USERNAME=admin MLFLOW_TRACKING_PASSWORD=... python study/run.py --tracking-uri http://mlflow.example.com:5000
#
# Secrets come by the environment, so that `ps` shows none. The server speaks plain HTTP: outside of a private network put
# a proxy with TLS in front. It answers only under the host names allowed, with their port. Any user may read and continue
# every study (default_permission below). The admin's password is taken at the first start and changed in MLflow later; an
# old password may still pass for a minute, because checking one afresh for every request is most of the server's work.
set -euo pipefail
umask 077

: "${MLFLOW_BACKEND_STORE_URI:?is not set: the database, such as postgresql://USER:PASSWORD@HOST/mlflow}"
: "${MLFLOW_ARTIFACTS_DESTINATION:?is not set: a folder or a bucket, such as /shared/mlartifacts or s3://bucket/mlartifacts}"
: "${MLFLOW_AUTH_ADMIN_PASSWORD:?is not set: what the user admin shall log in with, 12 characters or more}"
: "${MLFLOW_FLASK_SERVER_SECRET_KEY:?is not set: a long random text that stays the same, for example of openssl rand -hex 32}"
export MLFLOW_BACKEND_STORE_URI MLFLOW_ARTIFACTS_DESTINATION MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY
export MLFLOW_HOST="${MLFLOW_HOST:-127.0.0.1}" MLFLOW_PORT="${MLFLOW_PORT:-5000}" MLFLOW_WORKERS="${MLFLOW_WORKERS:-2}"
export MLFLOW_SERVER_ALLOWED_HOSTS="${MLFLOW_SERVER_ALLOWED_HOSTS:-localhost:$MLFLOW_PORT,127.0.0.1:$MLFLOW_PORT}"
export MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false

private=$(mktemp -d)
export MLFLOW_AUTH_CONFIG_PATH="$private/auth.ini"
cat > "$MLFLOW_AUTH_CONFIG_PATH" << INI
[mlflow]
default_permission = EDIT
database_uri = ${MLFLOW_BACKEND_STORE_URI//%/%%}
admin_username = ${MLFLOW_AUTH_ADMIN_USERNAME:-admin}
auth_cache_ttl_seconds = 60
INI

mlflow server --app-name basic-auth &
server=$!
trap 'kill "$server" 2>/dev/null || true' INT TERM
trap 'rm -rf "$private"' EXIT
while kill -0 "$server" 2>/dev/null; do
  code=0
  wait "$server" || code=$?
done
exit "$code"
