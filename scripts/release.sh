#!/bin/sh
# Check and build a release into dist/: scripts/release.sh vVERSION
#
# The tag must be the version of the package and have a section in CHANGELOG.md, which becomes dist/notes.md.
set -eu
cd "$(dirname "$0")/.."
tag=$1
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' robuq_core/__init__.py)
if [ "$tag" != "v$version" ]; then
    echo "the tag $tag is not v$version, the __version__ in robuq_core/__init__.py" >&2
    exit 2
fi
if [ -n "$(git status --porcelain)" ]; then
    echo "there are uncommitted changes: commit or stash them" >&2
    exit 2
fi
notes=$(awk -v head="## [$version] - " 'index($0, head) == 1 {on = 1; next} /^## / {on = 0} on' CHANGELOG.md)
if [ -z "$notes" ]; then
    echo "CHANGELOG.md has no section '## [$version] - DATE'" >&2
    exit 2
fi
if [ "${CHECK_ONLY:-}" ]; then
    echo "$tag is ready to build"
    exit 0
fi
rm -rf dist
.ci/run
make dist sbom
scripts/smoke-test.sh dist/*.whl
printf '%s\n' "$notes" > dist/notes.md
ls -l dist
