#!/usr/bin/env bash
# Checks the server with the official OpenAI, Anthropic and Ollama clients, and its OpenAPI document, with the demo model.
#
#   Scripts/client_checks.sh setup         makes the Python environment of the pinned clients; needs PyPI the first time
#   Scripts/client_checks.sh run APUS      serves the demo model with the executable APUS on free ports and runs the checks;
#                                          needs no network but the loopback interface
#
# CLIENT_CHECKS=skip in the environment leaves both out, for machines that reach no package registry.
set -euo pipefail
cd "$(dirname "$0")/.."

environment=.build/client-checks
requirements=Scripts/client_requirements.txt

if [ "${CLIENT_CHECKS:-}" = skip ]; then
  echo "client checks: left out, since CLIENT_CHECKS=skip is set." >&2
  exit 0
fi

setup() {
  # Debian ships Python's venv module, and Python itself, as packages of their own.
  if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then Scripts/setup.sh python3-venv; fi
  local stamp
  stamp=$(python3 --version; cat "$requirements")
  if [ "$(cat "$environment/stamp" 2>/dev/null)" = "$stamp" ]; then return; fi
  echo "client checks: installing the clients of $requirements into $environment."
  rm -rf "$environment"
  mkdir -p "$(dirname "$environment")"
  python3 -m venv "$environment"
  if ! "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile --only-binary :all: \
    --retries 2 --timeout 15 --requirement "$requirements"; then
    echo "client checks: the clients could not be installed; is PyPI within reach? (CLIENT_CHECKS=skip leaves the checks out.)" >&2
    exit 1
  fi
  printf '%s\n' "$stamp" >"$environment/stamp"
}

servers=()
checking=()
scratch=
stop() {
  local process
  for process in "${checking[@]}" "${servers[@]}"; do kill "$process" 2>/dev/null || true; done
  for process in "${checking[@]}" "${servers[@]}"; do wait "$process" 2>/dev/null || true; done
  if [ -n "$scratch" ]; then rm -rf "$scratch"; fi
}

# Starts a server; its address, without /v1, goes into $url.
serve() {
  local name=$1
  shift
  "$apus" serve Models/apus-demo --port 0 --log-level warning "$@" >"$scratch/$name.log" 2>&1 &
  servers+=($!)
  for _ in $(seq 300); do
    url=$(sed -nE 's|^Serving .* at (http://[0-9.:]+)/v1$|\1|p' "$scratch/$name.log")
    if [ -n "$url" ]; then return; fi
    if ! kill -0 "${servers[-1]}" 2>/dev/null; then break; fi
    sleep 0.1
  done
  echo "client checks: the server did not start:" >&2
  cat "$scratch/$name.log" >&2
  exit 1
}

run() {
  apus=$1
  if [ ! -x "$apus" ]; then
    echo "client checks: there is no executable at $apus." >&2
    exit 1
  fi
  if [ ! -e "$environment/stamp" ]; then
    echo "client checks: run Scripts/client_checks.sh setup first." >&2
    exit 1
  fi
  scratch=$(mktemp -d)
  trap stop EXIT
  export PYTHONDONTWRITEBYTECODE=1 NO_PROXY=127.0.0.1 no_proxy=127.0.0.1
  local key=client-checks text vectors failures=0
  serve text --api-key "$key"
  text=$url
  serve vectors --is-embedding --api-key "$key"
  vectors=$url
  local -A addresses=([openai]=$text/v1 [anthropic]=$text [ollama]=$text [openapi]=$text [embedding]=$vectors/v1)
  local -A checks
  local client
  for client in "${!addresses[@]}"; do
    timeout 150 "$environment/bin/python" "Scripts/${client}_client_check.py" "${addresses[$client]}" --api-key "$key" \
      >"$scratch/$client.out" 2>&1 &
    checks[$client]=$!
    checking+=($!)
  done
  for client in "${!addresses[@]}"; do
    if wait "${checks[$client]}"; then
      echo "client checks: $(tail -1 "$scratch/$client.out")"
    else
      failures=$((failures + 1))
      echo "client checks: $client failed:" >&2
      cat "$scratch/$client.out" >&2
    fi
  done
  for server in "${servers[@]}"; do
    if ! kill -0 "$server" 2>/dev/null; then
      failures=$((failures + 1))
      echo "client checks: a server ended by itself:" >&2
      tail -20 "$scratch"/{text,vectors}.log >&2
    fi
  done
  [ "$failures" -eq 0 ]
}

case "${1:-}" in
  setup) setup ;;
  run) run "${2:?the path of the apus executable}" ;;
  *)
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
