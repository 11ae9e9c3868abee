#!/bin/sh
# Install a wheel into a bare virtual environment, generate an image, and serve one: scripts/smoke-test.sh WHEEL
set -eu
wheel=$(realpath "$1")
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server"; rm -rf "$folder"' EXIT
cd "$folder"  # nothing of the checkout can be imported from here

${PYTHON:-python3} -m venv venv
"$here/install-torch.sh" venv/bin/python
venv/bin/pip install --quiet "$wheel"

venv/bin/robuq sample goldfish --steps 2 --seed 0 --out images
test -s images/0000_class1.png
venv/bin/robuq-serve --port 8123 --log-level warning &
server=$!
for _ in $(seq 60); do
    if venv/bin/python -c 'import urllib.request as r; r.urlopen("http://127.0.0.1:8123/ready")' 2>/dev/null; then
        venv/bin/python -c '
import urllib.request as r
request = r.Request("http://127.0.0.1:8123/generate", b"{\"class_id\": 1, \"steps\": 2}", {"Accept": "image/png"})
assert r.urlopen(request).read(4) == b"\x89PNG"'
        echo "the wheel installs, generates and serves"
        exit 0
    fi
    sleep 1
done
echo "the server did not become ready" >&2
exit 1
